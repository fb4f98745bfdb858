"""attend_backward: the reference against differences, the kernels against the reference."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from oracle import dtype_of, normal, real_queries, visible
from strategies import calls
from tolerance import relative_error

from sinkattn import attend, attend_backward, get_num_threads, reference, set_num_threads

EXAMPLES = int(os.environ.get("SINKATTN_BACKWARD_EXAMPLES", min(20, settings.default.max_examples)))
NOT_ATTEND = ("mass_reduce", "mass_queries")
# A weight is exp(s - lse), and lse arrives in fp32: below 32 it is off by up to 1e-6, and the weight with it; beyond, by as much more.
FP32_RELATIVE = 5e-6
HALF_RELATIVE = {"float16": 3e-3, "bfloat16": 2.5e-2}  # roundings of P, dS, out and the result


def flat(gradients):
    """name -> array, the pair apart."""
    pair = gradients.get("sink_kv")
    rest = {name: x for name, x in gradients.items() if name != "sink_kv"}
    return rest if pair is None else {**rest, "sink_kv[0]": pair[0], "sink_kv[1]": pair[1]}


# --- the definition -------------------------------------------------------------------------------

STEP = 1e-5


def loss(arguments, dout, dlse):
    out, lse = reference.attend(**arguments, return_lse=True)
    return (dout * out).sum() + (dlse * np.where(np.isinf(lse), 0.0, lse)).sum()


def moved(arguments, name, value):
    if not name.startswith("sink_kv"):
        return {**arguments, name: value}
    pair = list(arguments["sink_kv"])
    pair[int(name[-2])] = value
    return {**arguments, "sink_kv": tuple(pair)}


def difference(arguments, name, value, dout, dlse):
    """Central differences of the loss by one argument; infinite entries stay, with 0."""
    value, slope = np.asarray(value, float), np.zeros(np.shape(value))
    for i in np.ndindex(value.shape):
        if np.isfinite(value[i]):
            ends = []
            for step in (STEP, -STEP):
                other = value.copy()
                other[i] += step
                ends.append(loss(moved(arguments, name, other), dout, dlse))
            slope[i] = (ends[0] - ends[1]) / (2 * STEP)
    return slope


def definitions():
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal(s) for s in ((2, 4, 5, 3), (2, 2, 6, 3), (2, 2, 6, 2)))
    bias = random.standard_normal((4, 2))
    bias[1, 0] = -np.inf
    rows = random.standard_normal((2, 3, 3)), random.standard_normal((2, 3, 2))
    yield "everything", dict(q=q, k=k, v=v, window=[2, 0, 1, 3], sinks=2, sink_bias=bias, sink_kv=rows, softcap=1.3,
                             sink_logits=random.standard_normal((4, 2)), sink_q=random.standard_normal(q.shape),
                             alibi_slopes=random.standard_normal(4) / 4, starts=[1, 0], lengths=[3, 6], q_lengths=[5, 4])
    yield "not causal", dict(q=q, k=k, v=v, causal=False, window=2, sinks=1, sink_logits=0.7, scale=0.4)
    yield "packed, infinite sinks", dict(q=q[:1], k=k[:1], v=v[:1], cu_seqlens_q=[0, 4, 5], cu_seqlens_k=[0, 2, 6], sinks=1,
                                         sink_bias=bias[:, 1:], sink_logits=np.array([np.inf, -np.inf, 1.0, 2.0]))


@pytest.mark.parametrize(("name", "arguments"), list(definitions()))
def test_the_reference_is_the_derivative_of_attend(name, arguments):
    random = np.random.default_rng(1)
    tensors, keywords = [arguments[n] for n in "qkv"], {n: x for n, x in arguments.items() if n not in "qkv"}
    out, lse = reference.attend(*tensors, return_lse=True, **keywords)
    dout, dlse = random.standard_normal(out.shape), random.standard_normal(lse.shape)
    gradients = flat(reference.attend_backward(dout, *tensors, out, lse, dlse=dlse, **keywords))
    values = {n: x for n, x in flat(arguments).items() if n in gradients}
    assert set(values) == set(gradients)
    for which, value in values.items():
        np.testing.assert_allclose(gradients[which], difference(arguments, which, value, dout, dlse), atol=1e-7, err_msg=which)


# --- the kernels ----------------------------------------------------------------------------------

def assert_gradients(got, expected, dtype, lse=()):
    """Both flat; dtype: the name of that of q. The bound grows where lse is large: so does its rounding."""
    largest = max((abs(x) for x in np.ravel(lse) if np.isfinite(x)), default=0.0)
    bound = HALF_RELATIVE.get(dtype, FP32_RELATIVE * max(1.0, largest / 32))
    scale = sum(np.linalg.norm(x) for x in expected.values())
    for name, gradient in got.items():
        assert gradient.dtype == (np.float32 if name in ("sink_logits", "sink_bias") else dtype_of(dtype)), name
        wanted = expected[name]
        if np.linalg.norm(wanted) < 1e-3 * scale:       # what cancels keeps the errors of its terms
            assert np.linalg.norm(gradient.astype(float) - wanted) <= bound * 1e-3 * scale, name
        else:
            assert relative_error(gradient, wanted) <= bound, name


def check_backward(q, k, v, with_dlse=True, random=None, **keywords):
    """attend_backward against the reference for the same out and lse. Returns what it gave."""
    random = random or np.random.default_rng(7)
    dtype = q.dtype.name
    out, lse = attend(q, k, v, return_lse=True, **keywords)
    dout, dlse = normal(random, *out.shape, dtype=dtype), normal(random, *lse.shape) if with_dlse else None
    got = attend_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords)
    expected = flat(reference.attend_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords))
    assert_gradients(flat(got), expected, dtype, lse)
    return got


@given(call=calls())
@settings(max_examples=EXAMPLES)
def test_any_call_agrees_with_the_reference(call, table):
    """Features that are right one by one, and wrong together on one path of one table."""
    check_backward(call.q, call.k, call.v, **{n: x for n, x in call.keywords.items() if n not in NOT_ATTEND})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("keywords", [{}, {"window": 140, "sinks": 4}, {"causal": False, "sink_logits": 3.0}], ids=str)
def test_long_rows_of_grouped_heads(keywords, dtype, table):
    """More than one block of keys and tile of queries, for each head of a group."""
    random = np.random.default_rng(3)
    q, k, v = (normal(random, 1, h, 400, d, dtype=dtype) for h, d in ((4, 48), (2, 48), (2, 40)))
    check_backward(q, k, v, with_dlse=False, **keywords)


@given(call=calls(dtypes=("float32",)))
@settings(max_examples=EXAMPLES)
def test_what_no_query_sees_is_never_felt(call, table):
    """Padding, keys outside every window, removed columns, queries that are not real, and what out,
    lse and the gradients hold for these: all of them may be NaN."""
    q, k, v = (np.array(x, order="C") for x in (call.q, call.k, call.v))
    keywords = {n: x for n, x in call.keywords.items() if n not in NOT_ATTEND}
    out, lse = attend(q, k, v, return_lse=True, **keywords)
    random = np.random.default_rng(8)
    dout, dlse = normal(random, *out.shape), normal(random, *lse.shape)
    expected = flat(attend_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords))
    group = q.shape[1] // k.shape[1]
    seen = np.stack([visible(call)[:, h * group:(h + 1) * group].any((1, 2)) for h in range(k.shape[1])], axis=1)
    k[~seen] = v[~seen] = np.nan
    unreal = ~real_queries(call)
    for x in (q, out, lse, dout, dlse):
        x.swapaxes(1, 2)[unreal] = np.nan
    if "sink_q" in keywords:
        keywords["sink_q"] = np.array(keywords["sink_q"], order="C")
        keywords["sink_q"].swapaxes(1, 2)[unreal] = np.nan
    for name, gradient in flat(attend_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords)).items():
        np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


def test_infinite_sinks_have_finite_gradients(table):
    """+inf takes every weight, -inf none; beside a finite logit of the same head too."""
    random = np.random.default_rng(4)
    q, k = normal(random, 1, 4, 40, 32), normal(random, 1, 2, 40, 32)
    logits = np.array([[np.inf, 0.0], [-np.inf, -np.inf], [-np.inf, 2.0], [1e4, 0.0]], np.float32)
    got = check_backward(q, k, k, sink_logits=logits, window=9, sinks=2)
    assert not got["q"][:, 0].any() and not got["sink_logits"][:2].any() and got["sink_logits"][2, 1] != 0
    assert all(np.isfinite(x).all() for x in flat(got).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_an_idle_query_holds_is_never_felt(dtype, table):
    """Queries whose lse is infinite: beside queries that count, and a head without any."""
    random = np.random.default_rng(12)
    q, k, v = normal(random, 1, 4, 200, 32, dtype=dtype), *(normal(random, 1, 2, 200, 32, dtype=dtype) for _ in "kv")
    keywords = {"sink_logits": [np.inf, 0.0, 0.0, 1.0], "window": 150, "sinks": 3, "sink_q": np.array(q)}
    out, lse = attend(q, k, v, return_lse=True, **keywords)
    lse[0, 1, 40:60], lse[0, 2, 7] = np.inf, -np.inf
    dout, dlse = normal(random, *out.shape, dtype=dtype), normal(random, *lse.shape)
    expected = flat(attend_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords))
    assert all(np.isfinite(np.float64(x)).all() for x in expected.values())
    for x in (q, keywords["sink_q"], out, dout, dlse):
        x[np.isinf(lse)] = np.nan
    for name, gradient in flat(attend_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords)).items():
        np.testing.assert_array_equal(gradient, expected[name], err_msg=name)
        if name in ("q", "sink_q"):
            assert not gradient[np.isinf(lse)].any()


def test_results_do_not_depend_on_threads_nor_on_the_batch(table):
    random = np.random.default_rng(5)
    q, k, v = (normal(random, 3, h, 300, 64) for h in (4, 2, 2))
    keywords = {"window": 150, "sinks": 3, "sink_bias": normal(random, 4, 3), "sink_logits": [0.0, 1.0, 2.0, 3.0]}
    lengths = np.array([300, 200, 70])
    dout = normal(random, *q.shape)

    def gradients(rows, **more):
        some = [x[rows] for x in (q, k, v)]
        out, lse = attend(*some, return_lse=True, **keywords, **more)
        return flat(attend_backward(dout[rows], *some, out, lse, **keywords, **more))

    before, results = get_num_threads(), []
    try:
        for count in (1, 2, 5):
            set_num_threads(count)
            results.append(gradients(slice(None), lengths=lengths))
    finally:
        set_num_threads(before)
    for other in results[1:]:
        for name, gradient in results[0].items():
            np.testing.assert_array_equal(gradient, other[name], err_msg=name)
    for b in range(3):
        alone = gradients(slice(b, b + 1), lengths=lengths[b:b + 1])
        for name in "qkv":
            np.testing.assert_array_equal(results[0][name][b:b + 1], alone[name], err_msg=name)


def test_strides_do_not_matter():
    """Gradients of a sum arrive as one number, stretched; lse and dlse may have any strides."""
    random = np.random.default_rng(6)
    x = normal(random, 2, 9, 4, 16).transpose(0, 2, 1, 3)
    out, lse = attend(x, x, x, return_lse=True)
    dout = np.broadcast_to(normal(random, 1, 1, 1, 16), out.shape)
    odd = np.zeros((*lse.shape, 2), np.float32)
    odd[..., 0] = lse
    ones = np.broadcast_to(np.float32(1), lse.shape)
    got = attend_backward(dout, x, x, x, out[::-1][::-1], odd[..., 0], dlse=ones)
    expected = attend_backward(*map(np.ascontiguousarray, (dout, x, x, x, out, lse)), dlse=ones.copy())
    for name in "qkv":
        np.testing.assert_array_equal(got[name], expected[name])


def test_empty_calls_have_empty_gradients(table):
    for batch, queries, keys in ((0, 3, 3), (1, 0, 3), (1, 3, 0)):
        q, k = (np.ones((batch, 2, n, 8), np.float32) for n in (queries, keys))
        out, lse = attend(q, k, k, sink_logits=1.0, return_lse=True)
        got = attend_backward(out + 1, q, k, k, out, lse, sink_logits=1.0)
        assert got["q"].shape == q.shape and got["k"].shape == got["v"].shape == k.shape
        assert not any(x.any() for x in flat(got).values())


# --- what is refused ------------------------------------------------------------------------------

F = np.float32
Q, K, V, O = (np.zeros(s, F) for s in ((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 6), (2, 4, 5, 6)))  # noqa: E741
LSE = np.zeros((2, 4, 5), F)
WIDE = np.broadcast_to(F(0), (2, 4, 5, 6))
CASES = [
    ({"q": Q[0]}, ValueError, "q has 3 dimensions, expected 4"),
    ({"window": True}, TypeError, "window is bool, expected an int"),
    ({"sink_q": Q}, ValueError, "sink_q needs sinks > 0"),
    ({"dout": Q}, ValueError, r"dout has shape \[2, 4, 5, 8\], expected \[batch, heads_q, query_length, v_head_dim\] \[2, 4, 5, 6\]"),
    ({"dout": O.astype(np.float16)}, TypeError, r"dout is float16, expected float32 \(the dtype of q\)"),
    ({"dout": WIDE}, ValueError, "last axis of dout has stride 0, expected 1"),
    ({"out": O[:1]}, ValueError, r"out has shape \[1, 4, 5, 6\]"),
    ({"out": np.zeros((), F)}, ValueError, "out has 0 dimensions, expected an array with axes"),
    ({"lse": LSE[0]}, ValueError, r"lse has shape \[4, 5\], expected \[batch, heads_q, query_length\] \[2, 4, 5\]"),
    ({"lse": LSE.astype(np.float16)}, TypeError, r"lse is float16, expected float32 \(as attend returns it\)"),
    ({"lse": None}, TypeError, "lse is NoneType"),
    ({"dlse": LSE[..., :4]}, ValueError, "dlse has shape"),
    ({"dlse": LSE.astype(np.float64)}, TypeError, "dlse has dtype float64"),
]


@pytest.mark.parametrize(("keywords", "error", "match"), CASES)
def test_attend_backward_refuses_by_name(keywords, error, match):
    with pytest.raises(error, match=r"attend_backward\(\): .*" + match):
        attend_backward(**{"dout": O, "q": Q, "k": K, "v": V, "out": O, "lse": LSE, **keywords})


def test_results_are_of_the_kind_of_q():
    torch = pytest.importorskip("torch")
    x = torch.randn(1, 2, 9, 16, dtype=torch.bfloat16)
    keywords = {"sinks": 2, "sink_q": x, "sink_kv": (x[0], x[0]), "sink_logits": torch.zeros(2), "sink_bias": torch.zeros(2, 2)}
    out, lse = attend(x, x, x, return_lse=True, **keywords)
    got = attend_backward(out, x, x, x, out, lse, **keywords)
    assert list(got) == ["q", "k", "v", "sink_logits", "sink_bias", "sink_q", "sink_kv"]
    for name, gradient in flat(got).items():
        assert isinstance(gradient, torch.Tensor)
        assert gradient.dtype == (torch.float32 if name in ("sink_logits", "sink_bias") else torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"attend_backward\(\): k requires grad"):
        attend_backward(out, x, x.clone().requires_grad_(), x, out, lse, **keywords)


def test_bfloat16_of_ml_dtypes_comes_back():
    x = normal(np.random.default_rng(0), 1, 2, 9, 16, dtype="bfloat16")
    assert check_backward(x, x, x)["q"].dtype == dtype_of("bfloat16")
