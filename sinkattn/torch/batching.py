"""torch.vmap over the operators: the new axis joins the batch, wherever rows stay rows."""

import torch

from . import schema
from .schema import library

_ROWS = ("q", "k", "v", "sink_q", "starts", "lengths", "q_lengths", "dout", "dlse", "out", "lse")
_SHARED = ("windows", "sink_logits", "sink_bias", "sink_k", "sink_v")


def _fold(tensor, axis, size):
    """[batch, ...], with the new axis or without -> [size * batch, ...]"""
    tensor = (tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0))
    return tensor.flatten(0, 1)


def _fold_slopes(slopes, axis, size, batch):
    if axis is None:
        return slopes if slopes.dim() < 2 else _fold(slopes, None, size)
    slopes = slopes.movedim(axis, 0)
    return slopes.flatten(0, 1) if slopes.dim() == 3 else slopes.repeat_interleave(batch, 0)


def _folded(operator, size, axes, arguments):
    """The arguments of one call for all, and the batch of each."""
    given = schema.bind(operator, arguments)
    axes = dict(zip(given, axes))
    if given["cu_seqlens_q"] is not None or given["cu_seqlens_k"] is not None:
        raise NotImplementedError("attend(): cu_seqlens_q and cu_seqlens_k are packed sequences, "
                                  "which torch.vmap cannot join: expected a batch")
    for name in _SHARED:
        if axes.get(name) is not None:
            raise NotImplementedError(f"attend(): {name} is batched by torch.vmap, expected one "
                                      f"for all rows of the batch")
    batch = given["q"].shape[0 if axes["q"] is None or axes["q"] > 0 else 1]
    for name in _ROWS:
        if given.get(name) is not None:
            given[name] = _fold(given[name], axes.get(name), size)
    if given["alibi_slopes"] is not None:
        given["alibi_slopes"] = _fold_slopes(given["alibi_slopes"], axes.get("alibi_slopes"),
                                             size, batch)
    return given


def _unfold(results, size):
    """A result that was not asked for is one empty axis, and stays."""
    return (tuple(x if x.dim() < 2 else x.unflatten(0, (size, x.shape[0] // size))
                  for x in results), tuple(None if x.dim() < 2 else 0 for x in results))


def attend(info, axes, *arguments, call=schema.attend):
    """The rule: what `call` gives for all at once, and its new axes."""
    given = _folded(schema.attend, info.batch_size, axes, arguments)
    return _unfold(call(*given.values()), info.batch_size)


def attend_backward(info, axes, *arguments, call=schema.attend_backward):
    given = _folded(schema.attend_backward, info.batch_size, axes, arguments)
    for name in _SHARED[1:]:
        if given[name] is not None:
            raise NotImplementedError(f"attend(): {name} has one gradient for all rows, and "
                                      f"torch.vmap asks for one each")
    return _unfold(call(*given.values()), info.batch_size)


torch.library.register_vmap("sinkattn::attend", attend, lib=library)
torch.library.register_vmap("sinkattn::attend_backward", attend_backward, lib=library)
