"""Any cache, any stream, any cutting of it, with every kernel table."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from oracle import dtype_of
from strategies import streams
from tolerance import HALF_RELATIVE, assert_close, assert_lse_close

from sinkattn import SinkCache, get_num_threads, reference, set_num_threads

TOKENS = st.sampled_from([0, 1, 1, 1, 2, 3, 5, 8, 30, 64, 129, 260])


def assert_same_call(got, expected, dtype, rotated):
    """out, lse, mass. A half-type cache holds turned keys rounded: as a model's own cache does."""
    half = HALF_RELATIVE.get(dtype, 0.0) * (4 if rotated else 1)
    assert got[0].dtype == dtype_of(dtype) and got[1].dtype == got[2].dtype == np.float32
    assert_close(got[0], expected[0], max(5e-6, half))
    assert_lse_close(got[1], expected[1], max(1e-5, 2 * half))
    assert_close(got[2], expected[2], max(2e-5, 4 * half))


@given(stream=streams(), cuts=st.lists(TOKENS, min_size=1, max_size=6), data=st.data())
def test_any_cut_of_any_stream_equals_the_definition(stream, cuts, data, table):
    """Rows at lengths of their own; what is not a real token may hold anything, and stays out."""
    ours = SinkCache(*stream.shape, **stream.making)
    model = reference.SinkCache(*stream.shape, **stream.making)
    rope, dtype = stream.making["rope"], stream.making["dtype"]
    for tokens in cuts:
        new = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=stream.shape[0],
                                             max_size=stream.shape[0]))
        q, k, v = stream.chunk(tokens)
        for row, count in enumerate(new or []):
            for x in (q, k, v):
                x[row, :, count:] = np.nan
        out = np.full((*q.shape[:3], v.shape[3]), np.nan, q.dtype)
        keywords = {**stream.keywords, "new_lengths": new, "return_lse": True, "return_mass": True}
        got = ours.attend(q, k, v, out=out, **keywords)
        assert got[0] is out
        expected = model.attend(q, k, v, **keywords)
        assert_same_call(got, expected, dtype, rope is not None)
        np.testing.assert_array_equal(ours.length, model.length)
        for a, b in zip(ours.kept(), model.kept()):
            np.testing.assert_array_equal(a, b)


@given(stream=streams(), cuts=st.lists(TOKENS, min_size=1, max_size=4))
def test_a_stream_does_not_depend_on_threads_or_companions(stream, cuts, table):
    """Bit for bit: one thread or many, a row alone or in a batch."""
    batch = stream.shape[0]
    alibi = stream.keywords.get("alibi_slopes")
    whole = SinkCache(*stream.shape, **stream.making)
    single = SinkCache(1, *stream.shape[1:], **stream.making)
    many = SinkCache(*stream.shape, **stream.making)
    before = get_num_threads()
    try:
        for tokens in cuts:
            chunk = stream.chunk(tokens)
            set_num_threads(1)
            expected = whole.attend(*chunk, **stream.keywords)
            keywords = dict(stream.keywords)
            if alibi is not None and alibi.ndim == 2:
                keywords["alibi_slopes"] = alibi[:1]
            alone = single.attend(*(x[:1] for x in chunk), **keywords)
            np.testing.assert_array_equal(alone, expected[:1])
            set_num_threads(3 + batch)
            np.testing.assert_array_equal(many.attend(*chunk, **stream.keywords), expected)
    finally:
        set_num_threads(before)
