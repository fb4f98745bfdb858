"""KVCache against its definition: outputs, kept sets, guards, ledger, and everything beside a call."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import dtype_of
from statement import Model, held_at
from tolerance import HALF_RELATIVE, assert_close, assert_lse_close

from sinkattn import KVCache, Ledger, Rope, get_num_threads, pyramid, set_num_threads
from sinkattn.policy import (
    H2O,
    TOVA,
    Custom,
    H2ONorm,
    KNorm,
    Random,
    Scissorhands,
    SinkWindow,
    SnapKV,
)

FREE = [SinkWindow(), KNorm(), Random(5)]   # judged by what no rounding touches
MASS = [H2O(), H2ONorm(), TOVA(), SnapKV(w=3, kernel=3), Scissorhands(4)]


def normal(random, *shape, dtype="float32"):
    return random.standard_normal(shape).astype(dtype_of(dtype))


def lists(kept):
    return [[positions.tolist() for positions in row] for row in kept]


def stream(random, cache_shape, group, tokens, dtype="float32"):
    batch, heads, depth, depth_v = cache_shape
    return (normal(random, batch, heads * group, tokens, depth, dtype=dtype),
            normal(random, batch, heads, tokens, depth, dtype=dtype),
            normal(random, batch, heads, tokens, depth_v, dtype=dtype))


@st.composite
def caches(draw):
    """(batch, heads, depth, depth_v), group, keywords of KVCache and of attend."""
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    shape = draw(st.integers(1, 2)), heads, draw(st.sampled_from([4, 8, 15, 32])), \
        draw(st.sampled_from([4, 16, 33]))
    sinks, recent = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    least = max(sinks + recent, 1)
    budget = draw(st.integers(least, least + 30) | st.floats(0.05, 1.0))
    if draw(st.booleans()) and isinstance(budget, int):
        budget = [budget + draw(st.integers(0, 9)) for _ in range(heads)]
    rope = draw(st.none() | st.just(Rope.from_theta(shape[2] // 2 * 2 if shape[2] > 4 else 4)))
    making = {"policy": draw(st.sampled_from(FREE)), "budget": budget, "sinks": sinks,
              "recent": recent, "every": draw(st.sampled_from([1, 1, 2, 7])),
              "chunk": draw(st.sampled_from([1, 5, 16, 128])), "rope": rope,
              "positions": draw(st.sampled_from(["original", "slot"]))}
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    q_heads = heads * group
    choices = {
        "sink_logits": normal(random, q_heads, 2),
        "sink_bias": normal(random, q_heads, sinks) if sinks else None,
        "sink_kv": (normal(random, heads, 2, shape[2]), normal(random, heads, 2, shape[3])),
        "scale": 0.3, "softcap": 5.0, "alibi_slopes": abs(normal(random, q_heads)) / 16,
    }
    given = {name: value for name, value in choices.items()
             if value is not None and draw(st.booleans())}
    return shape, group, making, given, random


def check_ledger(cache):
    """Kept and forgotten together are what was seen, for every row and head."""
    ledger = cache.ledger
    assert Ledger.from_json(ledger.to_json()) == ledger and ledger.nbytes == cache.nbytes
    for heads, kept in zip(ledger.heads, cache.kept()):
        for head, positions in zip(heads, kept):
            gone = [p for begin, end in head.forgotten for p in range(begin, end)]
            assert sorted(gone + positions.tolist()) == list(range(head.seen))
            assert head.evicted == len(gone) and head.kept == len(positions)
            assert len(head.departures) == min(head.evicted, 64)


@given(cache=caches(), cuts=st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 9, 40]), min_size=1,
                                     max_size=6), data=st.data())
def test_any_stream_is_its_definition(cache, cuts, data, table):
    """Rows of lengths of their own; what is not a real token may hold anything and stays out."""
    shape, group, making, keywords, random = cache
    if table.startswith("cuda"):
        making["budget"] = 16 if isinstance(making["budget"], float) else making["budget"]
        making["positions"] = "original" if making["rope"] else making["positions"]
        keywords.pop("alibi_slopes", None)  # what the CPU alone has
    ours = KVCache(shape[0], shape[1], shape[2], v_head_dim=shape[3], **making)
    models = [Model(shape[1], row=row, **making) for row in range(shape[0])]
    sinks, recent = making["sinks"], making["recent"]
    for tokens in cuts:
        q, k, v = stream(random, shape, group, tokens)
        new = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=shape[0],
                                             max_size=shape[0]))
        for row, count in enumerate(new or []):
            for x in (q, k, v):
                x[row, :, count:] = np.nan
        out, lse = ours.attend(q, k, v, new_lengths=new, return_lse=True, **keywords)
        kept = lists(ours.kept())
        for row, model in enumerate(models):
            count = tokens if new is None else new[row]
            expected = model.attend(*(x[row, :, :count] for x in (q, k, v)), **keywords)
            assert_close(out[row, :, :count], expected[0], 1e-5)
            assert_lse_close(lse[row, :, :count], expected[1], 2e-5)
            assert (out[row, :, count:] == 0).all() and (lse[row, :, count:] == -np.inf).all()
            assert kept[row] == model.kept()
            for positions in kept[row]:
                t = model.length
                assert set(range(min(sinks, t))) | set(range(max(t - recent, 0), t)) <= \
                    set(positions)
    check_ledger(ours)


@given(policy=st.sampled_from(MASS), seed=st.integers(0, 2**20), every=st.integers(1, 3),
       sinks=st.integers(0, 3), recent=st.integers(0, 5), spare=st.integers(0, 8))
def test_guards_and_budget_hold_for_scored_policies(policy, seed, every, sinks, recent, spare):
    random = np.random.default_rng(seed)
    budget = max(sinks + max(recent, policy.protects), 1) + spare
    cache = KVCache(1, 2, 4, policy=policy, budget=budget, sinks=sinks, recent=recent, every=every,
                    chunk=7, log=1)
    constant = cache.nbytes
    for tokens in random.integers(0, 12, 6):
        cache.attend(*stream(random, (1, 2, 4, 4), 2, int(tokens)))
        seen = int(cache.length[0])
        for positions in cache.kept()[0]:
            assert len(positions) == held_at(budget, every, seen)
            assert set(range(min(sinks, seen))) <= set(positions.tolist())
            assert set(range(max(seen - max(recent, policy.protects), 0), seen)) <= \
                set(positions.tolist())
    assert cache.nbytes == constant


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("policy", MASS, ids=repr)
def test_scored_policies_attend_to_what_they_kept(policy, dtype, table):
    random = np.random.default_rng(3)
    cache = KVCache(1, 2, 16, policy=policy, budget=40, sinks=2, recent=8, chunk=32, dtype=dtype)
    every_k = np.empty((1, 2, 0, 16))
    every_v = every_k
    for tokens in (70, 1, 1, 20):
        q, k, v = stream(random, (1, 2, 16, 16), 4, tokens, dtype)
        for first in range(0, tokens, 32):
            kept = cache.kept()[0]
            part = [x[:, :, first:first + 32] for x in (q, k, v)]
            every_k, every_v = (np.concatenate([whole, x.astype(np.float64)], axis=2)
                                for whole, x in zip((every_k, every_v), part[1:]))
            out = cache.attend(*part)
            new = np.arange(every_k.shape[2] - part[0].shape[2], every_k.shape[2])
            for g in range(2):
                seen = np.concatenate([kept[g], new])
                bare = Model(1, SinkWindow(), budget=10**6, sinks=0, recent=0)
                bare.tokens[0] = {int(p): (every_k[0, g, p], every_v[0, g, p]) for p in kept[g]}
                bare.length = new[0]
                expected, _ = bare.attend(part[0][0, 4 * g:4 * g + 4].astype(np.float64),
                                          every_k[:, g, new], every_v[:, g, new])
                assert len(seen) == len(kept[g]) + len(new)
                assert_close(out[0, 4 * g:4 * g + 4], expected, HALF_RELATIVE.get(dtype, 1e-5))


def test_mass_of_a_call_is_what_the_kept_received():
    """In the order of kept(), whatever slots they lie in; over all parts of the call."""
    random = np.random.default_rng(4)
    seen = []

    def fn(row, head, positions, mass, keys, values):
        seen.append((head, positions, mass.sum(axis=0, dtype=np.float64)))
        return random.standard_normal(len(positions))

    cache = KVCache(1, 2, 8, policy=Custom(fn), budget=12, sinks=1, recent=2, chunk=5)
    for tokens in (9, 1, 17):
        seen.clear()
        _, mass = cache.attend(*stream(random, (1, 2, 8, 8), 2, tokens), return_mass=True)
        for g, positions in enumerate(cache.kept()[0]):
            expected = [sum(m[list(p).index(j)] for head, p, m in seen if head == g and j in p)
                        for j in positions]
            assert np.allclose(mass[0, g, :len(positions)], expected, rtol=1e-6)
            assert (mass[0, g, len(positions):] == 0).all()


def test_ledger_knows_the_mass_that_left():
    random = np.random.default_rng(5)
    total, gone = {}, []

    def fn(row, head, positions, mass, keys, values):
        for p, m in zip(positions.tolist(), mass.astype(np.float64).T):
            total[p] = total.get(p, 0.0) + m.sum()
        return random.standard_normal(len(positions))

    cache = KVCache(1, 1, 8, policy=Custom(fn), budget=10, sinks=1, recent=2, chunk=4, log=1000)
    for tokens in (3, 30, 1, 1, 8):
        before = set(range(int(cache.length[0]))) - set(cache.kept()[0][0].tolist())
        cache.attend(*stream(random, (1, 1, 8, 8), 2, tokens))
        after = set(range(int(cache.length[0]))) - set(cache.kept()[0][0].tolist())
        gone += [(p, total[p]) for p in after - before] if tokens == 1 else []
    head = cache.ledger.heads[0][0]
    log = {p: m for p, _, m in head.departures}
    assert len(log) == head.evicted == head.seen - head.kept
    assert all(np.isclose(log[p], m, rtol=1e-6) for p, m in gone) and gone
    assert np.isclose(sum(log.values()), head.mass) and max(log.values()) == head.largest
    counts = np.bincount(np.clip(np.floor(np.log2(list(log.values()))) + 48, 0, 63).astype(int),
                         minlength=64)
    assert counts.tolist() == head.histogram
    quiet = KVCache(1, 1, 8, policy=KNorm(), budget=4, sinks=0, recent=0, track_mass=False, log=3)
    quiet.attend(*stream(random, (1, 1, 8, 8), 2, 9))
    head = quiet.ledger.heads[0][0]
    assert head.mass is None and head.evicted == 5
    assert len(head.departures) == 3 and all(m is None for _, _, m in head.departures)
    assert Ledger.from_json(quiet.ledger.to_json()) == quiet.ledger


def test_threads_and_companions_do_not_matter():
    """Bit for bit."""
    random = np.random.default_rng(6)
    calls = [stream(random, (3, 2, 16, 16), 4, n) for n in (50, 1, 1, 1, 9)]

    def run(rows):
        cache = KVCache(len(rows), 2, 16, policy=H2O(), budget=30, sinks=2, recent=4, chunk=16)
        return [cache.attend(*(x[rows] for x in call)) for call in calls], lists(cache.kept())

    before = get_num_threads()
    together = run([0, 1, 2])
    set_num_threads(1)
    alone, one = run([0, 1, 2]), run([1])
    set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(together[0], alone[0]))
    assert together[1] == alone[1] and one[1] == together[1][1:2]
    assert all(np.array_equal(a[1:2], b) for a, b in zip(together[0], one[0]))


@pytest.mark.parametrize("budget", [20, 0.3, [17, 25]])
def test_a_stream_resumes_from_its_state(budget, device):
    """copy, state_dict, reorder, reset: all that is seen afterwards is the same."""
    random = np.random.default_rng(7)
    budget = 20 if device != "cpu" and isinstance(budget, float) else budget

    def make():
        return KVCache(2, 2, 8, policy=SnapKV(w=4, kernel=3), budget=budget, sinks=2, recent=3,
                       every=2, chunk=8)

    cache = make()
    for tokens in (23, 1, 60):
        cache.attend(*stream(random, (2, 2, 8, 8), 2, tokens), new_lengths=[tokens, tokens // 2])
    state = cache.state_dict()
    loaded, twin = make(), cache.copy()
    loaded.attend(*stream(random, (2, 2, 8, 8), 2, 90))       # another content, other extents
    loaded.load_state_dict(state)
    swapped = cache.copy()
    swapped.reorder([1, 1])
    call = stream(random, (2, 2, 8, 8), 2, 19)
    out = cache.attend(*call)
    for other in (loaded, twin):
        assert np.array_equal(other.attend(*call), out)
        assert lists(other.kept()) == lists(cache.kept()) and other.ledger == cache.ledger
    assert np.array_equal(swapped.attend(*(x[[1, 1]] for x in call))[0], out[1])
    swapped.reset([0])
    assert lists(swapped.kept())[0] == [[], []] and swapped.length.tolist() == [0, cache.length[1]]
    fresh = make()
    fresh.attend(*stream(random, (2, 2, 8, 8), 2, 33))
    fresh.reset()
    assert np.array_equal(fresh.attend(*call), make().attend(*call))


def test_crop_goes_back_as_far_as_nothing_left(device):
    random = np.random.default_rng(8)
    cache = KVCache(1, 2, 8, policy=KNorm(), budget=10, sinks=1, recent=2, every=6, chunk=64)
    cache.attend(*stream(random, (1, 2, 8, 8), 2, 12))
    kept = lists(cache.kept())
    cache.attend(*stream(random, (1, 2, 8, 8), 2, 5))
    cache.crop(14)
    assert cache.length.tolist() == [14]
    assert lists(cache.kept()) == [[[*positions, 12, 13] for positions in row] for row in kept]
    check_ledger(cache)
    cache.crop(12)
    assert lists(cache.kept()) == kept
    for n in (11, 13, -1):
        with pytest.raises(ValueError, match=r"crop\(\): row 0 has seen 12 tokens and forgot some"):
            cache.crop(n)


def test_pyramid_sums_to_its_budget():
    for layers, budget, beta, reserved in [(1, 9, 20, 0), (32, 1024, 20, 68), (5, 11, 3.5, 2)]:
        budgets = pyramid(layers, budget, beta=beta, reserved=reserved)
        assert sum(budgets) == layers * budget and budgets == sorted(budgets, reverse=True)
        assert min(budgets) >= reserved and len(budgets) == layers
    assert pyramid(3, 7, beta=1) == [7, 7, 7]
    even = pyramid(32, 1024, reserved=68)
    assert even[-1] - 68 == pytest.approx((1024 - 68) / 20, abs=1)
