"""sinkattn::attend: kernels of the devices, shapes for tracing, gradients, autocast."""

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
    return results if return_mass else (*results, results[1].new_empty(0))


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


def remember(ctx, inputs, output):
    given = dict(zip(_NAMES, inputs))
    needed = {name for name, flag in zip(_NAMES, ctx.needs_input_grad) if flag}
    for name in _TENSORS:
        if name in needed and name not in DIFFERENTIABLE:
            raise NotImplementedError(
                f"attend(): {name} requires grad, and it has no gradient: pass {name}.detach()")
    out, lse, mass = output
    ctx.mark_non_differentiable(mass)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *[given[name] for name in _TENSORS])
    ctx.plain = {name: given[name] for name in KEYWORDS if name not in _TENSORS}
    ctx.needed = needed


def backward(ctx, dout, dlse, _, differentiate=schema.attend_backward):
    if dout is None and dlse is None:
        return (None,) * len(_NAMES)
    out, lse, *tensors = ctx.saved_tensors
    given = dict(zip(_TENSORS, tensors), **ctx.plain)
    grads = differentiate(
        torch.zeros_like(out) if dout is None else dout, dlse, given["q"], given["k"], given["v"],
        out, lse, *[given[name] for name in KEYWORDS],
        torch.are_deterministic_algorithms_enabled())
    # Logits and bias come in float32, whatever they were.
    answer = {name: grad.to(given[name].dtype) for name, grad in zip(DIFFERENTIABLE, grads)
              if name in ctx.needed}
    return tuple(answer.get(name) for name in _NAMES)


torch.library.register_autograd("sinkattn::attend", backward, setup_context=remember, lib=library)


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
