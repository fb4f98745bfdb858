"""What sinkattn computes, in NumPy and double precision.

This file is the definition; `docs/semantics.md` says the same in words, and every kernel is tested
against it. It is slow on purpose, it checks nothing, and it returns float64 whatever came in
(float16 and ml_dtypes bfloat16 are widened, which is exact).

`attend` is attention with every argument of the public function, `attend_backward` its gradients.
`SinkCache` is the stream without the bounded memory: it keeps all that it was ever given and
answers each call by the definition. `rotate` is the rotary embedding, `merge` joins partial
results.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np


def attend(q, k, v, *, causal=True, window=None, sinks=0, sink_logits=None, sink_bias=None,
           sink_q=None, sink_kv=None, scale=None, softcap=None, alibi_slopes=None, starts=None,
           lengths=None, q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, out=None,
           return_lse=False, return_mass=False, mass_reduce="sum", mass_queries=None):
    """Attention over pinned tokens and a window, as `sinkattn.attend`, in float64.

    Returns out [batch, heads_q, query_length, depth_v], and on request
    lse [batch, heads_q, query_length] and mass [batch, heads_kv, kv_length].
    """
    q, k, v = _wide(q), _wide(k), _wide(v)
    batch, heads_q, query_length, depth = q.shape
    _, heads_kv, kv_length, depth_v = v.shape
    group = heads_q // heads_kv
    assert k.shape == (batch, heads_kv, kv_length, depth) and group * heads_kv == heads_q

    heads = _heads(batch, heads_q, heads_kv, depth, depth_v, causal=causal, window=window,
                   sinks=sinks, sink_logits=sink_logits, sink_bias=sink_bias, sink_kv=sink_kv,
                   scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
    pinned_q = q if sink_q is None else _wide(sink_q)

    result = np.zeros((batch, heads_q, query_length, depth_v))
    lse = np.full((batch, heads_q, query_length), -np.inf)
    mass = np.zeros((batch, heads_kv, kv_length))

    for row, queries, keys in _sequences(batch, query_length, kv_length, starts, lengths,
                                         q_lengths, cu_seqlens_q, cu_seqlens_k):
        count = queries.stop - queries.start
        # The last query stands at the last key.
        position = np.arange(count) + (keys.stop - keys.start) - count
        for g in range(heads_kv):
            weights = 0.0                                      # mean over the heads of the group
            for h in range(g * group, (g + 1) * group):
                result[row, h, queries], lse[row, h, queries], own = _attend_head(
                    q[row, h, queries], k[row, g, keys], v[row, g, keys], heads[row][h],
                    position, pinned_q[row, h, queries], position)
                weights = weights + own / group
            mass[row, g, keys] = _over_queries(weights, mass_reduce, mass_queries)

    if out is not None:
        out[...] = result
        result = out
    return _asked_for(result, lse, mass, return_lse, return_mass)


def mass(q, k, lse, *, row_weights=None, reduce="sum", queries=None, starts=None, lengths=None,
         q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, sink_q=None, **keywords):
    """The per-key mass [batch, heads_kv, kv_length], as `sinkattn.mass`, in float64."""
    q, k, lse = _wide(q), _wide(k), _wide(lse)
    (batch, heads_q, query_length, depth), (_, heads_kv, kv_length, _) = q.shape, k.shape
    group = heads_q // heads_kv
    pinned_q = q if sink_q is None else _wide(sink_q)
    factors = np.ones(lse.shape) if row_weights is None else _wide(row_weights)
    given = {"causal": True, "window": None, "sinks": 0, "sink_bias": None, "scale": None,
             "softcap": None, "alibi_slopes": None, **keywords}
    heads = _heads(batch, heads_q, heads_kv, depth, 1, sink_logits=None, sink_kv=None, **given)
    result = np.zeros((batch, heads_kv, kv_length))
    for row, rows, keys in _sequences(batch, query_length, kv_length, starts, lengths, q_lengths,
                                      cu_seqlens_q, cu_seqlens_k):
        count, held = rows.stop - rows.start, keys.stop - keys.start
        position = np.arange(count) + held - count
        for g in range(heads_kv):
            mean = 0.0
            for h in range(g * group, (g + 1) * group):
                _, own, weights = _attend_head(
                    q[row, h, rows], k[row, g, keys], np.zeros((held, 1)), heads[row][h], position,
                    pinned_q[row, h, rows], position)
                whole = np.where(np.isinf(lse[row, h, rows]), np.inf, lse[row, h, rows])
                change = np.where(own > -np.inf, own, 0.0) - whole
                mean = mean + (factors[row, h, rows] * np.exp(change))[:, None] * weights / group
            result[row, g, keys] = _over_queries(mean, reduce, queries)
    return result


class _Head(NamedTuple):
    """What one query head does to its scores."""

    causal: bool
    window: float          # inf: none
    sinks: int             # pinned tokens
    logits: np.ndarray     # [logits], in the denominator only
    bias: np.ndarray       # [sinks], or [1] for all of them
    extra_k: np.ndarray    # [rows, depth], learned rows that every query sees
    extra_v: np.ndarray    # [rows, depth_v]
    scale: float
    softcap: float | None
    slope: float           # ALiBi


def _attend_head(q, k, v, head, position, pinned_q, pinned_position):
    """One query head, one sequence. Key j stands at position j; the queries stand at `position`.

    The pinned keys are scored with `pinned_q`, and ALiBi measures their distance from
    `pinned_position`. What is visible depends on `position` alone.
    Returns out [queries, depth_v], lse [queries], weights [queries, keys].
    """
    seen, scores, extra = _scores(q, k, head, position, pinned_q, pinned_position)
    logits = np.broadcast_to(head.logits, (len(q), len(head.logits)))
    lse = _log_sum_exp(np.concatenate([scores, extra, logits], axis=1))

    base = np.where(lse == -np.inf, 0.0, lse)[:, None]   # a row that sees nothing has weights 0
    weights = np.exp(scores - base)
    out = weights[:, seen] @ v[seen] + np.exp(extra - base) @ head.extra_v
    return out, lse, weights


def _scores(q, k, head, position, pinned_q, pinned_position):
    """Which keys any query sees [keys], scores [queries, keys] (-inf: not seen), and the scores of
    the learned rows [queries, rows]."""
    key = np.arange(len(k))
    pinned = key < head.sinks
    distance = position[:, None] - key              # [queries, keys]

    visible = pinned | (np.abs(distance) < head.window)
    if head.causal:
        visible &= distance >= 0
    bias = head.bias[:len(k)]
    visible[:, pinned] &= bias > -np.inf
    seen = visible.any(axis=0)         # what no query sees is not even read: it may hold anything

    scores = np.full(visible.shape, -np.inf)
    scores[:, seen] = _score(q, k[seen], head)
    scores[:, seen & pinned] = _score(pinned_q, k[seen & pinned], head)
    scores[:, pinned] += bias
    stand = np.where(pinned, pinned_position[:, None], position[:, None])
    scores -= head.slope * np.abs(stand - key)
    scores[~visible] = -np.inf
    return seen, scores, _score(q, head.extra_k, head)


def _score(q, k, head):
    s = head.scale * (q @ k.T)
    return s if head.softcap is None else head.softcap * np.tanh(s / head.softcap)


def attend_backward(dout, q, k, v, out, lse, *, dlse=None, deterministic=True, causal=True,
                    window=None, sinks=0, sink_logits=None, sink_bias=None, sink_q=None,
                    sink_kv=None, scale=None, softcap=None, alibi_slopes=None, starts=None,
                    lengths=None, q_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None):
    """Gradients of sum(dout * out) + sum(dlse * lse), as `sinkattn.attend_backward`, in float64.

    With p = exp(s - lse) and delta_i = <dout_i, out_i> - dlse_i:

        dv_j = sum_i p_ij dout_i        ds_ij = p_ij (<dout_i, v_j> - delta_i)
        dsigma_l = -sum_i exp(sigma_l - lse_i) delta_i

    ds goes on to bias, cap, scale, and so to queries and keys. Where lse is infinite, p = 0.
    Returns a dict of "q", "k", "v", and of each that was given "sink_logits", "sink_bias",
    "sink_q", "sink_kv" (a pair).
    """
    dout, q, k, v, out, lse = (_wide(x) for x in (dout, q, k, v, out, lse))
    dlse = np.zeros(lse.shape) if dlse is None else _wide(dlse)
    batch, heads_q, query_length, depth = q.shape
    _, heads_kv, kv_length, depth_v = v.shape
    heads = _heads(batch, heads_q, heads_kv, depth, depth_v, causal=causal, window=window,
                   sinks=sinks, sink_logits=sink_logits, sink_bias=sink_bias, sink_kv=sink_kv,
                   scale=scale, softcap=softcap, alibi_slopes=alibi_slopes)
    pinned_q = q if sink_q is None else _wide(sink_q)

    dq, dpinned_q, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    dlogits = np.zeros((heads_q, len(heads[0][0].logits) if batch else 0))
    dbias = np.zeros((heads_q, sinks))
    extra = len(heads[0][0].extra_k) if batch else 0
    dextra_k, dextra_v = (np.zeros((heads_kv, extra, n)) for n in (depth, depth_v))
    for row, queries, keys in _sequences(batch, query_length, kv_length, starts, lengths,
                                         q_lengths, cu_seqlens_q, cu_seqlens_k):
        count = queries.stop - queries.start
        position = np.arange(count) + (keys.stop - keys.start) - count
        for h in range(heads_q):
            g = h // (heads_q // heads_kv)
            own = _head_backward(dout[row, h, queries], q[row, h, queries], k[row, g, keys],
                                 v[row, g, keys], out[row, h, queries], lse[row, h, queries],
                                 dlse[row, h, queries], heads[row][h], position,
                                 pinned_q[row, h, queries])
            dq[row, h, queries] += own.q
            dpinned_q[row, h, queries] += own.pinned_q
            dk[row, g, keys] += own.k
            dv[row, g, keys] += own.v
            dlogits[h] += own.logits
            dbias[h, :len(own.bias)] += own.bias
            dextra_k[g] += own.extra_k
            dextra_v[g] += own.extra_v

    gradients = {"q": dq if sink_q is not None else dq + dpinned_q, "k": dk, "v": dv}
    if sink_logits is not None:
        shape = np.shape(sink_logits)
        gradients["sink_logits"] = dlogits.reshape(shape) if shape else dlogits.sum()
    if sink_bias is not None:
        gradients["sink_bias"] = dbias
    if sink_q is not None:
        gradients["sink_q"] = dpinned_q
    if sink_kv is not None:
        gradients["sink_kv"] = dextra_k, dextra_v
    return gradients


class _HeadGradients(NamedTuple):
    """What one query head of one sequence gives; q without what came by pinned_q."""

    q: np.ndarray
    pinned_q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    logits: np.ndarray
    bias: np.ndarray
    extra_k: np.ndarray
    extra_v: np.ndarray


def _head_backward(dout, q, k, v, out, lse, dlse, head, position, pinned_q):
    """The gradients of `_attend_head`."""
    seen, scores, extra = _scores(q, k, head, position, pinned_q, position)
    counts = ~np.isinf(lse)            # else nothing was seen, or an infinite sink takes all
    dout = np.where(counts[:, None], dout, 0.0)
    delta = np.where(counts, (dout * out).sum(axis=-1) - dlse, 0.0)[:, None]
    base = np.where(counts, lse, np.inf)[:, None]

    weights, extra_weights = np.exp(scores - base), np.exp(extra - base)
    dscores, dv = np.zeros(weights.shape), np.zeros(v.shape)
    dscores[:, seen] = weights[:, seen] * (dout @ v[seen].T - delta)
    dv[seen] = weights[:, seen].T @ dout
    dextra = extra_weights * (dout @ head.extra_v.T - delta)

    pinned = np.arange(len(k)) < head.sinks
    bias = dscores[:, pinned].sum(axis=0)
    dk = np.zeros(k.shape)
    near, far = seen & ~pinned, seen & pinned
    dq, dk[near] = _score_backward(dscores[:, near], q, k[near], head)
    dpinned_q, dk[far] = _score_backward(dscores[:, far], pinned_q, k[far], head)
    dextra_q, dextra_k = _score_backward(dextra, q, head.extra_k, head)
    logits = np.exp(np.minimum(head.logits, np.finfo(float).max) - base)   # 0 for +inf, not NaN
    return _HeadGradients(dq + dextra_q, dpinned_q, dk, dv, -(logits * delta).sum(axis=0), bias,
                          dextra_k, extra_weights.T @ dout)


def _score_backward(dscore, q, k, head):
    """(dq, dk) of _score(q, k)."""
    if head.softcap is not None:
        capped = np.minimum(np.abs(head.scale * (q @ k.T) / head.softcap), 300.0)
        dscore = dscore / np.cosh(capped)**2       # 1 - tanh^2, without its cancellation
    return head.scale * (dscore @ k), head.scale * (dscore.T @ q)


def _log_sum_exp(x):
    """log(sum(exp(x))) over the last axis; -inf for nothing, +inf if a term is +inf."""
    top = x.max(axis=-1, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        return top + np.log(np.exp(x - top[..., None]).sum(axis=-1))


def _over_queries(weights, reduce, queries):
    """Per key, sum or maximum of weights [queries, keys] over the last `queries` (None: all)."""
    first = 0 if queries is None else max(len(weights) - queries, 0)
    if reduce == "sum":
        return weights[first:].sum(axis=0)
    assert reduce == "max"
    return weights[first:].max(axis=0, initial=0.0)


def _sequences(batch, query_length, kv_length, starts, lengths, q_lengths, cu_seqlens_q,
               cu_seqlens_k):
    """Yields (row, slice of the queries, slice of the keys) for every sequence of the call."""
    if cu_seqlens_q is not None or cu_seqlens_k is not None:
        assert batch == 1 and starts is None and lengths is None and q_lengths is None
        cu_q = [int(n) for n in cu_seqlens_q]
        cu_k = [int(n) for n in cu_seqlens_k]
        for i in range(len(cu_q) - 1):
            yield 0, slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        return
    for row in range(batch):
        start = 0 if starts is None else int(starts[row])
        length = kv_length - start if lengths is None else int(lengths[row])
        count = query_length if q_lengths is None else int(q_lengths[row])
        yield row, slice(0, count), slice(start, start + length)


def _heads(batch, heads_q, heads_kv, depth, depth_v, *, causal, window, sinks, sink_logits,
           sink_bias, sink_kv, scale, softcap, alibi_slopes):
    """The keywords of a call as one _Head per row and query head: heads[row][head]."""
    window = np.broadcast_to(_wide(0 if window is None else window), (heads_q,))
    window = np.where(window == 0, np.inf, window)
    logits = np.empty((heads_q, 0)) if sink_logits is None else _wide(sink_logits)
    if logits.ndim < 2:
        logits = np.broadcast_to(logits, (heads_q,))[:, None]
    bias = np.zeros((heads_q, 1)) if sink_bias is None else _wide(sink_bias)
    slopes = np.zeros(heads_q) if alibi_slopes is None else _wide(alibi_slopes)
    slopes = np.broadcast_to(slopes, (batch, heads_q))
    if sink_kv is None:
        extra_k, extra_v = np.empty((heads_kv, 0, depth)), np.empty((heads_kv, 0, depth_v))
    else:
        extra_k, extra_v = _wide(sink_kv[0]), _wide(sink_kv[1])
    scale = depth**-0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    group = heads_q // heads_kv
    return [[_Head(bool(causal), window[h], int(sinks), logits[h], bias[h], extra_k[h // group],
                   extra_v[h // group], scale, softcap, slopes[row, h]) for h in range(heads_q)]
            for row in range(batch)]


def _asked_for(out, lse, mass, return_lse, return_mass):
    answer = (out,) + (lse,) * bool(return_lse) + (mass,) * bool(return_mass)
    return answer if len(answer) > 1 else out


def _wide(x):
    return np.asarray(x).astype(np.float64)


def merge(outs, lses):
    """Joins attention over disjoint sets of keys: (out, lse) as if all had been in one call.

    outs: each [..., depth_v]; lses: each [...]. Sink logits belong to exactly one of the parts.
    """
    outs, lses = [_wide(o) for o in outs], [_wide(x) for x in lses]
    lse = _log_sum_exp(np.stack(lses, axis=-1))
    finite = np.isfinite(lse)      # elsewhere out is 0: nothing was seen, or a sink is infinite
    out = np.zeros(outs[0].shape)
    for part, part_lse in zip(outs, lses):
        share = np.exp(np.where(finite, part_lse, -np.inf) - np.where(finite, lse, 0.0))
        out += share[..., None] * part
    return out, lse


def rotate(x, positions, rope, *, scaled=True):
    """Turns the first 2 * len(inv_freq) columns of x [..., tokens, depth] to `positions` [tokens].

    rope: any object with inv_freq, interleaved and attention_scaling. scaled=False leaves
    attention_scaling out: a turn that is added to an earlier one must not scale twice.
    """
    x = _wide(x).copy()
    inv_freq = _wide(rope.inv_freq)
    angle = _wide(positions)[:, None] * inv_freq
    factor = float(rope.attention_scaling) if scaled else 1.0
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)

    half = len(inv_freq)
    if rope.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].copy(), x[..., second].copy()
    x[..., first] = a * cos - b * sin
    x[..., second] = b * cos + a * sin
    return x


class SinkCache:
    """`sinkattn.SinkCache` by its definition, with unbounded memory.

    The token at position t sees the positions {j < sinks} and {t - window < j <= t}, however the
    stream was cut into calls. Each row keeps its whole stream; `_oldest` is the lowest position
    that the real cache would still hold in its ring of window + rollback slots, and only `kept`,
    `crop` and the layout of mass depend on it.
    """

    def __init__(self, batch, kv_heads, head_dim, *, v_head_dim=None, sinks=4, window=1020,
                 dtype="float32", device="cpu", rope=None, positions="slot", rollback=0):
        assert positions in ("slot", "original") and device == "cpu"
        self.batch, self.kv_heads, self.head_dim = batch, kv_heads, head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.sinks, self.window, self.rollback = sinks, window, rollback
        self.rope, self.positions = rope, positions
        # Per row [heads_kv, length, depth] and [heads_kv, length, depth_v].
        self._k = [np.empty((kv_heads, 0, head_dim))] * batch
        self._v = [np.empty((kv_heads, 0, self.v_head_dim))] * batch
        self._oldest = [sinks] * batch

    @property
    def length(self):
        return np.array([k.shape[1] for k in self._k], dtype=np.int64)

    def kept(self):
        """The positions that the real cache holds, per row, ascending."""
        return [np.concatenate([np.arange(min(self.sinks, t)), np.arange(low, max(low, t))])
                for low, t in zip(self._oldest, self.length)]

    def attend(self, q, k, v, *, new_lengths=None, sink_logits=None, sink_bias=None, sink_kv=None,
               scale=None, softcap=None, alibi_slopes=None, out=None, return_lse=False,
               return_mass=False):
        q, k, v = _wide(q), _wide(k), _wide(v)
        batch, heads_q, tokens, depth = q.shape
        group = heads_q // self.kv_heads
        heads = _heads(batch, heads_q, self.kv_heads, depth, self.v_head_dim, causal=True,
                       window=self.window, sinks=self.sinks, sink_logits=sink_logits,
                       sink_bias=sink_bias, sink_kv=sink_kv, scale=scale, softcap=softcap,
                       alibi_slopes=alibi_slopes)
        result = np.zeros((batch, heads_q, tokens, self.v_head_dim))
        lse = np.full((batch, heads_q, tokens), -np.inf)
        mass = np.zeros((batch, self.kv_heads, self.sinks + self.window + self.rollback))

        for row in range(batch):
            count = tokens if new_lengths is None else int(new_lengths[row])
            new = slice(0, count)
            position = self.length[row] + np.arange(count)
            self._append(row, k[row, :, new], v[row, :, new])
            held = self.kept()[row]
            own_q, pinned_q, pinned_position, keys = self._turned(row, q[row, :, new], position)
            for g in range(self.kv_heads):
                weights = 0.0
                for h in range(g * group, (g + 1) * group):
                    result[row, h, new], lse[row, h, new], own = _attend_head(
                        own_q[h], keys[g], self._v[row][g], heads[row][h],
                        position, pinned_q[h], pinned_position)
                    weights = weights + own / group
                mass[row, g, :len(held)] = weights.sum(axis=0)[held]

        if out is not None:
            out[...] = result
            result = out
        return _asked_for(result, lse, mass, return_lse, return_mass)

    def _append(self, row, k, v):
        self._k[row] = np.concatenate([self._k[row], k], axis=1)
        self._v[row] = np.concatenate([self._v[row], v], axis=1)
        ring = self.window + self.rollback
        self._oldest[row] = max(self._oldest[row], self._k[row].shape[1] - ring)

    def _turned(self, row, q, position):
        """The queries, the queries for the pinned keys and their positions, and the keys, rotated.

        positions="slot" counts the slots of a full cache, in which the newest token stands at
        sinks + window - 1 for ever: so it does for the pinned keys, whatever its place in the text.
        """
        rope, keys, pinned_position = self.rope, self._k[row], position
        if self.positions == "slot":
            pinned_position = np.minimum(position, self.sinks + self.window - 1)
        if rope is None:
            return q, q, pinned_position, keys
        if rope.applied:
            pinned_q = rotate(q, pinned_position - position, rope, scaled=False)
            return q, pinned_q, pinned_position, keys
        keys = rotate(keys, np.arange(keys.shape[1]), rope)
        pinned_q = rotate(q, pinned_position, rope)
        return rotate(q, position, rope), pinned_q, pinned_position, keys

    def crop(self, n):
        """Forgets all but the first n tokens of every row (an int, or one per row).

        Raises ValueError, and changes nothing, where a token at position n would miss something.
        """
        wanted = np.broadcast_to(np.asarray(n, dtype=np.int64), (self.batch,))
        for row, first in enumerate(wanted):
            ring = np.arange(max(self.sinks, first - self.window + 1), first)
            if not 0 <= first <= self.length[row] or (ring < self._oldest[row]).any():
                raise ValueError(f"crop(): row {row} no longer holds what token {first} would see")
        for row, first in enumerate(wanted):
            self._k[row], self._v[row] = self._k[row][:, :first], self._v[row][:, :first]
            self._oldest[row] = max(self.sinks, min(self._oldest[row], int(first)))

    def reset(self, rows=None):
        """Empties the given rows (indices or a mask); all of them by default."""
        if rows is None:
            rows = range(self.batch)
        elif np.asarray(rows).dtype == bool:
            rows = np.flatnonzero(rows)
        for row in rows:
            self._k[row], self._v[row] = self._k[row][:, :0], self._v[row][:, :0]
            self._oldest[row] = self.sinks

    def reorder(self, index):
        """Row i becomes what row index[i] was; repeats are allowed."""
        index = [int(i) for i in index]
        assert len(index) == self.batch
        self._k = [self._k[i] for i in index]
        self._v = [self._v[i] for i in index]
        self._oldest = [self._oldest[i] for i in index]

    def copy(self):
        twin = copy.copy(self)
        twin._k, twin._v, twin._oldest = list(self._k), list(self._v), list(self._oldest)
        return twin
