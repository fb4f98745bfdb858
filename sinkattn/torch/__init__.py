"""The torch operators of sinkattn: gradients, torch.compile, autocast, vmap.

torch.ops.sinkattn.attend and torch.ops.sinkattn.attend_backward. `sinkattn.attend` comes here by
itself where it must: a tensor requires grad, a compiler or a transformation is at work, autocast is
on. Importing this package imports torch; importing sinkattn does not.
"""

import operator

import numpy as np
import torch

from . import transforms

__all__ = ["attend"]

_DEVICES = ("cpu", "cuda", "meta")


def attend(q, k, v, *, causal=True, window=None, sinks=0, sink_logits=None, sink_bias=None,
           sink_q=None, sink_kv=None, scale=None, softcap=None, alibi_slopes=None, starts=None,
           lengths=None, q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, out=None,
           return_lse=False, return_mass=False, mass_reduce="sum", mass_queries=None):
    """`sinkattn.attend` for torch tensors, always through the operator.

    Arguments, results and errors are those of `sinkattn.attend`. Gradients flow from out and lse to
    q, k, v, sink_logits, sink_bias, sink_q and sink_kv; mass has none. alibi_slopes, scale or
    softcap that require grad are refused, and so is `out` where anything does.
    The backward is deterministic where ``torch.use_deterministic_algorithms(True)`` asks for it,
    and on the CPU always. A gradient of the gradient raises NotImplementedError.
    Autocast casts q, k, v, sink_q and sink_kv; sink_logits and sink_bias stay.
    torch.vmap adds to the batch; it refuses packed sequences and batched sinks.
    """
    return attend_in_order(q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q, sink_kv,
                           scale, softcap, alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q,
                           cu_seqlens_k, out, return_lse, return_mass, mass_reduce, mass_queries)


def attend_in_order(q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q, sink_kv, scale,
                    softcap, alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k,
                    out, return_lse, return_mass, mass_reduce, mass_queries):
    """The positional form, as the core has it."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor)
    window, windows = _window(window)
    sink_k, sink_v = (None, None) if sink_kv is None else _pair(sink_kv)
    results = transforms.attend(
        q, k, v, _truth("causal", causal), window, windows, _integer("sinks", sinks),
        _array("sink_logits", sink_logits), _array("sink_bias", sink_bias),
        _array("sink_q", sink_q), _array("sink_kv[0]", sink_k), _array("sink_kv[1]", sink_v),
        _number("scale", scale), _number("softcap", softcap), _array("alibi_slopes", alibi_slopes),
        _array("starts", starts), _array("lengths", lengths), _array("q_lengths", q_lengths),
        _array("cu_seqlens_q", cu_seqlens_q), _array("cu_seqlens_k", cu_seqlens_k),
        _truth("return_mass", return_mass), _reduction(mass_reduce),
        _integer("mass_queries", mass_queries))
    first = results[0] if out is None else _written(out, results[0], q)
    if _truth("return_lse", return_lse):
        return (first, *results[1:]) if return_mass else (first, results[1])
    return (first, results[2]) if return_mass else first


def _check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"attend(): {name} is {type(value).__name__}, expected a torch tensor: "
                        f"gradients and compilation need all of q, k and v to be tensors")
    if value.device.type not in _DEVICES:
        raise NotImplementedError(f"attend(): {name} is on {value.device}; the backends are: cpu, "
                                  f"cuda")
    if value.layout is not torch.strided:
        raise ValueError(f"attend(): {name} is sparse ({value.layout}), expected dense memory")


def _window(window):
    """A number, or one for each head."""
    if window is None or type(window) is int:
        return window, None
    if isinstance(window, (torch.Tensor, np.ndarray, list, tuple)):
        return None, _array("window", window)
    return _integer("window", window), None


def _pair(sink_kv):
    if not isinstance(sink_kv, (tuple, list)):
        raise TypeError(
            f"attend(): sink_kv is {type(sink_kv).__name__}, expected a pair (k_s, v_s)")
    if len(sink_kv) != 2:
        raise ValueError(f"attend(): sink_kv has {len(sink_kv)} entries, expected 2: (k_s, v_s)")
    return sink_kv


def _array(name, value):
    """Numbers of the host become a tensor there, which a call carries to a device, waiting for
    nothing."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool):
        raise TypeError(f"attend(): {name} is bool, expected real numbers")
    return torch.as_tensor(value)


def _integer(name, value):
    if value is None or type(value) in (int, torch.SymInt):
        return value
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"attend(): {name} is bool, expected an int")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"attend(): {name} is {type(value).__name__}, expected an int") from None


def _number(name, value):
    if value is None or type(value) is float:
        return value
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise NotImplementedError(
            f"attend(): {name} requires grad, and it has no gradient: pass a float")
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__float__"):
        raise TypeError(f"attend(): {name} is {type(value).__name__}, expected a number")
    return float(value)


def _truth(name, value):
    if isinstance(value, (bool, int, np.bool_)):
        return bool(value)
    raise TypeError(f"attend(): {name} is {type(value).__name__}, expected a bool")


def _reduction(value):
    if value != "sum" and value != "max":
        raise ValueError(f"attend(): mass_reduce is {value!r}, expected 'sum' or 'max'")
    return value


def _written(out, result, q):
    """Into the caller's tensor, of the dtype of q also where autocast cast q. No gradient can
    follow it there."""
    _check_tensor("out", out)
    if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise NotImplementedError("attend(): out cannot be given where a tensor requires grad: "
                                  "leave it out, or call under torch.no_grad()")
    if (out.shape != result.shape or out.dtype not in (q.dtype, result.dtype)
            or out.device != result.device):
        raise ValueError(f"attend(): out is {out.dtype} {list(out.shape)} on {out.device}, "
                         f"expected {result.dtype} {list(result.shape)} on {result.device}")
    out.copy_(result)
    return out
