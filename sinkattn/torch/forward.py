"""sinkattn::attend: kernels of the devices, shapes for tracing, gradients, autocast."""

from operator import itemgetter

import torch

from sinkattn import _core

from . import schema
from .arguments import check_tensor
from .schema import DIFFERENTIABLE, KEYWORDS, library


def kernel(q, k, v, causal=True, window=None, windows=None, sinks=0, sink_logits=None,
           sink_bias=None, sink_q=None, sink_k=None, sink_v=None, scale=None, softcap=None,
           alibi_slopes=None, starts=None, lengths=None, q_lengths=None, cu_seqlens_q=None,
           cu_seqlens_k=None, return_mass=False, mass_reduce="sum", mass_queries=None):
    if windows is not None:
        if window is not None:
            raise ValueError("attend(): window and windows are both given, expected one of them")
        window = windows
    pair = None if sink_k is None and sink_v is None else (sink_k, sink_v)
    results = _core.attend_below_autograd(
        q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q, pair, scale, softcap,
        alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k, None, True,
        return_mass, mass_reduce, mass_queries)
    return results if return_mass else (*results, nothing_on(q))


_nothing = {}  # by device: a new one would cost as much as a third of a small call


def nothing_on(tensor):
    """An empty mass. It has no element that a caller could see another write."""
    place = tensor.get_device()
    if place not in _nothing:
        with torch.inference_mode(False):
            _nothing[place] = torch.empty(0, device=tensor.device)
    return _nothing[place]


library.impl("attend", kernel, "CPU")
library.impl("attend", kernel, "CUDA")


@torch.library.register_fake("sinkattn::attend", lib=library)
def shapes(q, k, v, *rest):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(f"attend(): {name}", tensor)
        torch._check(tensor.dim() == 4, lambda name=name: f"attend(): {name} needs 4 dimensions")
        if tensor.device != q.device:
            raise ValueError(f"attend(): {name} is on {tensor.device}, expected {q.device} (the "
                             f"device of q)")
    asked = len(rest) > len(KEYWORDS) and rest[len(KEYWORDS)]
    return (q.new_empty((*q.shape[:3], v.shape[3])),
            q.new_empty(q.shape[:3], dtype=torch.float32),
            q.new_empty(k.shape[:3] if asked else (0,), dtype=torch.float32))


# --- gradients ---------------------------------------------------------------------------------

_NAMES = schema.names_of(schema.attend)
_TENSORS = tuple(argument.name for argument in schema.attend._schema.arguments
                 if "Tensor" in str(argument.type))
_PLAIN = tuple(name for name in KEYWORDS if name not in _TENSORS)
_CONSTANTS = tuple(name for name in _NAMES if name not in DIFFERENTIABLE)
_tensors_of, _plain_of, _constants_of = (itemgetter(*map(_NAMES.index, names))
                                         for names in (_TENSORS, _PLAIN, _CONSTANTS))


def remember(ctx, inputs, output):
    needs = _constants_of(ctx.needs_input_grad)
    if True in needs:
        name = _CONSTANTS[needs.index(True)]
        raise NotImplementedError(f"attend(): {name} requires grad, and it has no gradient: pass "
                                  f"{name}.detach()")
    out, lse, mass = output
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *_tensors_of(inputs))
    ctx.plain = _plain_of(inputs)


def backward(ctx, dout, dlse, _, differentiate=schema.attend_backward):
    if dout is None and dlse is None:
        return (None,) * len(_NAMES)
    out, lse, *tensors = ctx.saved_tensors
    given = dict(zip(_TENSORS + _PLAIN, (*tensors, *ctx.plain)))
    needed = {name for name, wish in zip(_NAMES, ctx.needs_input_grad) if wish}
    grads = differentiate(
        torch.zeros_like(out) if dout is None else dout, dlse, given["q"], given["k"], given["v"],
        out, lse, *[given[name] for name in KEYWORDS],
        torch.are_deterministic_algorithms_enabled())
    # Logits and bias come in float32, whatever they were.
    answer = {name: grad.to(given[name].dtype) for name, grad in zip(DIFFERENTIABLE, grads)
              if name in needed}
    return tuple(answer.get(name) for name in _NAMES)


class _Recorded(torch.autograd.Function):
    """The operator with its gradient. The last argument: the dispatch keys below autograd, or None
    where a kernel is next."""

    @staticmethod
    def forward(ctx, *arguments):
        *given, below = arguments
        if below is None:
            results = kernel(*given)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                results = schema.attend.redispatch(below, *given)
        remember(ctx, given, results)
        return results

    @staticmethod
    def backward(ctx, *grads):
        return *backward(ctx, *grads), None


# Function.apply without its Python, which serves torch.func.
_record_directly = super(torch.autograd.Function, _Recorded).apply
_DEFAULTS = tuple(schema.bind(schema.attend, ()).values())
_KERNELS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_below = {}  # the bits of a keyset -> what `_Recorded` is told: to ask anew costs 1 us


def below_autograd(keyset):
    below = keyset & torch._C._after_ADInplaceOrView_keyset
    return None if below.highestPriorityTypeId() in _KERNELS else below


def autograd(keyset, *arguments):
    """What torch.library.register_autograd would make, without a second way through the dispatcher
    where nothing stands between here and the kernel."""
    bits = keyset.raw_repr()
    if bits not in _below:
        _below[bits] = below_autograd(keyset)
    below = _below[bits]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        record = (_Recorded.apply if torch._C._are_functorch_transforms_active() else
                  _record_directly)
        return record(*arguments, *_DEFAULTS[len(arguments):], below)
    if below is None:
        return kernel(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return schema.attend.redispatch(below, *arguments)


library.impl("attend", autograd, "Autograd", with_keyset=True)


# --- autocast ----------------------------------------------------------------------------------

_CAST = ("q", "k", "v", "sink_q", "sink_k", "sink_v")  # logits and bias stay as they are


def cast(device, arguments):
    """q, k, v and what stands in their place, as scaled_dot_product_attention casts them."""
    given = schema.bind(schema.attend, arguments)
    dtype = torch.get_autocast_dtype(device)
    for name in _CAST:
        tensor = given[name]
        if (tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
                and tensor.device.type == device):
            given[name] = tensor.to(dtype)
    return given.values()


def register_autocast(device):
    def rule(*arguments):
        with torch.autocast(device, enabled=False):
            return schema.attend(*cast(device, arguments))

    library.impl("attend", rule, f"Autocast{device.upper()}")


register_autocast("cpu")
register_autocast("cuda")
