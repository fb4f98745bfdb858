"""Expected values: sinkattn.reference, which is itself tested against torch and Hugging Face."""

import numpy as np
from tolerance import FP32_RELATIVE, HALF_RELATIVE, assert_close, assert_lse_close

from sinkattn import attend, reference

DTYPES = ("float32", "float16", "bfloat16")


def dtype_of(name):
    if name == "bfloat16":
        import ml_dtypes
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def normal(random, *shape, dtype="float32"):
    return random.standard_normal(shape).astype(dtype_of(dtype))


def check_attend(q, k, v, bound=None, **keywords):
    """attend against the reference: out, lse and mass. Returns what attend gave."""
    got = attend(q, k, v, return_lse=True, return_mass=True, **keywords)
    expected = reference.attend(q, k, v, return_lse=True, return_mass=True, **keywords)
    name = q.dtype.name
    bound = bound or HALF_RELATIVE.get(name, FP32_RELATIVE)
    assert got[0].dtype == q.dtype
    assert got[1].dtype == got[2].dtype == np.float32
    assert_close(got[0], expected[0], bound)
    assert_lse_close(got[1], expected[1], 1e-5 if name == "float32" else 1e-4)
    assert_close(got[2], expected[2], 1e-5 if name == "float32" else 1e-3)
    return got


def sequences(call):
    """(row, first query, queries, first key, keys) of every sequence of a call."""
    (batch, _, queries, _), keys, given = call.q.shape, call.k.shape[2], call.keywords
    if "cu_seqlens_q" in given:
        cu_q, cu_k = (given[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
        return [(0, a, b - a, c, d - c)
                for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:])]
    starts = given.get("starts", np.zeros(batch, int))
    lengths = given.get("lengths", keys - starts)
    return [(b, 0, int(given.get("q_lengths", [queries] * batch)[b]), int(starts[b]),
             int(lengths[b])) for b in range(batch)]


def visible(call):
    """bool [batch, heads_q, queries, keys], written out from the contract for one query at a
    time: a second opinion, beside that of the reference."""
    given, heads = call.keywords, call.q.shape[1]
    sinks, bias = given["sinks"], given.get("sink_bias")
    windows = np.broadcast_to(0 if given["window"] is None else given["window"], (heads,))
    seen = np.zeros((*call.q.shape[:3], call.k.shape[2]), bool)
    for b, first_query, queries, first_key, keys in sequences(call):
        for i in range(queries):
            position = keys - queries + i
            j = np.arange(min(keys, position + 1) if given["causal"] else keys)
            for h in range(heads):
                near = np.abs(position - j) < (windows[h] or np.inf)
                pinned = j < sinks
                row = near | pinned
                if bias is not None:
                    row[:sinks] &= (bias[h] > -np.inf)[:len(row)]
                seen[b, h, first_query + i, first_key:first_key + len(j)] = row
    return seen


def real_queries(call):
    """bool [batch, queries]: those that q_lengths counts."""
    real = np.zeros((call.q.shape[0], call.q.shape[2]), bool)
    for b, first, count, _, _ in sequences(call):
        real[b, first:first + count] = True
    return real
