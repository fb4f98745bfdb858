"""Every refusal names the function and the argument, what was expected and what came."""

import numpy as np
import pytest

from sinkattn import SinkCache, attend, get_num_threads, merge, set_num_threads

F = np.float32
Q, K, V = np.zeros((2, 4, 5, 8), F), np.zeros((2, 2, 9, 8), F), np.zeros((2, 2, 9, 6), F)
HUGE = np.broadcast_to(F(0), (2**21, 1, 2**21, 1))


def big_endian(x):
    return x.astype(">f4")


CASES = [
    # tensors
    ({"q": Q[0]}, ValueError, "q has 3 dimensions, expected 4"),
    ({"k": K[0]}, ValueError, "k has 3 dimensions"),
    ({"v": V[0]}, ValueError, "v has 3 dimensions"),
    ({"q": np.zeros((1,) * 5, F)}, ValueError, "q has 5 dimensions"),
    ({"q": np.zeros((1,) * 9, F)}, ValueError, "q has 9 dimensions"),
    ({"q": 3.0}, TypeError, "q is float, expected an array"),
    ({"q": None}, TypeError, "q is NoneType"),
    ({"q": Q.astype(np.float64)}, TypeError, "q has dtype float64, expected float32, float16"),
    ({"q": Q.astype(int)}, TypeError, "q has dtype int64"),
    ({"q": Q.astype(bool)}, TypeError, "q has dtype bool8"),
    ({"q": Q.astype(object)}, TypeError, "q has dtype object"),
    ({"q": Q.astype(complex)}, TypeError, "q has dtype complex128"),
    ({"q": Q.view(np.uint16)}, TypeError, "q has dtype uint16"),
    ({"q": np.zeros(Q.shape, "V2")}, TypeError, "q has dtype .*V2"),
    ({"q": big_endian(Q)}, TypeError, "q has dtype >f4 in foreign byte order"),
    ({"k": K.astype(np.float16)}, TypeError, "k is float16, expected float32 .*dtype of q"),
    ({"v": V.astype(np.float16)}, TypeError, "v is float16"),
    ({"k": K[:1]}, ValueError, r"k has batch 1, expected 2 \(same as q\)"),
    ({"v": V[:1]}, ValueError, "v has batch 1"),
    ({"k": K[..., :7]}, ValueError, r"k has head_dim 7, expected 8 \(same as q\)"),
    ({"v": V[:, :, :8]}, ValueError, r"v has length 8, expected 9 \(same as k\)"),
    ({"v": V[:, :1]}, ValueError, r"v has 1 heads, expected 2 \(same as k\)"),
    ({"q": Q[:, :3]}, ValueError, "q has 3 heads, expected a multiple of 2"),
    ({"q": Q[:, :0]}, ValueError, "q has 0 heads"),
    ({"k": K[:, :0], "v": V[:, :0]}, ValueError, "k has 0 heads"),
    ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, "q has head_dim 0, expected 1 to 256"),
    ({"q": np.zeros((2, 4, 5, 257), F), "k": np.zeros((2, 2, 9, 257), F)}, ValueError,
     "q has head_dim 257"),
    ({"v": np.zeros((2, 2, 9, 300), F)}, ValueError, "v has head_dim 300"),
    ({"q": Q.repeat(2, -1)[..., ::2]}, ValueError, "last axis of q has stride 2, expected 1"),
    ({"k": K[..., ::-1]}, ValueError, "last axis of k has stride -1"),
    ({"v": np.asfortranarray(V)}, ValueError, "last axis of v"),
    ({"q": HUGE, "k": HUGE[:, :, :1], "v": np.broadcast_to(np.zeros(256, F), (2**21, 1, 1, 256))}, ValueError,
     r"out has shape \[2097152, 1, 2097152, 256\], whose size does not fit 52 bits"),
    ({"q": np.zeros((2, 4, 5, 33), np.uint8)[..., 1:].view(F)}, ValueError, "q .*(aligned|stride)"),
    # numbers
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"window": -3}, ValueError, "window is -3"),
    ({"window": True}, TypeError, "window is bool"),
    ({"window": 2.0}, TypeError, "window holds floating-point"),
    ({"window": [1, 2, 3]}, ValueError, r"window has shape \[3\], expected one number or \[heads_q\] \[4\]"),
    ({"window": [1, 2, 3, -1]}, ValueError, r"window\[3\] is -1"),
    ({"window": np.ones(4, bool)}, TypeError, "window is a bool array"),
    ({"window": "wide"}, TypeError, "window"),
    ({"window": 2**70}, ValueError, "window does not fit 64 bits"),
    ({"sinks": -1}, ValueError, "sinks is -1, expected at least 0"),
    ({"sinks": True}, TypeError, "sinks is bool, expected an int"),
    ({"sinks": 1.5}, TypeError, "sinks is float"),
    ({"scale": np.nan}, ValueError, "scale is nan, expected a finite number"),
    ({"scale": np.inf}, ValueError, "scale is inf"),
    ({"scale": True}, TypeError, "scale is bool"),
    ({"scale": "1"}, TypeError, "scale is str, expected a number"),
    ({"softcap": 0.0}, ValueError, "softcap is 0, expected a finite number above 0"),
    ({"softcap": -1}, ValueError, "softcap is -1"),
    ({"softcap": np.nan}, ValueError, "softcap is nan"),
    ({"softcap": np.True_}, TypeError, "softcap is .*bool"),
    ({"mass_reduce": "mean"}, ValueError, "mass_reduce is 'mean', expected 'sum' or 'max'"),
    ({"mass_reduce": 1}, ValueError, "mass_reduce is 1"),
    ({"mass_queries": -1}, ValueError, "mass_queries is -1"),
    ({"mass_queries": True}, TypeError, "mass_queries is bool"),
    # sinks
    ({"sink_logits": [1.0, 2.0]}, ValueError, r"sink_logits has shape \[2\], expected \[heads_q\] \[4\]"),
    ({"sink_logits": np.zeros((3, 2))}, ValueError, r"sink_logits has shape \[3, 2\], expected \[heads_q, logits\] \[4, 2\]"),
    ({"sink_logits": np.zeros((4, 1, 1))}, ValueError, "sink_logits has shape"),
    ({"sink_logits": True}, TypeError, "sink_logits is bool"),
    ({"sink_logits": np.zeros(4, bool)}, TypeError, "sink_logits is a bool array"),
    ({"sink_logits": "a"}, TypeError, "sink_logits"),
    ({"sink_bias": np.zeros((4, 1))}, ValueError, "sink_bias needs sinks > 0"),
    ({"sink_bias": np.zeros((4, 1)), "sinks": 2}, ValueError, r"sink_bias has shape \[4, 1\], expected \[heads_q, sinks\] \[4, 2\]"),
    ({"sink_q": Q}, ValueError, "sink_q needs sinks > 0"),
    ({"sink_q": Q[:, :2], "sinks": 1}, ValueError, "sink_q has shape"),
    ({"sink_q": Q.astype(np.float16), "sinks": 1}, TypeError, "sink_q is float16"),
    ({"sink_kv": K}, TypeError, r"sink_kv is numpy.ndarray, expected a pair"),
    ({"sink_kv": (K[0],)}, ValueError, "sink_kv has 1 entries"),
    ({"sink_kv": (K[0], V[0, :, :3])}, ValueError, r"sink_kv\[1\] has shape"),
    ({"sink_kv": (K, V)}, ValueError, r"sink_kv\[0\] has shape"),
    ({"sink_kv": (K[0], V[0].astype(np.float16))}, TypeError, r"sink_kv\[1\] is float16"),
    ({"alibi_slopes": [1.0]}, ValueError, r"alibi_slopes has shape \[1\], expected \[heads_q\]"),
    ({"alibi_slopes": np.zeros((3, 4))}, ValueError, r"alibi_slopes has shape \[3, 4\], expected \[batch, heads_q\]"),
    # lengths
    ({"starts": [0]}, ValueError, r"starts has shape \[1\], expected \[batch\] \[2\]"),
    ({"starts": [0, 10]}, ValueError, r"starts\[1\] is 10, expected 0 to 9"),
    ({"starts": [0.0, 1.0]}, TypeError, "starts holds floating-point"),
    ({"lengths": [-1, 3]}, ValueError, r"lengths\[0\] is -1"),
    ({"starts": [0, 5], "lengths": [9, 5]}, ValueError, r"starts\[1\] \+ lengths\[1\] is 10"),
    ({"q_lengths": [6, 0]}, ValueError, r"q_lengths\[0\] is 6, expected 0 to 5 \(the length of q\)"),
    ({"q_lengths": np.array([2**63, 1], np.uint64)}, ValueError, "q_lengths"),
    ({"cu_seqlens_q": [0, 5]}, ValueError, "cu_seqlens_k is missing"),
    ({"cu_seqlens_q": [0, 5], "cu_seqlens_k": [0, 9]}, ValueError, r"q has batch 2, expected 1 \(same as packed"),
    # out
    ({"out": np.zeros((2, 4, 5, 8), F)}, ValueError, r"out has shape \[2, 4, 5, 8\], expected .* \[2, 4, 5, 6\]"),
    ({"out": np.zeros((2, 4, 5, 6), np.float16)}, TypeError, "out is float16"),
    ({"out": np.broadcast_to(np.zeros((2, 4, 5, 6), F), (2, 4, 5, 6))}, ValueError, "out is read-only"),
    ({"out": np.lib.stride_tricks.as_strided(np.zeros((2, 4, 5, 6), F), (2, 4, 5, 6), (0, 120, 24, 4))},
     ValueError, "out overlaps itself"),
    ({"out": Q[..., :6]}, ValueError, "out overlaps q in memory"),
    ({"out": [1.0]}, TypeError, "out is list"),
]


@pytest.mark.parametrize(("keywords", "error", "match"), CASES)
def test_attend_refuses_by_name(keywords, error, match):
    with pytest.raises(error, match=r"attend\(\): .*" + match):
        attend(**{"q": Q, "k": K, "v": V, **keywords})


@pytest.mark.parametrize(("cu_q", "cu_k", "match"), [
    ([0, 4], [0, 9], "cu_seqlens_q goes from 0 to 4, expected 0 to 5"),
    ([1, 5], [0, 9], "cu_seqlens_q goes from 1"),
    ([0, 4, 2, 5], [0, 1, 2, 9], "cu_seqlens_q falls from 4 to 2 at 2"),
    ([0, 5], [0, 3, 9], r"cu_seqlens_k has length 3, expected 2 \(same as cu_seqlens_q\)"),
    ([], [0, 9], "cu_seqlens_q has"),
    ([[0, 5]], [0, 9], "cu_seqlens_q has 2 dimensions"),
])
def test_bad_offsets_are_named(cu_q, cu_k, match):
    cu_q = np.array(cu_q, int)
    with pytest.raises(ValueError, match=match):
        attend(Q[:1], K[:1], V[:1], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def test_packed_and_padded_exclude_each_other():
    with pytest.raises(ValueError, match="cu_seqlens_q and starts"):
        attend(Q[:1], K[:1], V[:1], cu_seqlens_q=[0, 5], cu_seqlens_k=[0, 9], lengths=[9])


@pytest.mark.parametrize(("q", "k", "v", "error", "match"), [
    (Q, K, np.zeros((2, 2, 9, 8), F), ValueError, r"q has 5 tokens, expected 9 \(same as k\)"),
    (Q, K[:, :, :5], V[:, :, :5], ValueError, r"v has head_dim 6, expected 8 \(as the cache was made\)"),
    (Q.astype(np.float16), K[:, :, :5].astype(np.float16), K[:, :, :5].astype(np.float16), TypeError,
     r"q is float16, expected float32 \(the dtype of the cache\)"),
    (Q[:1], K[:1, :, :5], K[:1, :, :5], ValueError, "k has batch 1, expected 2"),
    (Q, K[:, :1, :5], K[:, :1, :5], ValueError, "k has heads 1, expected 2"),
])
def test_cache_refuses_by_name(q, k, v, error, match):
    with pytest.raises(error, match=r"SinkCache.attend\(\): " + match):
        SinkCache(2, 2, 8).attend(q, k, v)


def test_cache_methods_refuse_by_name():
    cache = SinkCache(2, 2, 8)
    for call, error, match in [
        (lambda: cache.crop(1), ValueError, r"crop\(\): row 0"),
        (lambda: cache.crop(-1), ValueError, r"crop\(\)"),
        (lambda: cache.crop(1.0), TypeError, r"crop\(\): n is float"),
        (lambda: cache.crop(None), TypeError, r"crop\(\): n is None"),
        (lambda: cache.reorder([0]), ValueError, r"reorder\(\): index has 1 entries, expected 2"),
        (lambda: cache.reorder([0, 2]), ValueError, r"reorder\(\): index\[1\] is 2"),
        (lambda: cache.reorder(None), ValueError, r"reorder\(\): index"),
        (lambda: cache.reorder([[0, 1]]), ValueError, r"reorder\(\): index"),
        (lambda: cache.reset([2]), ValueError, r"reset\(\): rows"),
        (lambda: cache.reset([True]), ValueError, r"reset\(\): rows has shape"),
        (lambda: cache.reset([0.5]), TypeError, r"reset\(\): rows"),
    ]:
        with pytest.raises(error, match=match):
            call()


def test_merge_refuses_by_name():
    out, lse = np.zeros((2, 3), F), np.zeros(2, F)
    for outs, lses, error, match in [
        ([], [], ValueError, "at least one"),
        ([out], [lse, lse], ValueError, "1 outs and 2 lses"),
        ([out, out[:1]], [lse, lse], ValueError, r"outs\[1\] differs in shape"),
        ([out], [out], ValueError, r"lses\[0\]"),
        ([out, out.astype(np.float16)], [lse, lse], TypeError, "part 1"),
        ([out], [lse.astype(np.float16)], TypeError, "part 0"),
        ([np.zeros((2, 300), F)], [lse], ValueError, "300"),
    ]:
        with pytest.raises(error, match=match):
            merge(outs, lses)


def test_threads_refuse_by_name():
    for count, error in ((0, ValueError), (True, TypeError), (1.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"set_num_threads\(\): count"):
            set_num_threads(count)
    assert get_num_threads() >= 1


def test_auxiliary_arrays_take_any_number_type():
    """Lists, NumPy scalars, any real or integer dtype, any strides: cast, not refused."""
    random = np.random.default_rng(0)
    q, k = (random.standard_normal((2, 4, n, 8)).astype(F) for n in (5, 9))
    expected = attend(q, k, k, sink_logits=[0.0, 1.0, 2.0, 3.0], window=[1, 2, 3, 4], lengths=[9, 4])
    for real in (np.float16, np.float64, np.int8, np.uint32):
        for integer in (np.int8, np.uint16, np.int32, np.uint64):
            np.testing.assert_array_equal(expected, attend(
                q, k, k, sink_logits=np.arange(8, dtype=real).repeat(2)[::2][:4],
                window=np.arange(4, 0, -1, dtype=integer)[::-1], lengths=np.array([9, 4], integer)))
    np.testing.assert_array_equal(attend(q, k, k, sink_logits=1, window=np.int16(3)),
                                  attend(q, k, k, sink_logits=np.float32(1), window=3))
