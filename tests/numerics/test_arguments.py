"""Every argument, alone and together, with every kernel table and dtype, against the reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, check_attend, dtype_of, normal

SHAPES = {  # batch, kv heads, group, queries, keys, depth, depth_v
    "decode": (2, 2, 4, 1, 700, 64, 64),
    "decode long": (1, 1, 8, 1, 2100, 128, 128),
    "decode mqa": (1, 1, 32, 1, 1300, 64, 64),
    "few queries": (2, 1, 2, 5, 90, 32, 96),
    "prefill": (1, 2, 2, 200, 300, 64, 64),
    "more queries than keys": (1, 2, 1, 130, 40, 80, 48),
    "odd depths": (2, 1, 3, 17, 33, 37, 20),
    "smallest": (1, 1, 1, 3, 3, 1, 1),
    "widest": (1, 1, 2, 30, 70, 256, 256),
}


def features(random, batch, kv_heads, group, queries, keys, depth, depth_v, dtype):
    heads = kv_heads * group
    return {
        "plain": {},
        "not causal": {"causal": False},
        "window": {"window": 17},
        "window one": {"window": 1},
        "pinned": {"window": 9, "sinks": 4},
        "pinned, both sides": {"window": 9, "sinks": 4, "causal": False},
        "pinned across blocks": {"window": 30, "sinks": 70},
        "windows by head": {"window": random.integers(0, 40, heads), "sinks": 2},
        "one sink logit": {"sink_logits": 0.7},
        "sink logits": {"sink_logits": 3 * random.standard_normal((heads, 3)), "window": 8},
        "bias": {"sinks": 3, "sink_bias": 3 * random.standard_normal((heads, 3))},
        "bias, window": {"sinks": 3, "window": 5,
                         "sink_bias": 3 * random.standard_normal((heads, 3))},
        "second query": {"sinks": 5, "window": 11,
                         "sink_q": normal(random, batch, heads, queries, depth, dtype=dtype)},
        "learned": {"sink_kv": (normal(random, kv_heads, 6, depth, dtype=dtype),
                                normal(random, kv_heads, 6, depth_v, dtype=dtype)), "window": 7},
        "softcap": {"softcap": 1.3},
        "alibi": {"alibi_slopes": random.random((batch, heads)), "window": 60, "sinks": 2},
        "scale": {"scale": -0.2},
        "padding": {"starts": random.integers(0, keys // 2 + 1, batch),
                    "lengths": random.integers(0, keys // 2 + 1, batch),
                    "q_lengths": random.integers(0, queries + 1, batch), "sinks": 2, "window": 6},
        "largest mass of the last": {"mass_reduce": "max", "mass_queries": 3},
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_feature_agrees_with_the_reference(shape, dtype, table):
    """A kernel that serves a feature on one path only (decode, prefill, odd depth) is caught."""
    random = np.random.default_rng(len(shape))
    batch, kv_heads, group, queries, keys, depth, depth_v = SHAPES[shape]
    q = normal(random, batch, kv_heads * group, queries, depth, dtype=dtype)
    k = normal(random, batch, kv_heads, keys, depth, dtype=dtype)
    v = normal(random, batch, kv_heads, keys, depth_v, dtype=dtype)
    for keywords in features(random, *SHAPES[shape], dtype).values():
        check_attend(q, k, v, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_at_once(dtype, table):
    """Features that are right alone may disturb each other."""
    random = np.random.default_rng(1)
    q, k, v, sink_q = (normal(random, 2, h, n, 64, dtype=dtype)
                       for h, n in ((6, 50), (2, 130), (2, 130), (6, 50)))
    learned = normal(random, 2, 4, 64, dtype=dtype), normal(random, 2, 4, 64, dtype=dtype)
    check_attend(q, k, v, window=[0, 20, 3, 64, 65, 1], sinks=5, sink_q=sink_q, sink_kv=learned,
                 sink_logits=random.standard_normal((6, 2)), softcap=3.0, scale=0.3,
                 sink_bias=random.standard_normal((6, 5)), alibi_slopes=random.random(6) / 4,
                 starts=[0, 7], lengths=[130, 90], q_lengths=[50, 33], mass_queries=20)


def test_packed_sequences_equal_separate_calls(table):
    """Each sequence has its own pinned tokens, window and alignment; bit for bit."""
    from sinkattn import attend
    random = np.random.default_rng(2)
    cu_q, cu_k = [0, 5, 5, 60, 61], [0, 30, 40, 95, 170]
    q, k, v = (normal(random, 1, h, n, 64) for h, n in ((4, 61), (2, 170), (2, 170)))
    keywords = {"window": 12, "sinks": 3, "sink_logits": [0.0, 1.0, -1.0, 2.0]}
    out, lse, mass = check_attend(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **keywords)
    for i in range(4):
        rows, columns = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = attend(q[:, :, rows], k[:, :, columns], v[:, :, columns], return_lse=True,
                       return_mass=True, **keywords)
        np.testing.assert_array_equal(out[:, :, rows], alone[0])
        np.testing.assert_array_equal(lse[:, :, rows], alone[1])
        np.testing.assert_array_equal(mass[:, :, columns], alone[2])


@given(data=st.data())
def test_any_call_agrees_with_the_reference(data, device):
    """Combinations that nobody thought of."""
    draw = data.draw
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    batch, kv_heads, group = (draw(st.integers(1, n)) for n in (3, 3, 4))
    queries, keys = draw(st.integers(0, 80)), draw(st.integers(0, 150))
    depth, depth_v = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    every = features(random, batch, kv_heads, group, queries, keys, depth, depth_v, dtype)
    keywords = {}
    for name in draw(st.lists(st.sampled_from(sorted(every)), max_size=4)):
        keywords.update(every[name])
    if not keywords.get("sinks"):
        keywords.pop("sink_q", None)
    if "sink_bias" in keywords:
        keywords["sink_bias"] = random.standard_normal((kv_heads * group, keywords["sinks"]))

    def tensor(heads, length, width):
        """Any strides on the outer axes: permuted, reversed, a view of something bigger."""
        x = normal(random, batch, length, heads, width + 3, dtype=dtype)[..., :width]
        x = x.transpose(0, 2, 1, 3)
        return x[:, :, ::-1] if draw(st.booleans()) else x

    check_attend(tensor(kv_heads * group, queries, depth), tensor(kv_heads, keys, depth),
                 tensor(kv_heads, keys, depth_v), **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_strides_are_read(dtype, table):
    """A head that is broadcast to all has stride 0."""
    random = np.random.default_rng(3)
    q = np.broadcast_to(normal(random, 1, 1, 9, 32, dtype=dtype), (2, 4, 9, 32))
    k = np.broadcast_to(normal(random, 1, 1, 20, 32, dtype=dtype), (2, 2, 20, 32))
    check_attend(q, k, k, window=6, sinks=1)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_extents(empty, table):
    """Nothing to do is not an error: out of no key is 0, its lse the sink."""
    batch, queries, keys = (0 if empty == n else 3 for n in ("batch", "queries", "keys"))
    q = np.ones((batch, 2, queries, 8), np.float32)
    k = np.ones((batch, 1, keys, 8), np.float32)
    out, lse, mass = check_attend(q, k, k, sink_logits=[0.5, -np.inf])
    assert out.shape == q.shape and mass.shape == (batch, 1, keys)
    if empty == "keys":
        assert (out == 0).all()
        np.testing.assert_allclose(lse[:, 0], 0.5)
        assert (lse[:, 1] == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_in_full(dtype, table):
    """Padded queries, rows that see nothing, tails: no byte keeps what was there, none outside
    is touched."""
    from sinkattn import attend
    random = np.random.default_rng(4)
    q, k = normal(random, 2, 2, 40, 37, dtype=dtype), normal(random, 2, 1, 20, 37, dtype=dtype)
    whole = np.full((2, 3, 41, 40), np.nan, dtype_of(dtype))
    out = whole[:, :2, :40, :37]
    assert attend(q, k, k, out=out, q_lengths=[40, 3]) is out
    assert np.isfinite(out.astype(np.float32)).all()
    assert np.isnan(whole[:, 2:].astype(np.float32)).all()
    assert np.isnan(whole[:, :, 40:].astype(np.float32)).all()
    assert np.isnan(whole[..., 37:].astype(np.float32)).all()
    np.testing.assert_array_equal(out, attend(q, k, k, q_lengths=[40, 3]))
