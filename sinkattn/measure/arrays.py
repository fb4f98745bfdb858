"""Full attention's weights, and what a set of kept keys takes away from them."""

import numpy as np


def weights(q, k, *, scale=None, sink_logits=None):
    """Softmax weights of causal full attention, float64 [batch, heads_q, queries, keys].

    q : [batch, heads_q, queries, depth], k : [batch, heads_kv, keys, depth], turned to their
        positions where the model has any. The last query stands at the last key.
    scale : float, default 1 / sqrt(depth). sink_logits : float or [heads_q], which take their share
        of every row; the weights of a row then sum to less than 1.
    Raises ValueError for shapes that do not fit. Memory: queries * keys; give part of the queries.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"weights(): q and k have {q.ndim} and {k.ndim} axes, expected 4")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[1] == 0 \
            or q.shape[1] % k.shape[1]:
        raise ValueError(f"weights(): k has shape {list(k.shape)}, expected "
                         f"[{q.shape[0]}, a divisor of {q.shape[1]}, keys, {q.shape[3]}]")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"weights(): q has {q.shape[2]} queries, expected at most the "
                         f"{k.shape[2]} keys")
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    score = q @ k.swapaxes(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    future = np.triu(np.ones(score.shape[2:], bool), 1 + k.shape[2] - q.shape[2])
    score = np.where(future, -np.inf, score)
    sink = np.asarray(-np.inf if sink_logits is None else sink_logits, np.float64)
    sink = np.broadcast_to(sink.reshape(-1, 1, 1), (q.shape[1], 1, 1))
    top = np.maximum(score.max(axis=3, keepdims=True), sink)
    score = np.exp(score - top)
    return score / (score.sum(axis=3, keepdims=True) + np.exp(sink - top))


def kept_mask(kept, heads, length):
    """`cache.kept()` as a bool array [batch, heads, length].

    kept : a list over rows of int arrays (`SinkCache`: all heads keep the same), or over rows of
        lists over kv heads of int arrays (`KVCache`).
    Raises ValueError where a row has another number of heads, or a position is outside 0 to
    length - 1.
    """
    mask = np.zeros((len(kept), heads, length), bool)
    for row, held in zip(mask, kept):
        per_head = [held] * heads if np.ndim(held[0] if len(held) else 0) == 0 else held
        if len(per_head) != heads:
            raise ValueError(f"kept_mask(): kept has a row of {len(per_head)} heads, "
                             f"expected {heads}")
        for head, positions in zip(row, per_head):
            positions = np.asarray(positions, np.int64)
            if positions.size and not 0 <= positions.min() <= positions.max() < length:
                raise ValueError(f"kept_mask(): kept holds a position outside 0 to {length - 1}")
            head[positions] = True
    return mask


def _pair(name, weights, kept):
    weights, kept = np.asarray(weights, np.float64), np.asarray(kept)
    if kept.dtype != bool:
        raise TypeError(f"{name}(): kept has dtype {kept.dtype}, expected bool")
    try:
        return weights, np.broadcast_to(kept, weights.shape)
    except ValueError:
        raise ValueError(f"{name}(): kept has shape {list(kept.shape)}, expected one that "
                         f"broadcasts to the weights' {list(weights.shape)}") from None


def attention_loss(weights, kept):
    """The weight that full attention gives to keys that are not kept: 0 nothing lost, 1 everything.

    weights : [..., keys], of `weights` or any other. kept : bool, broadcastable to it.
    Returns float64 [...]. Measured as in Cold Compress (cache analysis): 1 - sum over kept.
    """
    weights, kept = _pair("attention_loss", weights, kept)
    return np.where(kept, 0.0, weights).sum(axis=-1)


def least_loss(weights, counts):
    """The attention loss of the best `counts` keys for each query alone, float64 [...]: no cache
    of that size can lose less.

    weights : [..., keys]; counts : int, broadcastable to [...].
    """
    ordered = np.sort(np.asarray(weights, np.float64), axis=-1)
    counts = np.asarray(counts)
    if counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError("least_loss(): counts are expected to be ints, 0 or more")
    return attention_loss(ordered, np.arange(ordered.shape[-1], 0, -1) <= counts[..., None])


def top_keys(weights, kept, count):
    """Share of the `count` heaviest keys of full attention that are kept, float64 [...].

    Ties go to the newer key. Where there are fewer than `count` keys, all of them count.
    """
    weights, kept = _pair("top_keys", weights, kept)
    if count < 1:
        raise ValueError(f"top_keys(): count is {count}, expected 1 or more")
    order = np.argsort(weights, axis=-1, kind="stable")[..., -count:]
    return np.take_along_axis(kept, order, axis=-1).mean(axis=-1)


def sink_mass(weights, sinks):
    """Weight on the first `sinks` keys, float64 [...]; weights : [..., keys]."""
    if sinks < 0:
        raise ValueError(f"sink_mass(): sinks is {sinks}, expected 0 or more")
    return np.asarray(weights, np.float64)[..., :sinks].sum(axis=-1)


def output_error(out, full):
    """|out - full| / |full| over the last axis, float64 [...]: a cache's output against full
    attention's. 0 where both are 0, inf where full alone is."""
    out, full = np.asarray(out, np.float64), np.asarray(full, np.float64)
    if out.shape != full.shape:
        raise ValueError(f"output_error(): out has shape {list(out.shape)}, expected that of full, "
                         f"{list(full.shape)}")
    gap = np.sqrt(np.square(out - full).sum(axis=-1))
    size = np.sqrt(np.square(full).sum(axis=-1))
    alone = np.where(gap > 0, np.inf, 0.0)
    return np.divide(gap, size, out=alone, where=size > 0)
