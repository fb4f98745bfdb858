"""What KVCache and the policies refuse, and that a refused call has changed nothing."""

import copy
import pickle

import numpy as np
import pytest

from sinkattn import KVCache, Rope, pyramid
from sinkattn.policy import (
    CUR,
    H2OEMA,
    TOVA,
    Custom,
    ExpectedAttention,
    KNorm,
    Random,
    Scissorhands,
    SnapKV,
)

X = np.random.default_rng(0).standard_normal((1, 2, 5, 8)).astype(np.float32)


def make(batch=1, heads=2, depth=8, **keywords):
    return KVCache(batch, heads, depth, **{"budget": 8, "sinks": 1, "recent": 2, **keywords})


def filled(**keywords):
    cache = make(**keywords)
    cache.attend(*[np.tile(X, (1, 1, 4, 1))] * 3)
    return cache


@pytest.mark.parametrize(("keywords", "error", "match"), [
    ({"policy": "H2O"}, TypeError, r"policy is str, expected a policy"),
    ({"policy": H2OEMA}, TypeError, r"policy is type, expected a policy"),
    ({"device": "tpu"}, NotImplementedError, r"device is tpu; the backends are: cpu, cuda"),
    *[({"device": "cuda", "policy": policy}, NotImplementedError,
       rf"policy {type(policy).__name__} on CUDA; the backends that have it: cpu")
      for policy in (ExpectedAttention(), Custom(len))],
    ({"device": "cuda", "budget": 0.5}, NotImplementedError, r"budget is a share on CUDA"),
    ({"device": "cuda", "rope": Rope.from_theta(8), "positions": "slot"}, NotImplementedError,
     r"positions='slot' with a rope on CUDA; the backends that have it: cpu"),
    ({"positions": "text"}, ValueError, r"positions is 'text', expected 'slot' or 'original'"),
    ({"rope": 3}, TypeError, r"rope is int, expected a Rope or None"),
    ({"rope": Rope.from_theta(8, applied=True), "positions": "slot"}, NotImplementedError,
     r"positions='slot' with a rope that is applied"),
    ({"rope": Rope.from_theta(12)}, ValueError, r"rope has 6 frequencies, expected at most 4"),
    ({"rope": Rope.from_theta(8), "positions": "slot", "policy": ExpectedAttention()},
     NotImplementedError, r"positions='slot' with a rope and ExpectedAttention"),
    ({"policy": ExpectedAttention(0)}, ValueError, r"the n_future of ExpectedAttention is 0"),
    ({"track_mass": 1}, TypeError, r"track_mass is int, expected a bool"),
    ({"budget": 1.5}, ValueError, r"budget is 1.5, expected an int, an int array"),
    ({"budget": float("nan")}, ValueError, r"budget is nan"),
    ({"budget": True}, TypeError, r"budget is bool, expected an int"),
    ({"budget": [8.0, 9.0]}, TypeError, r"budget has dtype float64, expected integers"),
    ({"budget": [8, 9, 9]}, ValueError, r"budget has shape \[3\], expected \[2\]"),
    ({"budget": 2}, ValueError,
     r"budget is 2 for kv head 0, expected at least 3 \(sinks 1 and the last 2 tokens never leave\)"),
    ({"budget": 20, "policy": SnapKV(w=20)}, ValueError, r"the last 20 tokens never leave"),
    ({"budget": 2**40}, ValueError, r"and at most 536870911"),
    ({"budget": [8, 9], "policy": TOVA()}, ValueError, r"budget differs between kv heads"),
    ({"every": 0}, ValueError, r"every is 0, expected 1 to 536870911"),
    ({"chunk": 0}, ValueError, r"chunk is 0, expected 1 to"),
    ({"log": -1}, ValueError, r"log is -1, expected 0 to"),
    ({"sinks": -1}, ValueError, r"sinks is -1, expected 0 to"),
    ({"recent": 2.0}, TypeError, r"recent is float, expected an int"),
    ({"recent": -3}, ValueError, r"recent is -3, expected 0 to"),
    ({"every": 2**70}, ValueError, r"every does not fit 64 bits"),
    ({"batch": 0}, ValueError, r"batch is 0, expected 1 to"),
    ({"heads": 0}, ValueError, r"kv_heads is 0, expected 1 to"),
    ({"depth": 300}, ValueError, r"head_dim is 300, expected 1 to 256"),
    ({"v_head_dim": 0}, ValueError, r"v_head_dim is 0, expected 1 to 256"),
    ({"dtype": "int8"}, TypeError, r"dtype is 'int8'"),
    ({"batch": 2**31 - 1, "budget": 2**29 - 1, "policy": Scissorhands(4096)}, ValueError,
     r"the cache has shape .*, whose size does not fit 52 bits"),
    ({"policy": Scissorhands(0)}, ValueError, r"the window of Scissorhands is 0, expected 1 to 4096"),
    ({"policy": SnapKV(w=2, kernel=4)}, ValueError, r"the kernel of SnapKV is 4, expected an odd"),
    ({"policy": CUR(5000)}, ValueError, r"the window of CUR is 5000"),
    ({"policy": H2OEMA(1.5)}, ValueError, r"the lam of H2OEMA is 1.5, expected 0 to 1"),
])
def test_construction(keywords, error, match):
    with pytest.raises(error, match=r"KVCache\(\): .*" + match):
        make(**keywords)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: SnapKV(pool="sum"), ValueError, r"SnapKV\(\): pool is 'sum', expected 'avg' or 'max'"),
    (lambda: SnapKV(w=True), TypeError, r"SnapKV\(\): w is bool, expected an int"),
    (lambda: H2OEMA("x"), TypeError, r"H2OEMA\(\): lam is str, expected a number"),
    (lambda: Custom(3), TypeError, r"Custom\(\): fn is int, expected a function"),
    (lambda: setattr(Random(), "seed", 3), AttributeError, r"Random is immutable"),
    (lambda: pyramid(0, 8), ValueError, r"pyramid\(\): layers is 0, budget 8"),
    (lambda: pyramid(3, 8, reserved=9), ValueError, r"reserved 9, expected at least 1 layer"),
    (lambda: pyramid(3, 8, beta=0.5), ValueError, r"pyramid\(\): beta is 0.5, expected at least 1"),
    (lambda: pickle.dumps(make()), TypeError, r"KVCache is not pickled: save state_dict\(\)"),
    (lambda: make()._core.attend(X), TypeError, r"KVCache.attend takes 14 arguments, got 1"),
    (lambda: make()._core.reset(b""), ValueError, r"reset\(\): expected one flag for each row"),
    (lambda: make()._core.load(b""), ValueError, r"the blocks of a state do not have the sizes"),
    (lambda: make()._core.kept(0, 2), IndexError, r"row or head is out of range"),
    (lambda: make()._core.ledger(-1, 0), IndexError, r"row or head is out of range"),
    (lambda: make().crop(None), TypeError, r"crop\(\): n is None, expected an int"),
    (lambda: make().reorder([[0]]), ValueError, r"reorder\(\): index has another rank"),
    (lambda: make().reorder([1]), ValueError, r"reorder\(\): index\[0\] is 1, expected 0 to 0"),
    (lambda: make().reorder([0, 0]), ValueError, r"reorder\(\): index has 2 entries, expected 1"),
    (lambda: type(make()._core)(1, 2, 8, 8, 0, 0, 1, 1, 0, b"", 0.0, ("H2O", 0, 0, False, 0.0, 0),
                                True, "float32", b"", 1.0, False, False, False), ValueError,
     r"KVCache\(\): budget has 0 entries, expected 2 \(kv_heads\)"),
])
def test_other_calls(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(("q", "keywords", "error", "match"), [
    (X[:, :, :3], {}, ValueError, r"q has 3 tokens, expected 5"),
    (X.astype(np.float16), {}, TypeError, r"k is float32, expected float16"),
    (X, {"new_lengths": [6]}, ValueError, r"new_lengths\[0\] is 6, expected 0 to 5"),
    (X, {"sink_bias": np.zeros((2, 3))}, ValueError, r"sink_bias has shape \[2, 3\]"),
    (X, {"scale": "x"}, TypeError, r"scale is str"),
])
def test_refused_calls_change_nothing(q, keywords, error, match):
    cache = filled()
    before = cache.state_dict()
    with pytest.raises(error, match=r"KVCache.attend\(\): " + match):
        cache.attend(q, X, X, **keywords)
    after = cache.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tokens", [0, 12])
@pytest.mark.parametrize(("answer", "error", "match"), [
    (lambda n: np.full(n, np.nan), ValueError, r"Custom\(\): the score of position 0 is NaN"),
    (lambda n: np.zeros(n + 1), ValueError, r"Custom\(\): the scores have another shape, expected"),
    (lambda n: 1 / 0, ZeroDivisionError, r"division by zero"),
    (lambda n: "x", ValueError, r"could not convert"),
])
def test_a_custom_policy_that_fails_ends_the_call(tokens, answer, error, match):
    """In the second part of the second kv head too: what the parts before had changed is undone."""
    calls = []

    def fn(row, head, positions, mass, keys, values):
        calls.append(head)
        return answer(len(positions)) if len(calls) == fail else np.zeros(len(positions))

    fail = 0
    cache = make(policy=Custom(fn), chunk=4)
    cache.attend(*[np.tile(X, (1, 1, 3, 1))[:, :, :tokens]] * 3)
    before, calls[:] = cache.state_dict(), []
    for fail in (1, 4):
        calls.clear()
        with pytest.raises(error, match=match):
            cache.attend(*[np.tile(X, (1, 1, 2, 1))] * 3)
        after = cache.state_dict()
        assert all(np.array_equal(before[name], after[name]) for name in before if tokens)
        assert cache.length.tolist() == [tokens] and len(calls) == fail
    fail = 0
    cache.attend(X, X, X)
    assert cache.length.tolist() == [tokens + 5]


def test_a_cache_is_used_by_one_call_at_a_time():
    seen = []

    def fn(row, head, positions, mass, keys, values):
        for call in (lambda: cache.attend(X, X, X), cache.kept, cache.copy, cache.reset,
                     lambda: cache.crop(0), lambda: cache.reorder([0]), cache.state_dict,
                     lambda: cache.length, lambda: cache._core.slots,
                     lambda: cache._core.load(*[b""] * 11)):
            with pytest.raises(RuntimeError, match="KVCache is in use by another call"):
                call()
            seen.append(head)
        return np.zeros(len(positions))

    cache = make(policy=Custom(fn))
    cache.attend(X, X, X)
    assert seen == [0] * 10 + [1] * 10


def change(name, place, value, dtype=np.int64):
    def run(state):
        numbers = state[name].view(dtype)
        numbers[place] = value
    return run


@pytest.mark.parametrize(("spoil", "match"), [
    (lambda s: s.pop("keys"), r"keys is missing"),
    (lambda s: s.update(policy=np.str_("H2O()")), r"policy is H2O\(\), expected KNorm\(\)"),
    (lambda s: s.update(keys=s["keys"][1:]), r"block 0 has 639 bytes, expected 640"),
    (lambda s: s.update(slots=np.array([10, 2**40])), r"slots\[1\] is 1099511627776, expected"),
    (lambda s: s.update(slots=np.array([7, 10])), r"slots\[0\] is 7, expected 10 to 10"),
    (change("held", 0, -1), r"held\[0, 0\] is -1, expected 0 to 10"),
    (change("held", 1, 11), r"held\[0, 1\] is 11, expected 0 to 10"),
    (change("held", 1, 2), r"held is less than the tokens that never leave"),
    (change("length", 0, -4), r"length\[0\] is -4, expected 0 to 2\^60"),
    (change("length", 0, 2**62), r"length\[0\] is 4611686018427387904"),
    (change("evicted_at", 0, 21), r"evicted_at\[0\] is 21, expected 0 to 20"),
    (change("evicted_at", 0, 10), r"what came since evicted_at is not in the last slots"),
    (change("token_positions", 5, -7), r"positions are not distinct numbers below length"),
    (change("token_positions", 4, 0), r"positions are not distinct|the pinned tokens are not"),
    (change("token_positions", slice(0, 2), [5, 0]), r"the pinned tokens are not in the first slots"),
    (change("ledger", 0, 3), r"the ledger does not add up"),
    (change("ledger", 1, -3), r"the ledger does not add up"),
    (change("ledger", 7, 10**9), r"the ledger does not add up"),
])
def test_states_are_untrusted(spoil, match):
    cache = filled(policy=KNorm(), every=3)
    state = cache.state_dict()
    good = copy.deepcopy(state)
    spoil(state)
    with pytest.raises(ValueError, match=r"load_state_dict\(\): .*" + match):
        cache.load_state_dict(state)
    after = cache.state_dict()
    assert all(np.array_equal(good[name], after[name]) for name in good)
    cache.load_state_dict(good)


def test_the_most_recent_tokens_are_part_of_a_state():
    cache = filled(policy=KNorm())
    state = cache.state_dict()
    positions = state["token_positions"].view(np.int64)
    gone = (set(range(20)) - set(positions[:8].tolist())).pop()
    positions[np.flatnonzero(positions[:8] == 19)] = gone
    with pytest.raises(ValueError, match="the most recent tokens are not all held"):
        cache.load_state_dict(state)


def test_the_heads_of_tova_hold_the_same():
    cache = filled(policy=TOVA())
    state = cache.state_dict()
    positions = state["token_positions"].view(np.int64)
    assert positions[:8].tolist() == positions[8:].tolist()
    gone = (set(range(18)) - set(positions[:8].tolist())).pop()
    middle = np.flatnonzero((positions[:8] > 0) & (positions[:8] < 18))[0]
    positions[middle] = gone
    with pytest.raises(ValueError, match="kv head 1: TOVA keeps one set for all heads"):
        cache.load_state_dict(state)


def test_the_end_of_the_countable_positions():
    cache = make(policy=KNorm(), recent=0, sinks=0, every=1)
    state = cache.state_dict()
    state["length"].view(np.int64)[0] = 2**60 - 1
    state["evicted_at"].view(np.int64)[0] = 2**60 - 1
    state["ledger"].view(np.int64)[[0, 68]] = 2**60 - 2
    state["held"].view(np.int64)[:] = 1
    cache.load_state_dict(state)
    assert cache.ledger.heads[0][0].forgotten == [(1, 2**60 - 1)]
    cache.attend(X[:, :, :0], X[:, :, :0], X[:, :, :0])
    with pytest.raises(ValueError, match=r"row 0 is at the end of the countable positions"):
        cache.attend(X, X, X)
