"""The identities of the contract, and what other implementations got wrong."""

import numpy as np
import pytest
from oracle import check_attend, normal
from tolerance import assert_close, assert_lse_close, relative_error

from sinkattn import attend, merge, reference


@pytest.fixture
def qkv():
    random = np.random.default_rng(0)
    return normal(random, 1, 4, 60, 64), normal(random, 1, 2, 90, 64), normal(random, 1, 2, 90, 64)


@pytest.mark.parametrize("sink", [-100.0, -5.0, 0.0, 20.0, 100.0])
def test_sink_logit_never_overflows(sink, qkv, table):
    """The sink belongs to the running maximum: leaving it out overflows from about 88 on."""
    check_attend(*qkv, sink_logits=sink)


def test_sink_of_minus_infinity_is_no_sink(qkv, table):
    np.testing.assert_array_equal(attend(*qkv, sink_logits=-np.inf), attend(*qkv))


def test_sink_of_plus_infinity_takes_all(qkv, table):
    out, lse, mass = attend(*qkv, sink_logits=np.inf, return_lse=True, return_mass=True)
    assert (out == 0).all() and (lse == np.inf).all() and (mass == 0).all()


@pytest.mark.parametrize("n", [1, 4, 100])
def test_null_keys_equal_a_sink_logit(n, qkv, table):
    """n all-zero K/V rows == sink_logits = log n; softmax-off-by-one is n = 1."""
    q, k, v = qkv
    zeros = np.zeros((2, n, 64), np.float32)
    assert_close(attend(q, k, v, sink_kv=(zeros, zeros)), reference.attend(q, k, v,
                 sink_logits=np.log(n)))
    assert_close(attend(q, k, v, sink_logits=np.log(n)), reference.attend(q, k, v,
                 sink_kv=(zeros, zeros)))


def test_null_embeddings_equal_a_sink_logit_in_every_layer(table):
    """Identity 2: n zero embeddings before the text of a bias-free pre-norm transformer."""
    random = np.random.default_rng(1)
    width, n = 32, 4
    layers = [[random.standard_normal((width, width)).astype(np.float32) / 6 for _ in range(5)]
              for _ in range(3)]

    def norm(x):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    def forward(x, **keywords):
        for wq, wk, wv, wo, up in layers:
            q, k, v = ((norm(x) @ w).reshape(1, -1, 2, 16).transpose(0, 2, 1, 3)
                       for w in (wq, wk, wv))
            position = np.arange(len(x)) - len(x)
            rope = type("rope", (), {"inv_freq": 0.3 ** np.arange(8), "interleaved": False,
                                     "attention_scaling": 1.0})
            q, k = (reference.rotate(y, position, rope).astype(np.float32) for y in (q, k))
            x = x + attend(q, k, v, **keywords).transpose(0, 2, 1, 3).reshape(-1, width) @ wo
            x = x + np.maximum(norm(x) @ up, 0)
        return x

    text = random.standard_normal((40, width)).astype(np.float32)
    with_nulls = forward(np.concatenate([np.zeros((n, width), np.float32), text]))
    assert_close(forward(text, sink_logits=np.log(n)), with_nulls[n:], 1e-5)


def test_bias_of_minus_infinity_removes_the_column(qkv, table):
    """Here the first key is removed for all heads; -1e4 does likewise for rows that see more."""
    q, k, v = qkv
    bias = np.zeros((4, 1))
    expected = attend(q, k[:, :, 1:], v[:, :, 1:])
    for value in (-np.inf, -1e4):
        bias[:] = value
        assert_close(attend(q, k, v, sinks=1, sink_bias=bias), expected)


def test_a_bias_is_not_a_sink_logit(qkv, table):
    """The biased column keeps its value; passing a bias as a logit is another operation."""
    q, k, v = qkv
    biased = attend(q, k, v, sinks=1, sink_bias=np.full((4, 1), 3.0))
    assert relative_error(attend(q, k, v, sink_logits=3.0), biased) > 0.1


def test_a_wide_window_is_no_window(qkv, table):
    """To rounding: pinned keys are a block of their own."""
    np.testing.assert_array_equal(attend(*qkv, window=90), attend(*qkv))
    assert_close(attend(*qkv, window=10**15, sinks=5), attend(*qkv), 1e-6)


@pytest.mark.parametrize("cuts", [[0, 90], [0, 1, 90], [0, 30, 31, 64, 90],
                                  list(range(0, 91, 5))])
def test_split_keys_merge_to_the_whole(cuts, qkv, table):
    """The sink logit is counted once, whatever the number of parts."""
    q, k, v = qkv
    parts = [attend(q, k[:, :, a:b], v[:, :, a:b], causal=False, return_lse=True,
                    sink_logits=1.0 if a == 0 else None) for a, b in zip(cuts, cuts[1:])]
    out, lse = merge(*zip(*parts))
    expected = reference.attend(q, k, v, causal=False, sink_logits=1.0, return_lse=True)
    assert_close(out, expected[0])
    assert_lse_close(lse, expected[1])


def test_the_reference_merges_too():
    """Split keys, joined in float64, are the unsplit call."""
    random = np.random.default_rng(5)
    q, k, v = (random.standard_normal((1, 2, n, 8)) for n in (3, 40, 40))
    parts = [reference.attend(q, k[:, :, a:b], v[:, :, a:b], causal=False, return_lse=True, sink_logits=logits)
             for a, b, logits in ((0, 13, 0.5), (13, 14, None), (14, 40, None))]
    whole = reference.attend(q, k, v, causal=False, return_lse=True, sink_logits=0.5)
    for joined, expected in zip(reference.merge(*zip(*parts)), whole):
        np.testing.assert_allclose(joined, expected, rtol=1e-12)


def test_merge_ignores_a_part_that_saw_nothing(device):
    out = np.ones((2, 3), np.float32)
    nothing = np.full((2, 3), np.nan, np.float32), np.full(2, -np.inf, np.float32)
    got, lse = merge([out, nothing[0]], [np.zeros(2, np.float32), nothing[1]])
    np.testing.assert_array_equal(got, out)
    np.testing.assert_array_equal(lse, 0)
    got, lse = merge([nothing[0]], [nothing[1]])
    assert (got == 0).all() and (lse == -np.inf).all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_scores_do_not_overflow(size, table):
    random = np.random.default_rng(2)
    q = normal(random, 1, 2, 20, 16)
    k = normal(random, 1, 1, 30, 16)
    out = attend(q, k, k, scale=size)
    assert np.isfinite(out).all()
    exact = attend(np.round(q), np.round(k), np.round(k), scale=size)
    assert_close(exact, reference.attend(np.round(q), np.round(k), np.round(k), scale=size))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("queries", [1, 5, 40])
def test_unseen_keys_never_reach_the_output(poison, queries, table):
    """Padding and what lies outside every window may hold anything."""
    random = np.random.default_rng(3)
    q, k, v = (normal(random, 2, h, n, 64) for h, n in ((4, queries), (2, 200), (2, 200)))
    for keywords in ({"window": 10, "sinks": 3}, {"window": 10},
                     {"starts": [7, 70], "lengths": [150, 130], "sinks": 2, "window": 33}):
        starts, lengths = keywords.get("starts", [0, 0]), keywords.get("lengths", [200, 200])
        dirty_k, dirty_v = k.copy(), v.copy()
        for b in range(2):
            unseen = np.ones(200, bool)
            end = starts[b] + lengths[b]
            first_seen = end - queries - keywords["window"] + 1
            unseen[max(first_seen, starts[b]):end] = False
            unseen[starts[b]:starts[b] + keywords.get("sinks", 0)] = False
            dirty_k[b][:, unseen] = dirty_v[b][:, unseen] = poison
        for clean, dirty in zip(attend(q, k, v, return_lse=True, return_mass=True, **keywords),
                                attend(q, dirty_k, dirty_v, return_lse=True, return_mass=True,
                                       **keywords)):
            np.testing.assert_array_equal(clean, dirty)


def test_pinned_tokens_stay_causal(table):
    """Query i < S sees the pinned tokens up to itself."""
    random = np.random.default_rng(4)
    q, v = normal(random, 1, 1, 8, 16), normal(random, 1, 1, 8, 16)
    out = attend(q, q, v, window=1, sinks=8)
    np.testing.assert_allclose(out[0, 0, 0], v[0, 0, 0], rtol=1e-6)
    assert_close(out, reference.attend(q, q, v))


def test_a_window_counts_the_query_itself(table):
    random = np.random.default_rng(5)
    q, k, v = (normal(random, 1, 1, 30, 16) for _ in range(3))
    np.testing.assert_allclose(attend(q, k, v, window=1), v, rtol=1e-6)
    two = attend(q[:, :, -1:], k[:, :, -2:], v[:, :, -2:])
    np.testing.assert_allclose(attend(q, k, v, window=2)[:, :, -1:], two, rtol=1e-5)


def test_the_last_query_stands_at_the_last_key(table):
    """Bottom-right alignment: one query sees all keys, and a chunk continues what came before."""
    random = np.random.default_rng(6)
    q, k, v = (normal(random, 1, 2, 50, 32) for _ in range(3))
    whole = attend(q, k, v)
    assert_close(attend(q[:, :, -1:], k, v), whole[:, :, -1:])
    assert_close(attend(q[:, :, 30:40], k[:, :, :40], v[:, :, :40]), whole[:, :, 30:40])


def test_rows_that_see_nothing(table):
    """Queries before the first key: out 0, lse the sink, or -inf without one."""
    random = np.random.default_rng(7)
    q, k = normal(random, 1, 2, 10, 16), normal(random, 1, 1, 4, 16)
    out, lse, mass = check_attend(q, k, k, sink_logits=[2.0, -np.inf])
    assert (out[:, :, :6] == 0).all()
    np.testing.assert_allclose(lse[:, 0, :6], 2.0)
    assert (lse[:, 1, :6] == -np.inf).all()


def test_several_sinks_are_one_log_sum_exp(qkv, table):
    logits = np.random.default_rng(8).standard_normal((4, 5))
    np.testing.assert_allclose(attend(*qkv, sink_logits=logits),
                               attend(*qkv, sink_logits=np.log(np.exp(logits).sum(1))), rtol=1e-5,
                               atol=1e-6)


def test_sink_logits_are_neither_scaled_nor_capped(qkv, table):
    """Natural log units: the sink's share is exp(sigma - lse) whatever scale and softcap are."""
    q, k, v = qkv
    out, lse = attend(q, k, v, scale=0.01, softcap=0.5, sink_logits=2.0, return_lse=True)
    bare, bare_lse = attend(q, k, v, scale=0.01, softcap=0.5, return_lse=True)
    np.testing.assert_allclose(lse, np.logaddexp(bare_lse, 2.0), rtol=1e-5)
    assert_close(out, bare * np.exp(bare_lse - lse)[..., None], 1e-5)


@pytest.mark.parametrize("sink", [None, 0.0, 3.0, -np.inf])
def test_mass_and_sink_share_add_up_to_the_rows(sink, table):
    """Mass over keys + weight of sink_kv + share of the logits = rows with lse > -inf."""
    random = np.random.default_rng(9)
    q, k, v = (normal(random, 2, h, n, 32) for h, n in ((4, 45), (2, 30), (2, 30)))
    out, lse, mass = attend(q, k, v, window=7, sinks=2, sink_logits=sink, return_lse=True,
                            return_mass=True)
    seen = lse > -np.inf
    logit = -np.inf if sink is None else sink
    share = np.where(seen, np.exp(logit - np.where(seen, lse, 0)), 0)
    per_group = (np.where(seen, 1 - share, 0)).reshape(2, 2, 2, 45).mean(2).sum(-1)
    np.testing.assert_allclose(mass.sum(-1), per_group, rtol=1e-5)
