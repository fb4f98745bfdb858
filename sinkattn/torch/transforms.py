"""The operators as functions of autograd: for torch.func (grad, vjp, vmap of grad, ...), whose
levels know no gradient that was registered with an operator, and for a lighter call."""

import torch
from torch.autograd import forward_ad
from torch.autograd import profiler as torch_profiler

from sinkattn import _core

from . import backward, batching, forward, schema


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return schema.attend(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        forward.remember(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *grads):
        return forward.backward(ctx, *grads, differentiate=_AttendBackward.apply)

    @staticmethod
    def vmap(info, axes, *arguments):
        return batching.attend(info, axes, *arguments, call=_Attend.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("attend(): a forward-mode derivative was asked for, and there "
                                  "are gradients alone: use torch.func.grad or vjp")


class _AttendBackward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments):
        return schema.attend_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        backward.refuse(ctx, *grads)

    @staticmethod
    def vmap(info, axes, *arguments):
        return batching.attend_backward(info, axes, *arguments,
                                        call=_AttendBackward.apply)


class _Direct(torch.autograd.Function):
    """Of plain tensors while nothing else is at work: the core, without an operator between."""

    @staticmethod
    def forward(ctx, q, k, v, sink_logits, sink_bias, sink_q, sink_k, sink_v, windows, alibi_slopes,
                starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k, plain, mass):
        causal, window, sinks, scale, softcap = plain
        results = _core.attend_below_autograd(
            q, k, v, causal, window if windows is None else windows, sinks, sink_logits, sink_bias,
            sink_q, None if sink_k is None else (sink_k, sink_v), scale, softcap, alibi_slopes,
            starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k, None, True, *mass)
        ctx.save_for_backward(*results[:2], q, k, v, sink_logits, sink_bias, sink_q, sink_k, sink_v,
                              windows, alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q,
                              cu_seqlens_k)
        ctx.set_materialize_grads(False)
        if mass[0]:
            ctx.mark_non_differentiable(results[2])
        ctx.plain = plain
        return results

    @staticmethod
    def backward(ctx, dout, dlse, _=None):
        if dout is None and dlse is None:
            return (None,) * _GIVEN
        (out, lse, q, k, v, sink_logits, sink_bias, sink_q, sink_k, sink_v, windows,
         *others) = ctx.saved_tensors
        causal, window, sinks, scale, softcap = ctx.plain
        given = (torch.zeros_like(out) if dout is None else dout, dlse, q, k, v, out, lse, causal,
                 window, windows, sinks, sink_logits, sink_bias, sink_q, sink_k, sink_v, scale,
                 softcap, *others, torch.are_deterministic_algorithms_enabled())
        needed = ctx.needs_input_grad
        if torch.compiler.is_dynamo_compiling():  # compiled autograd
            grads = dict(zip(schema.DIFFERENTIABLE, schema.attend_backward(*given)))
        elif torch.is_grad_enabled() or at_work() or type(given[0]) not in _PLAIN:
            # the gradient of this gradient may be asked for
            grads = dict(zip(schema.DIFFERENTIABLE, _AttendBackward.apply(*given)))
        else:
            grads = backward.gradients(*given)
        # Logits and bias come in float32, whatever they were.
        answer = [grads[name] if wish else None
                  for name, wish in zip(schema.DIFFERENTIABLE, needed)]
        for at, tensor in ((3, sink_logits), (4, sink_bias)):
            if answer[at] is not None:
                answer[at] = answer[at].to(tensor.dtype)
        return *answer, *[None] * (_GIVEN - len(answer))


_GIVEN = 17  # arguments of _Direct
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
# Function.apply without its Python, which looks for defaults and for what torch.func left behind.
_apply_directly = super(torch.autograd.Function, _Direct).apply


def at_work(_c=torch._C):
    """Is there a mode, a transformation, a tracer or a profiler that has to see the operator?"""
    return (_c._are_functorch_transforms_active() or _c._len_torch_dispatch_stack() > 0
            or _c._len_torch_function_stack() > 0 or _c._is_any_autocast_enabled()
            or forward_ad._current_level >= 0 or torch_profiler._is_profiler_enabled
            or _c._get_tracing_state() is not None)


def attend_directly(q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q, sink_kv, scale,
                    softcap, alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k,
                    out, return_lse, return_mass, mass_reduce, mass_queries):
    """The core's own call, recorded by autograd if a tensor asks for it, or None: what it does not
    take goes to the operator, which may know what to do and has the words."""
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return None
    if getattr(scale, "requires_grad", False) or getattr(softcap, "requires_grad", False):
        return None
    sink_k, sink_v = (None, None) if sink_kv is None else _both(sink_kv)
    windows = None if window is None or type(window) is int else window
    small = (sink_logits, sink_bias, sink_q, sink_k, sink_v, windows, alibi_slopes, starts, lengths,
             q_lengths, cu_seqlens_q, cu_seqlens_k)
    tracked = q.requires_grad or k.requires_grad or v.requires_grad
    for x in small:
        if x is not None:
            if type(x) in _PLAIN:
                tracked = tracked or x.requires_grad
            elif isinstance(x, torch.Tensor):
                return None
    try:
        if not tracked or not torch.is_grad_enabled():
            return _core.attend_below_autograd(
                q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q, sink_kv, scale,
                softcap, alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k, out,
                return_lse, return_mass, mass_reduce, mass_queries)
        if (out is not None or type(return_lse) is not bool or type(return_mass) is not bool
                or not _may_be_recorded((q, k, v), small)):
            return None
        out, *rest = _apply_directly(
            q, k, v, *small, (causal, None if windows is not None else window, sinks, scale,
                              softcap), (return_mass, mass_reduce, mass_queries))
    except (TypeError, ValueError, RuntimeError):
        return None
    return (out, *rest) if return_lse else (out, *rest[1:]) if return_mass else out


def _both(pair):
    return pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair, None)


def _may_be_recorded(tensors, small):
    """Only tensors are kept for the gradient, and none that torch.func has left behind; what has no
    gradient must not ask for one."""
    for x in tensors:
        if _is_wrapped(x):
            return False
    for at, x in enumerate(small):
        if x is not None and (type(x) not in _PLAIN or _is_wrapped(x)
                              or (x.requires_grad and at >= _SINKS)):
            return False
    return True


_FIRST_SINK, _SINKS = 7, 5  # where sink_logits, sink_bias, sink_q, sink_k, sink_v stand
_DEFAULTS = tuple(schema.bind(schema.attend, ()).values())


def _tracked(arguments):
    if not torch.is_grad_enabled():
        return False
    if arguments[0].requires_grad or arguments[1].requires_grad or arguments[2].requires_grad:
        return True
    for tensor in arguments[_FIRST_SINK:_FIRST_SINK + _SINKS]:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def attend(arguments):
    """The operator, by the way that what is at work needs.

    Its registered gradient would do outside torch.func, at 120 us a call where the function takes
    35; and operators drop the tangents of dual tensors without a word, which functions refuse.
    """
    if torch.compiler.is_dynamo_compiling():  # which traces through transformations itself
        return schema.attend(*arguments)
    if (_tracked(arguments) or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0):
        device = arguments[0].device.type
        if torch.is_autocast_enabled(device):  # which an operator meets above its gradient
            arguments = forward.cast(device, arguments)
        return _Attend.apply(*arguments)
    given = len(arguments)
    while arguments[given - 1] is _DEFAULTS[given - 1]:  # each that is passed costs 0.1 us
        given -= 1
    return schema.attend(*arguments[:given])
