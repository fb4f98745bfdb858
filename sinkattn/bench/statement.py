"""Attention in float64 for a sample of rows, straight from its definition: what timed results are
compared with."""

import numpy as np


def as_double(array):
    """Any result, a NumPy array or a torch tensor, as float64."""
    if hasattr(array, "double"):
        return array.detach().double().numpy()
    return np.asarray(array).astype(np.float64)


def attend_row(query, keys, values, seen):
    """query [depth], keys and values [length, depth], seen: bool [length]."""
    keys, values = as_double(keys[seen]), as_double(values[seen])
    score = keys @ as_double(query) / np.sqrt(query.shape[0])
    weight = np.exp(score - score.max())
    return weight @ values / weight.sum()


def causal_seen(length, position, window=None, sinks=0):
    key = np.arange(length)
    seen = key <= position
    if window is not None:
        seen &= (position - key < window) | (key < sinks)
    return seen


def sample_rows(heads, queries, count):
    """(head, query) pairs: the first and the last query, and others at random."""
    random = np.random.default_rng(3)
    some = zip(random.integers(heads, size=count), random.integers(queries, size=count))
    return [(0, 0), (heads - 1, queries - 1), *((int(h), int(i)) for h, i in some)]


def head_gradients(dout, q, k, v, window=None, sinks=0, block=256):
    """(dq, dk, dv) of one head of causal self-attention, [length, depth] each, a block of queries
    after the other."""
    length, scale = len(q), q.shape[1] ** -0.5
    dq, dk, dv = (np.zeros(x.shape) for x in (q, k, v))
    for first in range(0, length, block):
        some = slice(first, min(first + block, length))
        seen = np.array([causal_seen(length, i, window, sinks)
                         for i in range(some.start, some.stop)])
        score = np.where(seen, q[some] @ k.T * scale, -np.inf)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        product = dout[some] @ v.T
        dscore = scale * weight * (product - (weight * product).sum(-1, keepdims=True))
        dq[some] = dscore @ k
        dk += dscore.T @ q[some]
        dv += weight.T @ dout[some]
    return dq, dk, dv


def gradient_error_of(gradients, dout, q, k, v, window=None, sinks=0):
    """The largest relative L2 error of dq, dk and dv [1, heads, length, depth] in the last head."""
    exact = head_gradients(*(as_double(x[0, -1]) for x in (dout, q, k, v)), window, sinks)
    return float(max(np.linalg.norm(as_double(got[0, -1]) - wanted) / np.linalg.norm(wanted)
                     for got, wanted in zip(gradients, exact)))


def error_of(out, q, k, v, window=None, sinks=0, count=14):
    """Relative L2 error of `out` [1, heads_q, queries, depth] over a sample of rows. The last query
    stands at the last key."""
    heads, queries = q.shape[1:3]
    length, group = k.shape[2], q.shape[1] // k.shape[1]
    got, expected = [], []
    for head, query in sample_rows(heads, queries, count):
        seen = causal_seen(length, length - queries + query, window, sinks)
        expected.append(attend_row(q[0, head, query], k[0, head // group], v[0, head // group],
                                   seen))
        got.append(as_double(out[0, head, query]))
    got, expected = np.array(got), np.array(expected)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
