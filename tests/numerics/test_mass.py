"""mass() against its definition, and against what attend says of itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import normal
from strategies import calls

from sinkattn import _core, attend, get_num_threads, mass, reference, set_num_threads

BESIDE = ("sink_logits", "sink_kv")           # they are in the lse


def split(call):
    """The keywords of mass, and the lse of the whole call."""
    keywords = {name: x for name, x in call.keywords.items() if name not in BESIDE}
    keywords["reduce"] = keywords.pop("mass_reduce")
    keywords["queries"] = keywords.pop("mass_queries")
    _, lse = reference.attend(call.q, call.k, call.v, return_lse=True, **call.keywords)
    return keywords, lse


@given(call=calls(), seed=st.none() | st.integers(0, 99))
def test_any_call_agrees_with_the_definition(call, seed, table):
    """|error| <= 1e-5 mass + 1e-7, whatever the dtype: keys and queries are exact in all of them."""
    keywords, lse = split(call)
    if seed is not None:
        keywords["row_weights"] = np.random.default_rng(seed).uniform(0, 2, lse.shape)
    got = mass(call.q, call.k, lse, **keywords)
    expected = reference.mass(call.q, call.k, lse, **keywords)
    rounding = 1e-6 * np.abs(np.where(np.isfinite(lse), lse, 0)).max(initial=1)    # of lse to float32
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert (np.abs(got - expected) <= (1e-5 + rounding) * expected + 1e-7).all()


@given(call=calls())
def test_it_is_what_attend_returns(call, table):
    """Beside its own lse; and with row weights of one, bit for bit the same."""
    keywords, _ = split(call)
    _, lse, expected = attend(call.q, call.k, call.v, return_lse=True, return_mass=True,
                              **call.keywords)
    got = mass(call.q, call.k, lse, **keywords)
    bound = 1e-5 + 1e-6 * np.abs(np.where(np.isfinite(lse), lse, 0)).max(initial=1)
    assert (np.abs(got - expected) <= bound * expected + 1e-7).all()
    ones = np.ones_like(lse)
    np.testing.assert_array_equal(mass(call.q, call.k, lse, row_weights=ones, **keywords), got)


def test_threads_do_not_matter(table):
    random = np.random.default_rng(0)
    q, k = normal(random, 2, 4, 300, 32), normal(random, 2, 2, 1100, 32)
    lse = 7 + random.random((2, 4, 300), np.float32)
    before = get_num_threads()
    set_num_threads(1)
    alone = mass(q, k, lse)
    set_num_threads(before)
    np.testing.assert_array_equal(mass(q, k, lse), alone)


def test_the_core_counts_its_arguments():
    with pytest.raises(TypeError, match=r"_core\.mass takes 22 arguments, got 1"):
        _core.mass(X)


X = np.ones((1, 2, 3, 8), np.float32)
LSE = X[..., 0]


@pytest.mark.parametrize(("keywords", "error", "match"), [
    ({"lse": None}, TypeError, r"lse is None, expected an array"),
    ({"lse": LSE[:, :1]}, ValueError, r"lse has shape \[1, 1, 3\], expected \[batch, heads_q"),
    ({"lse": 1.0}, ValueError, r"lse has shape \[\]"),
    ({"row_weights": X}, ValueError, r"row_weights has shape \[1, 2, 3, 8\]"),
    ({"queries": -1}, ValueError, r"queries is -1, expected at least 0"),
    ({"reduce": "mean"}, ValueError, r"reduce is 'mean', expected 'sum' or 'max'"),
    ({"sinks": -1}, ValueError, r"sinks is -1, expected at least 0"),
    ({"k": X[..., :4]}, ValueError, r"k has head_dim 4, expected 8"),
    ({"k": X.astype(np.float16)}, TypeError, r"k is float16, expected float32"),
])
def test_refusals(keywords, error, match):
    with pytest.raises(error, match=r"mass\(\): " + match):
        mass(**{"q": X, "k": X, "lse": LSE, **keywords})
