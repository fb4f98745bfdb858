"""What hypothesis draws: whole calls of attend, every keyword free of the others."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from oracle import DTYPES, normal

from sinkattn import Rope

# Extents at and around the edges of blocks, and small ones, where everything is an edge.
LENGTHS = st.integers(0, 12) | st.sampled_from([31, 33, 63, 64, 65, 127, 128, 129, 200, 257, 300])
DEPTHS = st.integers(1, 9) | st.sampled_from([15, 16, 17, 32, 40, 64, 65, 80, 96, 128, 192, 256])


class Call(NamedTuple):
    """One call of attend."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    keywords: dict


def seeds():
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def tensors(draw, random, shape, dtype):
    """Random numbers with any strides but the last: padded, permuted, reversed, broadcast."""
    batch, heads, length, depth = shape
    layout = draw(st.sampled_from(["plain", "plain", "padded", "token major", "length first",
                                   "reversed", "every second", "one head", "one row"]))
    if layout == "padded":
        return normal(random, batch, heads + 1, length + 2, depth + 3,
                      dtype=dtype)[:, 1:, 1:-1, 2:-1]
    if layout == "token major":
        return normal(random, batch, length, heads, depth, dtype=dtype).transpose(0, 2, 1, 3)
    if layout == "length first":
        return normal(random, length, batch, heads, depth, dtype=dtype).transpose(1, 2, 0, 3)
    if layout == "reversed":
        return normal(random, *shape, dtype=dtype)[::-1, ::-1, ::-1]
    if layout == "every second":
        return normal(random, batch, 2 * heads, 2 * length, depth, dtype=dtype)[:, ::2, ::2]
    if layout == "one head":
        return np.broadcast_to(normal(random, batch, 1, length, depth, dtype=dtype), shape)
    if layout == "one row":
        return np.broadcast_to(normal(random, 1, heads, length, depth, dtype=dtype), shape)
    return normal(random, *shape, dtype=dtype)


@st.composite
def padding(draw, random, batch, queries, keys):
    """starts, lengths and q_lengths, or the offsets of packed sequences, or nothing."""
    kind = draw(st.sampled_from(["none", "padded", "packed"]))
    if kind == "packed" and batch == 1:
        cuts = draw(st.integers(0, 5))
        dtype = draw(st.sampled_from([np.int32, np.int64]))
        return {name: np.array([0, *sorted(random.integers(0, n + 1, cuts)), n], dtype)
                for name, n in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys))}
    if kind == "none":
        return {}
    starts = random.integers(0, keys + 1, batch)
    given = {"starts": starts, "lengths": random.integers(0, keys - starts + 1),
             "q_lengths": random.integers(0, queries + 1, batch)}
    if draw(st.booleans()):
        del given["starts"]
        given["lengths"] = random.integers(0, keys + 1, batch)
    return {name: x for name, x in given.items() if draw(st.integers(0, 3))}


@st.composite
def scores(draw, random, batch, heads_q, heads_kv, depth, depth_v, sinks, dtype):
    """The keywords that a cache call has too: what happens to a score, and the sinks."""
    def sometimes():
        return draw(st.integers(0, 3)) == 0

    keywords = {}
    if sometimes():
        shape = draw(st.sampled_from([(), (heads_q,), (heads_q, 1), (heads_q, 3)]))
        keywords["sink_logits"] = 3 * random.standard_normal(shape)
        if shape and sometimes():
            keywords["sink_logits"][0] = -np.inf
    if sinks and sometimes():
        keywords["sink_bias"] = 3 * random.standard_normal((heads_q, sinks))
        if sometimes():
            keywords["sink_bias"][:, random.integers(sinks)] = -np.inf
        if sometimes():
            keywords["sink_bias"][random.integers(heads_q)] = -np.inf
    if sometimes():
        rows = draw(st.sampled_from([0, 1, 3, 70, 130]))
        keywords["sink_kv"] = (normal(random, heads_kv, rows, depth, dtype=dtype),
                               normal(random, heads_kv, rows, depth_v, dtype=dtype))
    if sometimes():
        keywords["scale"] = draw(st.sampled_from([0.0, -0.1, 0.3, 1])) / depth**0.5
    if sometimes():
        keywords["softcap"] = draw(st.sampled_from([0.3, 2.0, 50.0]))
    if sometimes():
        shape = draw(st.sampled_from([(heads_q,), (batch, heads_q)]))
        keywords["alibi_slopes"] = random.standard_normal(shape) / 8
    return keywords


@st.composite
def calls(draw, dtypes=DTYPES):
    """Any call of attend that the contract allows."""
    random, dtype = draw(seeds()), draw(st.sampled_from(dtypes))
    batch = draw(st.sampled_from([1, 1, 2, 3]))
    heads_kv, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 8]))
    heads_q = heads_kv * group
    queries = draw(st.sampled_from([1, 1, 2]) | LENGTHS)
    keys = draw(LENGTHS | st.sampled_from([513, 1100]))
    depth, depth_v = draw(DEPTHS), draw(DEPTHS)

    sinks = draw(st.sampled_from([0, 0, 1, 2, 4, 70, 130]))
    keywords = {"sinks": sinks, "causal": draw(st.sampled_from([True, True, False]))}
    window = draw(st.sampled_from([None, "heads", 1, 2, 5, 40, 128, 10**12]))
    if window == "heads":
        window = random.choice([0, 1, 3, 30, 130, 10**9], heads_q)
    keywords["window"] = window
    if sinks and draw(st.booleans()):
        keywords["sink_q"] = draw(tensors(random, (batch, heads_q, queries, depth), dtype))
    keywords.update(draw(scores(random, batch, heads_q, heads_kv, depth, depth_v, sinks, dtype)))
    keywords.update(draw(padding(random, batch, queries, keys)))
    keywords["mass_reduce"] = draw(st.sampled_from(["sum", "max"]))
    keywords["mass_queries"] = draw(st.sampled_from([None, 0, 1, 3, 1000]))
    return Call(draw(tensors(random, (batch, heads_q, queries, depth), dtype)),
                draw(tensors(random, (batch, heads_kv, keys, depth), dtype)),
                draw(tensors(random, (batch, heads_kv, keys, depth_v), dtype)), keywords)


@st.composite
def ropes(draw, depth):
    """No rotation, or any kind of it that fits the depth."""
    if depth < 2 or draw(st.integers(0, 2)) == 0:
        return None
    pairs = draw(st.sampled_from([depth // 2, depth // 2, max(depth // 4, 1), 1]))
    return Rope(10.0 ** -np.linspace(0, 4, pairs), interleaved=draw(st.booleans()),
                attention_scaling=draw(st.sampled_from([1.0, 1.3])), applied=draw(st.booleans()))


class Stream(NamedTuple):
    """How a cache is made, and what every call to it passes."""

    shape: tuple           # batch, kv_heads, head_dim
    heads_q: int
    making: dict           # keywords of SinkCache
    keywords: dict         # keywords of attend
    random: np.random.Generator

    def chunk(self, tokens):
        batch, heads_kv, depth = self.shape
        dtype = self.making["dtype"]
        return (normal(self.random, batch, self.heads_q, tokens, depth, dtype=dtype),
                normal(self.random, batch, heads_kv, tokens, depth, dtype=dtype),
                normal(self.random, batch, heads_kv, tokens, self.making["v_head_dim"], dtype=dtype))


@st.composite
def streams(draw, dtypes=DTYPES):
    """Any cache that the contract allows, rings from one slot to more than a block."""
    random, dtype = draw(seeds()), draw(st.sampled_from(dtypes))
    batch, heads_kv, group = (draw(st.integers(1, n)) for n in (3, 2, 4))
    depth, depth_v = draw(DEPTHS), draw(DEPTHS)
    making = {"v_head_dim": depth_v, "dtype": dtype, "rope": draw(ropes(depth)),
              "sinks": draw(st.sampled_from([0, 1, 2, 4, 5, 130])),
              "window": draw(st.sampled_from([1, 2, 3, 7, 16, 40, 127, 128, 129, 200])),
              "rollback": draw(st.sampled_from([0, 0, 1, 5, 60])),
              "positions": draw(st.sampled_from(["slot", "original"]))}
    keywords = draw(scores(random, batch, heads_kv * group, heads_kv, depth, depth_v,
                           making["sinks"], dtype))
    return Stream((batch, heads_kv, depth), heads_kv * group, making, keywords, random)
