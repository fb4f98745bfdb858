"""SinkCache against the naive model, which keeps the whole stream."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, normal
from tolerance import HALF_RELATIVE, assert_close, assert_lse_close, relative_error

from sinkattn import Rope, SinkCache, reference

ROPES = {
    "none": None,
    "raw": Rope.from_theta(32),
    "raw interleaved, scaled": Rope.from_theta(32, interleaved=True, attention_scaling=1.2),
    "raw partial": Rope.from_theta(12),
    "applied": Rope.from_theta(32, applied=True),
    "applied interleaved, partial": Rope.from_theta(20, interleaved=True, applied=True),
}


def pair(**keywords):
    keywords = {"sinks": 3, "window": 10, **keywords}
    return SinkCache(2, 2, 32, **keywords), reference.SinkCache(2, 2, 32, **keywords)


def chunk(random, tokens, dtype="float32", batch=2):
    return tuple(normal(random, batch, h, tokens, 32, dtype=dtype) for h in (4, 2, 2))


def step(ours, model, q, k, v, bound=5e-6, **keywords):
    got = ours.attend(q, k, v, return_lse=True, return_mass=True, **keywords)
    expected = model.attend(q, k, v, return_lse=True, return_mass=True, **keywords)
    assert_close(got[0], expected[0], bound)
    assert_lse_close(got[1], expected[1], max(1e-5, bound))
    assert_close(got[2], expected[2], max(2e-5, bound))
    np.testing.assert_array_equal(ours.length, model.length)
    for a, b in zip(ours.kept(), model.kept()):
        np.testing.assert_array_equal(a, b)
    return got


@pytest.mark.parametrize("positions", ["slot", "original"])
@pytest.mark.parametrize("rope", ROPES)
def test_any_chunking_equals_the_definition(rope, positions, table):
    """Sinks arriving in pieces, chunks longer than the window, single steps across the wrap."""
    random = np.random.default_rng(0)
    ours, model = pair(rope=ROPES[rope], positions=positions, rollback=2)
    for tokens in (1, 1, 3, 7, 1, 40, 1, 1, 12, 13, 1, 0, 5):
        step(ours, model, *chunk(random, tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype, table):
    """Raw keys are rounded once more after they are turned: as a model's own cache has them."""
    random = np.random.default_rng(1)
    for rope in ("none", "raw", "applied"):
        ours, model = pair(rope=ROPES[rope], dtype=dtype)
        for tokens in (1, 5, 30, 1, 1):
            step(ours, model, *chunk(random, tokens, dtype), bound=2 * HALF_RELATIVE[dtype])


def test_every_argument(table):
    random = np.random.default_rng(2)
    learned = normal(random, 2, 3, 32), normal(random, 2, 3, 32)
    keywords = {"sink_logits": random.standard_normal((4, 2)), "softcap": 2.0, "scale": 0.3,
                "sink_bias": random.standard_normal((4, 3)), "sink_kv": learned,
                "alibi_slopes": random.random(4)}
    for positions in ("slot", "original"):
        ours, model = pair(rope=ROPES["raw"], positions=positions)
        for tokens in (2, 20, 1, 1, 9):
            step(ours, model, *chunk(random, tokens), **keywords)


@given(data=st.data())
def test_any_sequence_of_calls(data, device):
    """Rows at their own lengths and phases; reset, reorder, copy, crop in between."""
    draw = data.draw
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    keywords = {"sinks": draw(st.integers(0, 4)), "window": draw(st.integers(1, 9)),
                "rollback": draw(st.integers(0, 4)), "rope": ROPES[draw(st.sampled_from(list(ROPES)))],
                "positions": draw(st.sampled_from(["slot", "original"]))}
    ours, model = pair(**keywords)
    for _ in range(draw(st.integers(1, 8))):
        action = draw(st.sampled_from(["attend", "attend", "attend", "reset", "reorder", "copy",
                                       "crop", "state"]))
        if action == "attend":
            tokens = draw(st.integers(0, 15))
            new = draw(st.none() | st.lists(st.integers(0, tokens), min_size=2, max_size=2))
            step(ours, model, *chunk(random, tokens), new_lengths=new)
        elif action == "reset":
            rows = draw(st.sampled_from([None, [1], [True, False], []]))
            ours.reset(rows), model.reset(rows)
        elif action == "reorder":
            index = draw(st.lists(st.integers(0, 1), min_size=2, max_size=2))
            ours.reorder(index), model.reorder(index)
        elif action == "copy":
            old = ours
            ours, model = ours.copy(), model.copy()
            old.reset()
        elif action == "crop":
            n = int(max(ours.length) - draw(st.integers(0, 6)))
            try:
                model.crop(n)
            except ValueError:
                before = ours.length
                with pytest.raises(ValueError, match=r"crop\(\): "):
                    ours.crop(n)
                np.testing.assert_array_equal(ours.length, before)
            else:
                ours.crop(n)
        else:
            resumed = SinkCache(2, 2, 32, **keywords)
            resumed.load_state_dict(ours.state_dict())
            ours = resumed


def test_memory_is_constant_and_known(device):
    cache = SinkCache(2, 2, 32, v_head_dim=16, sinks=4, window=10, rollback=2, dtype="float16")
    assert cache.nbytes == 2 * 2 * 16 * (32 + 16) * 2 + 2 * 2 * 8
    before = cache.nbytes
    x = np.ones((2, 2, 100, 32), np.float16)
    cache.attend(x, x, x[..., :16])
    assert cache.nbytes == before


def test_evicted_nan_never_comes_back(table):
    random = np.random.default_rng(3)
    cache, _ = pair()
    q, k, v = chunk(random, 30)
    k[:, :, 5:12] = v[:, :, 5:12] = np.nan
    cache.attend(q, k, v)
    assert np.isfinite(cache.attend(*chunk(random, 3))).all()


@pytest.mark.parametrize("rope", ["raw", "applied"])
def test_angles_are_right_at_position_ten_million(rope, device):
    """float32 angles are off by 0.1 rad there; a model with the same relative distances is not."""
    random = np.random.default_rng(4)
    far = 10_000_000
    ours, near = (SinkCache(2, 2, 32, sinks=0, window=10, rope=ROPES[rope]) for _ in range(2))
    state = ours.state_dict()
    state["length"][:] = state["low"][:] = far
    ours.load_state_dict(state)
    q, k, v = chunk(random, 10)
    if rope == "applied":
        turned = [[reference.rotate(x, at + np.arange(10), ROPES[rope]).astype(np.float32)
                   for x in (q, k)] for at in (far, 0)]
        a, b = ours.attend(*turned[0], v), near.attend(*turned[1], v)
    else:
        a, b = ours.attend(q, k, v), near.attend(q, k, v)
    assert relative_error(a, b) < 3e-6


def test_state_survives_a_file(tmp_path, device):
    random = np.random.default_rng(5)
    for dtype in DTYPES:
        cache, _ = pair(rope=ROPES["raw"], dtype=dtype)
        cache.attend(*chunk(random, 25, dtype))
        np.savez(tmp_path / "state.npz", **cache.state_dict())
        twin, _ = pair(rope=ROPES["raw"], dtype=dtype)
        with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
            twin.load_state_dict(state)
        q, k, v = chunk(random, 4, dtype)
        np.testing.assert_array_equal(cache.attend(q, k, v), twin.attend(q, k, v))


def test_a_hostile_state_is_refused_and_changes_nothing(device):
    random = np.random.default_rng(6)
    cache, _ = pair(rope=ROPES["raw"])
    cache.attend(*chunk(random, 25))
    good = cache.state_dict()
    bad = {
        "keys": [good["keys"][:1], good["keys"].astype(np.float64), None, "x"],
        "values": [good["values"][..., :5], np.zeros(3, np.float32)],
        "length": [np.array([-1, 25]), np.array([25]), np.array([25.0, 25.0]), [25, 25],
                   np.array([2**62, 25])],
        "low": [np.array([0, 15]), np.array([26, 15]), np.array([3, 15]), np.array([14, 15])],
        "version": [np.int64(2), 1],
        "window": [np.int64(11)], "sinks": [np.int64(2)], "dtype": [np.str_("float16")],
        "positions": [np.str_("original")], "rope_inv_freq": [np.empty(0), good["rope_inv_freq"] + 1],
        "rope_attention_scaling": [np.float64(np.nan)],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=rf"load_state_dict\(\): .*{name}"):
                cache.load_state_dict({**good, name: value})
    for name in good:
        with pytest.raises(ValueError, match=f"{name} is missing"):
            cache.load_state_dict({n: x for n, x in good.items() if n != name})
    for name, x in cache.state_dict().items():
        np.testing.assert_array_equal(x, good[name])


def test_a_failed_call_leaves_the_cache_as_it_was(device, monkeypatch):
    random = np.random.default_rng(7)
    cache, model = pair(rope=ROPES["raw"])
    step(cache, model, *chunk(random, 25))
    before = cache.state_dict()
    q, k, v = chunk(random, 4)
    for bad in ((q, k, v[:, :, :3]), (q, k[..., :31], v), (q.astype(np.float16), k, v), (q, None, v)):
        with pytest.raises((ValueError, TypeError)):
            cache.attend(*bad)
    if device == "cuda_numbers":  # not read there unless asked for
        monkeypatch.setenv("SINKATTN_CHECK", "1")
    with pytest.raises(ValueError, match="new_lengths"):
        cache.attend(q, k, v, new_lengths=[1, 5])
    for name, x in cache.state_dict().items():
        np.testing.assert_array_equal(x, before[name])
    step(cache, model, q, k, v)


def test_copies_share_nothing_and_pickle_is_refused(device):
    random = np.random.default_rng(8)
    cache, _ = pair()
    cache.attend(*chunk(random, 12))
    twin = copy.deepcopy(cache)
    cache.reset()
    assert twin.length.tolist() == [12, 12] and cache.length.tolist() == [0, 0]
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(cache)


@pytest.mark.parametrize(("keywords", "error", "match"), [
    ({"window": 0}, ValueError, "window is 0"),
    ({"window": True}, TypeError, "window is bool"),
    ({"sinks": -1}, ValueError, "sinks is -1"),
    ({"sinks": 1.5}, TypeError, "sinks is float"),
    ({"rollback": -1}, ValueError, "rollback"),
    ({"window": 2**70}, ValueError, "window"),
    ({"window": 2**60}, ValueError, "does not fit"),
    ({"dtype": "float64"}, TypeError, "dtype"),
    ({"device": "tpu"}, NotImplementedError, "device is tpu; the backends are: cpu, cuda"),
    ({"device": "cuda:x"}, NotImplementedError, "device is cuda:x"),
    ({"storage": np.zeros(10)}, ValueError, "storage has 80 bytes, expected at least"),
    ({"storage": np.zeros((4096, 2))[:, 0]}, ValueError, "storage is not contiguous"),
    ({"storage": 3}, TypeError, "storage is int, expected an array"),
    ({"positions": "text"}, ValueError, "positions"),
    ({"rope": 1.0}, TypeError, "rope"),
    ({"rope": Rope.from_theta(64)}, ValueError, "rope has 32"),
    ({"v_head_dim": 300}, ValueError, "v_head_dim"),
])
def test_a_bad_construction_names_its_argument(keywords, error, match):
    with pytest.raises(error, match=match):
        SinkCache(2, 2, 32, **keywords)


@pytest.mark.parametrize(("inv_freq", "error"), [([], ValueError), ([[1.0]], ValueError),
                                                 ([np.nan], ValueError), (["a"], TypeError),
                                                 ([True], TypeError), (np.ones(129), ValueError)])
def test_a_bad_rope_names_inv_freq(inv_freq, error):
    with pytest.raises(error, match="inv_freq"):
        Rope(inv_freq)
