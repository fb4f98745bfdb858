"""Every policy against its plain statement. SINKATTN_POLICY_STEPS sets how many random steps."""

import os

import numpy as np
import pytest
from statement import Model, held_at, rule_of

from sinkattn import KVCache, Rope
from sinkattn.policy import (
    CUR,
    H2O,
    H2OEMA,
    TOVA,
    Custom,
    ExpectedAttention,
    H2ONorm,
    KeyDiff,
    KNorm,
    Random,
    Scissorhands,
    SinkWindow,
    SnapKV,
    VLengthH2O,
)

STEPS = int(os.environ.get("SINKATTN_POLICY_STEPS", "150"))
POLICIES = [SinkWindow(), H2O(), H2ONorm(), H2OEMA(0.9), VLengthH2O(), Scissorhands(5),
            Scissorhands(70), TOVA(), SnapKV(w=6, kernel=3), SnapKV(w=4, kernel=5, pool="max"),
            KeyDiff(), KNorm(), CUR(4), Random(7)]
CHUNK_FREE = [SinkWindow(), KNorm(), Random(3)]


def stated(policy):
    """The same policy as a Custom one: its statement, fed what the library itself computed."""
    rules = {}

    def fn(row, head, positions, mass, keys, values):
        rule = rules.setdefault((row, head), rule_of(policy, row, head))
        return rule.scores(positions, mass, keys, values)

    return Custom(fn)


def few_bits(random, *shape):
    """Numbers of few bits: equal lengths, equal weights, ties."""
    return random.integers(-2, 3, shape).astype(np.float32) / 2


def lists(kept):
    return [[positions.tolist() for positions in row] for row in kept]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("every", [1, 5])
def test_kept_sets_are_those_of_the_statement(policy, every, seed=0):
    """Fed the same mass, identical at every step, ties included."""
    random = np.random.default_rng([seed, every])
    heads = 1 if isinstance(policy, TOVA) else 2
    made = {"budget": 24, "sinks": 2, "recent": max(5, policy.protects), "every": every,
            "chunk": 16}
    ours = KVCache(2, heads, 8, policy=policy, **made)
    twin = KVCache(2, heads, 8, policy=stated(policy), **made)
    for step in range(STEPS):
        tokens = int(random.choice([1, 1, 1, 1, 2, 7, 16, 37]))
        draw = few_bits if step % 2 else lambda r, *shape: r.standard_normal(shape, np.float32)
        q, k, v = (draw(random, 2, n, tokens, 8) for n in (2 * heads, heads, heads))
        new = random.integers(0, tokens + 1, 2) if step % 3 == 0 else None
        out = [cache.attend(q, k, v, new_lengths=new) for cache in (ours, twin)]
        assert lists(ours.kept()) == lists(twin.kept()), step
        assert np.array_equal(*out)


TURNS = [None, Rope.from_theta(8), Rope.from_theta(6, interleaved=True, attention_scaling=1.2),
         Rope.from_theta(8, applied=True, attention_scaling=1.2)]


@pytest.mark.parametrize(("policy", "rope"), [(policy, None) for policy in POLICIES] + [
    (ExpectedAttention(9), rope) for rope in TURNS], ids=repr)
def test_kept_sets_with_exact_mass(policy, rope, seed=1):
    """Fed the float64 mass the sets are the same: no score here is within rounding of another."""
    random = np.random.default_rng(seed)
    made = {"policy": policy, "budget": 20, "sinks": 1, "recent": 4, "chunk": 8, "rope": rope}
    cache, model = KVCache(1, 2, 8, **made), Model(2, **made)
    for step in range(40):
        q, k, v = (random.standard_normal((1, n, 1 + 9 * (step % 2), 8), np.float32)
                   for n in (4, 2, 2))
        cache.attend(q, k, v)
        model.attend(q[0], k[0], v[0])
        assert lists(cache.kept())[0] == model.kept(), step


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("policy", CHUNK_FREE, ids=repr)
def test_rules_that_do_not_look_at_queries_do_not_see_the_cuts(policy, every):
    random = np.random.default_rng(2)
    x = random.integers(-2, 3, (1, 2, 90, 8)).astype(np.float32)
    kept = []
    for step in (1, 2, 13, 90):
        cache = KVCache(1, 2, 8, policy=policy, budget=17, sinks=2, recent=3, every=every, chunk=11)
        for first in range(0, 90, step):
            cache.attend(*[x[:, :, first:first + step]] * 3)
        kept.append(lists(cache.kept()))
    assert kept[1:] == kept[:-1]
    assert [len(positions) for positions in kept[0][0]] == [held_at(17, every, 90)] * 2
