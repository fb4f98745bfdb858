"""Whole calls that nobody thought of, with every kernel table."""

import numpy as np
import pytest
from hypothesis import given
from oracle import check_attend, dtype_of, real_queries, visible
from strategies import calls

from sinkattn import attend


@given(call=calls())
def test_any_call_agrees_with_the_reference(call, table):
    """Features that are right one by one, and wrong together on one path of one table."""
    check_attend(call.q, call.k, call.v, **call.keywords)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@given(call=calls())
def test_what_no_query_sees_is_never_felt(call, poison, table):
    """Padding, keys outside every window, removed columns, queries that are not real: all of
    them may hold anything, and a product with a zero weight would spread it."""
    q, k, v = (np.array(x, order="C") for x in (call.q, call.k, call.v))
    keywords = {**call.keywords, "return_lse": True, "return_mass": True}
    expected = attend(q, k, v, **keywords)
    heads_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    seen = np.stack([visible(call)[:, h * group:(h + 1) * group].any((1, 2))
                     for h in range(heads_kv)], axis=1)
    k[~seen] = v[~seen] = poison
    unreal = ~real_queries(call)
    q.swapaxes(1, 2)[unreal] = poison
    if "sink_q" in keywords:
        keywords["sink_q"] = np.array(keywords["sink_q"], order="C")
        keywords["sink_q"].swapaxes(1, 2)[unreal] = poison
    for dirty, clean in zip(attend(q, k, v, **keywords), expected):
        np.testing.assert_array_equal(dirty, clean)


@given(call=calls())
def test_every_element_of_out_is_written_and_none_beside_it(call, table):
    """out= arrives full of NaN, with any strides; what lies around it keeps its NaN."""
    q, k, v, keywords = call
    batch, heads, length, depth = (*q.shape[:3], v.shape[3])
    whole = np.full((length + 2, batch + 1, heads + 1, depth + 5), np.nan, dtype_of(q.dtype.name))
    inside = np.zeros(whole.shape, bool)
    out, ours = (x.transpose(1, 2, 0, 3)[1:, :-1, 1:-1, 3:-2] for x in (whole, inside))
    ours[...] = True
    expected = attend(q, k, v, **keywords)
    assert attend(q, k, v, out=out, **keywords) is out
    np.testing.assert_array_equal(out, expected)
    assert np.isnan(whole[~inside].astype(np.float32)).all()
