"""Each measure of arrays against its sum written out, in Python floats."""

import itertools
import math

import numpy as np
import pytest

from sinkattn import SinkCache, measure

random = np.random.default_rng(5)


def weights_written_out(q, k, scale, sink):
    batch, heads_q, queries, _ = q.shape
    heads, keys = k.shape[1], k.shape[2]
    found = np.zeros((batch, heads_q, queries, keys))
    for b, h, i in np.ndindex(batch, heads_q, queries):
        last = keys - queries + i
        powers = [math.exp(scale * float(q[b, h, i] @ k[b, h * heads // heads_q, j])) for j in range(last + 1)]
        total = sum(powers) + (math.exp(sink[h]) if sink is not None else 0)
        found[b, h, i, :last + 1] = [power / total for power in powers]
    return found


@pytest.mark.parametrize("queries, scale, sink", [(5, None, None), (2, 0.3, [0.5, -1.0, 2.0, -np.inf])])
def test_weights(queries, scale, sink):
    q, k = random.standard_normal((2, 4, queries, 8)), random.standard_normal((2, 2, 5, 8))
    found = measure.weights(q, k, scale=scale, sink_logits=sink)
    np.testing.assert_allclose(found, weights_written_out(q, k, scale or 8**-0.5, sink), rtol=1e-12)


def test_huge_scores_do_not_overflow():
    q = np.full((1, 1, 1, 4), 1e4)
    k = np.stack([q[0, 0, 0], -q[0, 0, 0]])[None, None]
    np.testing.assert_array_equal(measure.weights(q, k)[0, 0, 0], [1, 0])


def test_what_is_lost_kept_and_on_the_sinks():
    """Nested loops over a random mask; ties of weight go to the newer key."""
    weights = random.integers(0, 6, (3, 2, 9)) / 10.0
    kept = random.random((3, 2, 9)) < 0.5
    loss, top, sinks = (measure.attention_loss(weights, kept), measure.top_keys(weights, kept, 4),
                        measure.sink_mass(weights, 3))
    for place in np.ndindex(3, 2):
        w, held = weights[place].tolist(), kept[place]
        assert loss[place] == pytest.approx(sum(x for x, here in zip(w, held) if not here))
        heaviest = sorted(range(9), key=lambda j: (w[j], j))[-4:]
        assert top[place] == sum(held[j] for j in heaviest) / 4
        assert sinks[place] == pytest.approx(w[0] + w[1] + w[2])


def test_the_least_that_can_be_lost():
    """The smallest loss of all sets of so many keys, by trying them all."""
    weights, counts = random.random((2, 3, 6)), np.array([[0, 2, 3], [5, 6, 6]])
    found = measure.least_loss(weights, counts)
    for place in np.ndindex(2, 3):
        losses = [weights[place].sum() - weights[place][list(held)].sum()
                  for held in itertools.combinations(range(6), counts[place])]
        assert found[place] == pytest.approx(min(losses))


def test_output_error():
    out, full = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(measure.output_error(out, full), [0.75, np.inf, 0])


def test_kept_mask_of_both_kinds_of_cache():
    cache = SinkCache(2, 3, 4, sinks=1, window=2)
    x = np.ones((2, 3, 5, 4), np.float32)
    cache.attend(x, x, x, new_lengths=[5, 0])
    mask = measure.kept_mask(cache.kept(), 3, 5)
    np.testing.assert_array_equal(mask[0], [[True, False, False, True, True]] * 3)
    assert not mask[1].any()
    ragged = measure.kept_mask([[np.array([0, 2]), np.array([1])]], 2, 3)
    np.testing.assert_array_equal(ragged[0], [[True, False, True], [False, True, False]])


@pytest.mark.parametrize("call, error, words", [
    (lambda: measure.weights(np.ones((1, 2, 3)), np.ones((1, 2, 3, 4))), ValueError, "3 and 4 axes, expected 4"),
    (lambda: measure.weights(np.ones((1, 3, 2, 4)), np.ones((1, 2, 3, 4))), ValueError, "a divisor of 3"),
    (lambda: measure.weights(np.ones((1, 1, 4, 4)), np.ones((1, 1, 3, 4))), ValueError, "4 queries, expected at most the 3"),
    (lambda: measure.attention_loss([0.5, 0.5], [1, 0]), TypeError, "kept has dtype int64, expected bool"),
    (lambda: measure.attention_loss([0.5, 0.5], [True] * 3), ValueError, r"kept has shape \[3\]"),
    (lambda: measure.top_keys([0.5], [True], 0), ValueError, "count is 0"),
    (lambda: measure.least_loss([0.5], -1), ValueError, "counts are expected to be ints"),
    (lambda: measure.sink_mass([0.5], -1), ValueError, "sinks is -1"),
    (lambda: measure.output_error([1.0], [1.0, 2.0]), ValueError, r"out has shape \[1\]"),
    (lambda: measure.kept_mask([[[0], [1]]], 3, 2), ValueError, "a row of 2 heads, expected 3"),
    (lambda: measure.kept_mask([[0, 7]], 1, 7), ValueError, "outside 0 to 6"),
])
def test_bad_arrays_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
