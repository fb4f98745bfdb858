"""sinkattn::attend_backward: the gradient of sinkattn::attend as an operator of its own, so that a
compiler sees it. It has no gradient."""

import torch

import sinkattn

from . import schema
from .schema import library


def _rows(tensor):
    """With a last axis that lies end to end; an expanded gradient's does not."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def gradients(dout, dlse, q, k, v, out, lse, causal=True, window=None, windows=None, sinks=0,
              sink_logits=None, sink_bias=None, sink_q=None, sink_k=None, sink_v=None, scale=None,
              softcap=None, alibi_slopes=None, starts=None, lengths=None, q_lengths=None,
              cu_seqlens_q=None, cu_seqlens_k=None, deterministic=True):
    """By name, those of what was given."""
    pair = None if sink_k is None and sink_v is None else (sink_k, sink_v)
    with torch.no_grad():  # the core refuses what requires grad; here autograd is above us
        grads = sinkattn.attend_backward(
            _rows(dout), q, k, v, out, lse, dlse=None if dlse is None else dlse.contiguous(),
            deterministic=deterministic, causal=causal,
            window=window if windows is None else windows, sinks=sinks, sink_logits=sink_logits,
            sink_bias=sink_bias, sink_q=sink_q, sink_kv=pair, scale=scale, softcap=softcap,
            alibi_slopes=alibi_slopes, starts=starts, lengths=lengths, q_lengths=q_lengths,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if pair is not None:
        grads["sink_k"], grads["sink_v"] = grads["sink_kv"]
    return grads


def kernel(dout, dlse, q, *arguments):
    grads = gradients(dout, dlse, q, *arguments)
    # Results of an operator never share memory, empty ones neither.
    return tuple(grads[name] if name in grads else q.new_empty(0)
                 for name in schema.DIFFERENTIABLE)


library.impl("attend_backward", kernel, "CPU")
library.impl("attend_backward", kernel, "CUDA")


@torch.library.register_fake("sinkattn::attend_backward", lib=library)
def shapes(*arguments):
    given = schema.bind(schema.attend_backward, arguments)

    def like(name):
        tensor = given[name]
        if tensor is None:
            return given["q"].new_empty(0)
        return tensor.new_empty(tensor.shape, dtype=torch.float32
                                if name in ("sink_logits", "sink_bias") else tensor.dtype)
    return tuple(like(name) for name in schema.DIFFERENTIABLE)


def refuse(ctx, *grads):
    raise NotImplementedError("attend(): a gradient of its gradient was asked for, and second "
                              "derivatives are not implemented")


torch.library.register_autograd("sinkattn::attend_backward", refuse, lib=library)
