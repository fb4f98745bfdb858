"""The torch operators of sinkattn: gradients, torch.compile, autocast, vmap.

torch.ops.sinkattn.attend and torch.ops.sinkattn.attend_backward. `sinkattn.attend` comes here by
itself where it must: a tensor requires grad, a compiler or a transformation is at work, autocast is
on. Importing this package imports torch; importing sinkattn does not.
"""

import torch

from . import arguments, transforms
from .arguments import array, check_tensor, integer, number, truth
from .cache import SinkCache

__all__ = ["SinkCache", "attend"]


def attend(q, k, v, *, causal=True, window=None, sinks=0, sink_logits=None, sink_bias=None,
           sink_q=None, sink_kv=None, scale=None, softcap=None, alibi_slopes=None, starts=None,
           lengths=None, q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, out=None,
           return_lse=False, return_mass=False, mass_reduce="sum", mass_queries=None):
    """`sinkattn.attend` for torch tensors, through the operator wherever something looks at it: a
    compiler, a mode, a transformation, autocast, a profiler. Else the same call without it.

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
    if not torch.compiler.is_dynamo_compiling() and not transforms.at_work():
        results = transforms.attend_directly(
            q, k, v, causal, window, sinks, sink_logits, sink_bias, sink_q, sink_kv, scale, softcap,
            alibi_slopes, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k, out, return_lse,
            return_mass, mass_reduce, mass_queries)
        if results is not None:
            return results
    window, windows = arguments.window("attend(): window", window)
    sink_k, sink_v = arguments.pair("attend(): sink_kv", sink_kv)
    given = (
        q, k, v, truth("attend(): causal", causal), window, windows,
        integer("attend(): sinks", sinks), _array("sink_logits", sink_logits),
        _array("sink_bias", sink_bias), _array("sink_q", sink_q), sink_k, sink_v,
        number("attend(): scale", scale), number("attend(): softcap", softcap),
        _array("alibi_slopes", alibi_slopes), _array("starts", starts), _array("lengths", lengths),
        _array("q_lengths", q_lengths), _array("cu_seqlens_q", cu_seqlens_q),
        _array("cu_seqlens_k", cu_seqlens_k), truth("attend(): return_mass", return_mass),
        arguments.reduction("attend(): mass_reduce", mass_reduce),
        integer("attend(): mass_queries", mass_queries))
    try:
        results = transforms.attend(given)
    except Exception:  # torch's own words name no argument; looked at only now, for speed
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_tensor(f"attend(): {name}", tensor)
        raise
    out = results[0] if out is None else arguments.written("attend(): out", out, results[0], q)
    return arguments.chosen(out, *results[1:], truth("attend(): return_lse", return_lse),
                            return_mass)


def _array(name, value):
    return value if value is None else array(f"attend(): {name}", value)
