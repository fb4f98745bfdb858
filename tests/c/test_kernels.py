"""The CUDA kernels' own source, run on the host against the reference: every argument, no GPU."""

import platform
import shutil
from types import SimpleNamespace

import emulated
import numpy as np
import pytest
from numerics.test_backward import assert_gradients, flat
from oracle import dtype_of, normal
from tolerance import FP32_RELATIVE, HALF_RELATIVE, assert_close, assert_lse_close

from sinkattn import reference

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="needs g++ on x86-64, whose fibers stand for threads")
DEVICES = {"h200": emulated.H200, "a100": emulated.A100, "small": emulated.SMALL}


def check(got, expected, dtype, rotated=False):
    """Rotated keys are rounded once more, which the reference does not do."""
    bound = HALF_RELATIVE.get(dtype, FP32_RELATIVE) * (2 if rotated else 1)
    assert_close(got[0], expected[0], bound)
    lse = {"float32": 1e-5}.get(dtype, 1e-4) if not rotated else 3e-2
    assert_lse_close(got[1], expected[1], lse)


def draw_arguments(random, dtype, heads_q, heads_kv, batch, queries, keys, depth, depth_v):
    """A call's keywords; each is there about every third time."""
    def some(chance=0.35):
        return random.random() < chance

    arguments = {"causal": some(0.75)}
    if some(0.5):
        arguments["window"] = (int(random.choice([1, 9, 70])) if some(0.6) else
                               random.choice([0, 1, 40], heads_q).astype(np.int32))
    if some(0.5):
        sinks = arguments["sinks"] = int(random.choice([1, 4, 20]))
        if some(0.5):
            arguments["sink_bias"] = np.where(random.random((heads_q, sinks)) < 0.2, -np.inf,
                                              random.standard_normal((heads_q, sinks)))
        if some(0.5):
            arguments["sink_q"] = normal(random, batch, heads_q, queries, depth, dtype=dtype)
    if some(0.5):
        arguments["sink_logits"] = normal(random, heads_q, 3) if some(0.5) else normal(random, heads_q)
    if some():
        arguments["sink_kv"] = (normal(random, heads_kv, 3, depth, dtype=dtype),
                                normal(random, heads_kv, 3, depth_v, dtype=dtype))
    if some():
        arguments["softcap"] = 5.0
    if some():
        arguments["alibi_slopes"] = random.random((batch, heads_q)) * 0.1
    if some() and batch == 1:
        cuts = np.sort(random.integers(0, [queries + 1, keys + 1], (2, 2)), axis=0)
        arguments["cu_seqlens_q"] = np.array([0, *cuts[:, 0], queries])
        arguments["cu_seqlens_k"] = np.array([0, *cuts[:, 1], keys], np.int32)
    elif some():
        arguments["starts"] = random.integers(0, keys // 2 + 1, batch)
        arguments["lengths"] = random.integers(0, keys // 2 + 1, batch).astype(np.int32)
        arguments["q_lengths"] = random.integers(0, queries + 1, batch)
    return arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(6))
def test_every_argument(library, seed, dtype, device):
    random = np.random.default_rng([seed, *device.encode()])
    batch, heads_kv, group = (int(random.choice(x)) for x in ((1, 2), (1, 2), (1, 3, 8, 17)))
    depth, depth_v = (int(random.choice((64, 128, 80, 20, 256))) for _ in range(2))
    queries, keys = int(random.choice((1, 1, 5, 40))), int(random.choice((1, 33, 200, 600)))
    q = normal(random, batch, heads_kv * group, queries, depth, dtype=dtype)
    k = normal(random, batch, heads_kv, keys, depth, dtype=dtype)
    v = normal(random, batch, heads_kv, keys, depth_v, dtype=dtype)
    arguments = draw_arguments(random, dtype, heads_kv * group, heads_kv, batch, queries, keys,
                               depth, depth_v)
    expected = reference.attend(q, k, v, return_lse=True, return_mass=True, **arguments)
    got = emulated.Call(q, k, v, **arguments).run(library, DEVICES[device])
    check(got, expected, dtype)
    assert_close(got[2], expected[2], 1e-5 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize("dtype, depth, keywords", [
    ("bfloat16", 128, {"sinks": 3, "window": 1040, "sink_logits": 1}),
    ("float16", 64, {"causal": False, "lengths": np.array([1100, 70]), "q_lengths": np.array([36, 20])}),
    ("bfloat16", 80, {"sinks": 70, "window": 1030, "sink_q": 1, "sink_kv": 1, "starts": np.array([0, 9])})])
def test_wide_tiles(library, dtype, depth, keywords):
    """Taken where rows see much and there are many of them: here for a device that has room for none."""
    random = np.random.default_rng(6)
    q = normal(random, 2, 7, 37, depth, dtype=dtype)
    k, v = (normal(random, 2, 1, 1100, depth, dtype=dtype) for _ in range(2))
    given = {"sink_q": q[::-1], "sink_logits": normal(random, 7),
             "sink_kv": tuple(normal(random, 1, 3, depth, dtype=dtype) for _ in range(2))}
    keywords = {name: given.get(name, value) for name, value in keywords.items()}
    call = emulated.Call(q, k, v, want_mass=False, **keywords)
    check(call.run(library, emulated.Facts(80, 0, 166912, 0)),
          reference.attend(q, k, v, return_lse=True, **keywords), dtype)
    assert call.plan.path.startswith(b"prefill_wide")


@pytest.mark.parametrize("device, splits, cluster", [("h200", 8, 8), ("a100", None, 1)])
def test_splits_meet(library, device, splits, cluster):
    """In a cluster's shared memory, or in scratch."""
    random = np.random.default_rng(1)
    q = normal(random, 2, 8, 1, 128, dtype="bfloat16")
    k, v = (normal(random, 2, 2, 1500, 128, dtype="bfloat16") for _ in range(2))
    call = emulated.Call(q, k, v, want_mass=False)
    expected = reference.attend(q, k, v, return_lse=True, return_mass=True)
    check(call.run(library, DEVICES[device]), expected, "bfloat16")
    assert call.plan.launches[0].cluster == cluster
    assert call.problem.splits == splits if splits else call.problem.splits > 1
    call = emulated.Call(q, k, v)
    check(call.run(library, DEVICES[device]), expected, "bfloat16")
    np.testing.assert_allclose(call.mass, expected[2], rtol=1e-5, atol=1e-7)
    assert call.plan.launches[0].cluster == cluster
    assert call.plan.launch_count == 1, "mass takes no pass of its own"


@pytest.mark.parametrize("reduce, counted", [("sum", 2), ("max", None), ("max", 1)])
def test_mass_of_few_queries(library, reduce, counted):
    """Out of the decode kernel: what no counted query sees is zero, whatever was there."""
    random = np.random.default_rng(4)
    heads = 8 if counted == 2 else 6
    q = normal(random, 2, heads, 4, 80, dtype="float16")
    k, v = (normal(random, 2, 2, 700, 80, dtype="float16") for _ in range(2))
    keywords = {"sinks": 3, "window": np.array([0, 300, 40, 0, 9, 20, 30, 0][:heads]),
                "lengths": np.array([690, 200]), "starts": np.array([0, 7]), "q_lengths": np.array([3, 4]),
                "mass_reduce": reduce, "mass_queries": counted, "sink_logits": normal(random, heads)}
    expected = reference.attend(q, k, v, return_lse=True, return_mass=True, **keywords)
    for device in DEVICES.values():
        call = emulated.Call(q, k, v, **keywords)
        check(call.run(library, device), expected, "float16")
        assert call.plan.launch_count == 1 or device is emulated.SMALL
        np.testing.assert_allclose(call.mass, expected[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("keywords", [
    {}, {"causal": False, "window": np.array([40, 0, 7, 300])}, {"mass_queries": 70},
    {"sinks": 3, "window": 60, "lengths": np.array([410, 150]), "q_lengths": np.array([140, 80])}],
    ids=lambda keywords: "-".join(keywords) or "causal")
def test_mass_by_asynchronous_products(library, keywords):
    """What only Hopper has, with weights of rows, and rows that give nothing."""
    random = np.random.default_rng(5)
    depth = 64 if keywords else 80
    q = normal(random, 2, 4, 140, depth, dtype="bfloat16")
    k = normal(random, 2, 2, 420, depth, dtype="bfloat16")
    _, lse = reference.attend(q, k, k, return_lse=True, **{
        name: x for name, x in keywords.items() if name != "mass_queries"})
    lse = lse.astype(np.float32)
    lse[0, 1, 3] = np.inf
    weights = random.random(lse.shape, np.float32) if "window" in keywords else None
    counted = {"queries" if name == "mass_queries" else name: x for name, x in keywords.items()}
    expected = reference.mass(q, k, lse, row_weights=weights, **counted)
    call = emulated.Call(q, k, k, **keywords)
    got = call.weigh(library, lse, weights, emulated.H200_PRODUCTS)
    assert call.plan.path.startswith(b"mass_hopper")
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("queries", [1, 40])
def test_what_nobody_sees_reaches_nothing(library, queries):
    random = np.random.default_rng(2)
    q = normal(random, 1, 4, queries, 64, dtype="float16")
    k, v = (normal(random, 1, 1, 300, 64, dtype="float16") for _ in range(2))
    arguments = {"window": 50, "sinks": 4, "lengths": np.array([260])}
    expected = reference.attend(q, k, v, return_lse=True, **arguments)
    seen = np.zeros(300, bool)
    seen[:4] = seen[260 - queries - 49:260] = True
    k[:, :, ~seen], v[:, :, ~seen] = np.nan, np.inf
    check(emulated.Call(q, k, v, **arguments).run(library), expected, "float16")


@pytest.mark.parametrize("rope", ["none", "raw", "applied", "interleaved"])
@pytest.mark.parametrize("mass", [False, True], ids=["step", "step with mass"])
def test_stream(library, rope, mass):
    """Chunks of several lengths, single steps while the ring fills, and beyond."""
    random = np.random.default_rng(3)
    turn = None if rope == "none" else SimpleNamespace(
        inv_freq=1e4 ** -(np.arange(32) / 32), interleaved=rope == "interleaved",
        attention_scaling=1.2, applied=rope == "applied")
    options = {"sinks": 4, "window": 37, "rope": turn, "rollback": 2}
    exact = reference.SinkCache(2, 2, 64, **options)
    cache = emulated.SinkCache(2, 2, 64, dtype=dtype_of("float16"), **options)
    logits = normal(random, 8)
    for tokens in (1, 1, 7, 1, 90, 1, 1, 1, 30, 1, 1):
        q = normal(random, 2, 8, tokens, 64, dtype="float16")
        k, v = (normal(random, 2, 2, tokens, 64, dtype="float16") for _ in range(2))
        new = random.integers(0, tokens + 1, 2) if tokens > 1 else None
        expected = exact.attend(q, k, v, new_lengths=new, sink_logits=logits, return_lse=True,
                                return_mass=True)
        call = cache.attend(library, emulated.H200, q, k, v, new, sink_logits=logits,
                            want_mass=mass)
        check((call.out, call.lse), expected, "float16", rotated=turn is not None)
        if mass:
            assert_close(call.mass, expected[2], 1e-2 if turn is not None else 1e-3)
        if tokens == 1:
            assert call.plan.launch_count == 1
        np.testing.assert_array_equal(cache.lengths, exact.length)
        np.testing.assert_array_equal(cache.lows, exact._oldest)


@pytest.mark.parametrize("parts", [1, 2, 7, 60], ids=lambda n: f"{n} parts")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge(library, dtype, parts):
    """Strides of any kind, depths that are no multiple of a piece, and infinite lse among them."""
    random = np.random.default_rng([4, parts])
    for shape in ((2, 3, 5, 24), (3, 7, 33), (6, 1), (16,)):
        outs = [normal(random, *shape, dtype=dtype) for _ in range(parts)]
        lses = [np.array(9 * random.standard_normal(shape[:-1]) + 300, np.float32) for _ in range(parts)]
        for lse in lses:
            lse[random.random(lse.shape) < 0.3] = -np.inf
            lse[random.random(lse.shape) < 0.1 / parts] = np.inf
        for out, lse in zip(outs, lses):
            out[lse == -np.inf] = np.nan
        if len(shape) > 2:  # axes exchanged in memory, and a stride in front of the last
            outs = [np.swapaxes(np.swapaxes(x, 0, 1).copy(), 0, 1) for x in outs]
            lses = [np.repeat(x, 2, axis=-1)[..., ::2] for x in lses]
        expected = reference.merge([np.where(x[..., None] > -np.inf, o.astype(float), 0)
                                    for o, x in zip(outs, lses)], lses)
        got = emulated.merge(library, outs, lses)
        assert_close(got[0], expected[0], HALF_RELATIVE.get(dtype, FP32_RELATIVE))
        assert_lse_close(got[1], expected[1])


def test_merge_of_nan_is_nan(library):
    out, lse = np.ones((2, 8), np.float32), np.zeros(2, np.float32)
    got = emulated.merge(library, [out, out], [lse, np.array([np.nan, 0], np.float32)])
    assert np.isnan(got[0][0]).all() and np.isnan(got[1][0]) and (got[0][1] == 1).all()


def check_gradients(library, random, q, k, v, on_device=False, **keywords):
    """Against the reference for the same out and lse, by the bounds of the CPU's tests."""
    out, lse = reference.attend(q, k, v, return_lse=True, **keywords)
    out, lse = out.astype(q.dtype), lse.astype(np.float32)
    dout, dlse = normal(random, *out.shape, dtype=q.dtype.name), normal(random, *lse.shape)
    got = flat(emulated.attend_backward(library, dout, q, k, v, out, lse, dlse=dlse,
                                        on_device=on_device, **keywords))
    expected = flat(reference.attend_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords))
    assert got.keys() == expected.keys()
    assert_gradients(got, expected, q.dtype.name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(8))
def test_gradients_of_every_argument(library, seed, dtype):
    random = np.random.default_rng([5, seed])
    batch, heads_kv, group = (int(random.choice(x)) for x in ((1, 2), (1, 2), (1, 3)))
    depth, depth_v = ((64, 64), (128, 128), (256, 192), (80, 96), (20, 33), (128, 64), (256, 256), (40, 40))[seed]
    queries, keys = int(random.choice((1, 5, 40, 150))), int(random.choice((1, 33, 150)))
    q = normal(random, batch, heads_kv * group, queries, depth, dtype=dtype)
    k = normal(random, batch, heads_kv, keys, depth, dtype=dtype)
    v = normal(random, batch, heads_kv, keys, depth_v, dtype=dtype)
    arguments = draw_arguments(random, dtype, heads_kv * group, heads_kv, batch, queries, keys,
                               depth, depth_v)
    check_gradients(library, random, q, k, v, on_device=seed % 2 == 1, **arguments)


@pytest.mark.parametrize(("dtype", "depth", "arguments"), [
    ("bfloat16", 128, {"window": 40, "sinks": 4, "sink_logits": np.array([0.5, np.inf])}),
    ("float16", 64, {"causal": False}),
    ("float16", 56, {"cu_seqlens_q": np.array([0, 30, 30, 70]), "cu_seqlens_k": np.array([0, 80, 90, 200]), "window": 70}),
    ("bfloat16", 64, {"window": np.array([9, 150]), "lengths": np.array([170]), "starts": np.array([10]),
                      "q_lengths": np.array([65])})], ids=str)
def test_gradients_in_one_pass(library, dtype, depth, arguments):
    """Hopper's kernel; keys that no query sees and rows of infinite lse are NaN."""
    random = np.random.default_rng(11)
    q, dout = (normal(random, 1, 2, 70, depth, dtype=dtype) for _ in range(2))
    k, v = (normal(random, 1, 1, 200, depth, dtype=dtype) for _ in range(2))
    if dtype == "float16":
        arguments = {**arguments, "sink_kv": tuple(normal(random, 1, 3, depth, dtype=dtype) for _ in range(2))}
    out, lse = (x.astype(t) for x, t in zip(reference.attend(q, k, v, return_lse=True, **arguments), (q.dtype, np.float32)))
    expected = flat(reference.attend_backward(dout, q, k, v, out, lse, **arguments))
    unseen = ~(expected["k"] != 0).any(-1)
    k[unseen] = v[unseen] = np.nan
    q[np.isinf(lse)] = dout[np.isinf(lse)] = np.nan
    got = flat(emulated.attend_backward(library, dout, q, k, v, out, lse, one_pass=True, **arguments))
    assert_gradients(got, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_of_what_nobody_sees_are_zero(library, dtype):
    """Padding, keys outside every window, a removed column, and queries that are not real, all NaN."""
    random = np.random.default_rng(6)
    q, dout = (normal(random, 2, 2, 40, 64, dtype=dtype) for _ in range(2))
    k, v = (normal(random, 2, 1, 200, 64, dtype=dtype) for _ in range(2))
    arguments = {"window": 9, "sinks": 4, "sink_bias": normal(random, 2, 4), "starts": np.array([0, 7]),
                 "lengths": np.array([200, 100]), "q_lengths": np.array([33, 40])}
    arguments["sink_bias"][:, 2] = -np.inf
    out, lse = (x.astype(t) for x, t in zip(reference.attend(q, k, v, return_lse=True, **arguments),
                                            (q.dtype, np.float32)))
    expected = flat(reference.attend_backward(dout, q, k, v, out, lse, **arguments))
    seen = np.zeros((2, 200), bool)
    seen[0, [0, 1, 3, *range(200 - 33 - 8, 200)]] = seen[1, [7, 8, 10, *range(107 - 40 - 8, 107)]] = True
    for x in (k, v):
        x.swapaxes(1, 2)[~seen] = np.nan
    for x in (q, dout, out, lse):
        x[0, :, 33:] = np.nan
    got = flat(emulated.attend_backward(library, dout, q, k, v, out, lse, **arguments))
    assert_gradients(got, expected, dtype)
    assert not got["k"].swapaxes(1, 2)[~seen].any() and not got["q"][0, :, 33:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_at_infinite_sinks_are_finite(library, dtype):
    random = np.random.default_rng(7)
    q, k = normal(random, 1, 4, 40, 64, dtype=dtype), normal(random, 1, 2, 40, 64, dtype=dtype)
    logits = np.array([[np.inf, 0.0], [-np.inf, -np.inf], [-np.inf, 2.0], [1e4, 0.0]], np.float32)
    check_gradients(library, random, q, k, k, sink_logits=logits, window=9, sinks=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_do_not_feel_rows_of_infinite_lse(library, dtype):
    """Queries that a sink takes whole, or that see nothing, all NaN: not even where no key is masked."""
    random = np.random.default_rng(8)
    q, dout, k = (normal(random, 1, h, 70, 64, dtype=dtype) for h in (2, 2, 1))
    arguments = {"sink_logits": np.array([np.inf, 0.5], np.float32), "causal": False}
    out, lse = (x.astype(t) for x, t in zip(reference.attend(q, k, k, return_lse=True, **arguments), (dtype, np.float32)))
    lse[0, 1, ::7] = -np.inf
    silent = np.isinf(lse)
    expected = flat(emulated.attend_backward(library, dout, q, k, k, out, lse, **arguments))
    q[silent] = dout[silent] = out[silent] = np.nan
    got = flat(emulated.attend_backward(library, dout, q, k, k, out, lse, **arguments))
    assert not got["q"][silent].any() and got["k"].any()
    for name, gradient in expected.items():
        np.testing.assert_array_equal(got[name], gradient, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradients_do_not_depend_on_strides(library, dtype):
    random = np.random.default_rng(8)
    x = np.ascontiguousarray(normal(random, 2, 33, 4, 40, dtype=dtype)).transpose(0, 2, 1, 3)
    out, lse = (y.astype(t) for y, t in zip(reference.attend(x, x, x, return_lse=True), (x.dtype, np.float32)))
    dout = np.broadcast_to(normal(random, 1, 1, 1, 40, dtype=dtype), out.shape)
    odd = np.zeros((*lse.shape, 2), np.float32)
    odd[..., 0] = lse
    ones = np.broadcast_to(np.float32(1), lse.shape)
    got = emulated.attend_backward(library, dout, x, x, x, out, odd[..., 0], dlse=ones)
    expected = emulated.attend_backward(library, *map(np.ascontiguousarray, (dout, x, x, x, out, lse)),
                                        dlse=ones.copy())
    for name in "qkv":
        np.testing.assert_array_equal(got[name], expected[name])


def test_gradients_without_queries_are_zero(library):
    for batch, queries, keys in ((0, 3, 3), (1, 0, 3), (1, 3, 0)):
        q, k = (np.ones((batch, 2, n, 8), np.float32) for n in (queries, keys))
        out, lse = np.zeros_like(q), np.zeros(q.shape[:3], np.float32)
        got = flat(emulated.attend_backward(library, out + 1, q, k, k, out, lse, sink_logits=np.float32(1), sinks=1,
                                            sink_bias=np.ones((2, 1), np.float32), sink_kv=(k[:1].sum(0), k[:1].sum(0))))
        assert not any(x.any() for name, x in got.items() if keys or not name.startswith("sink_kv"))


@pytest.mark.parametrize("window", [3, [0, 5], None], ids=str)
def test_arrays_of_the_host_arrive(library, window):
    """A window for each head that came from the host was once taken for none."""
    random = np.random.default_rng(9)
    q, k, v = (normal(random, 1, 2, n, 64, dtype="float16") for n in (1, 90, 90))
    arguments = {"window": window, "sink_logits": np.array([0.5, 1.0]), "lengths": [80]}
    for on_device in (False, True):
        got = emulated.attend(library, q, k, v, on_device=on_device, **arguments)
        check(got, reference.attend(q, k, v, return_lse=True, **arguments), "float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(4))
def test_mass_alone(library, seed, dtype):
    """From an lse of any strides; row weights multiply the queries that they belong to."""
    random = np.random.default_rng([10, seed])
    q, k = normal(random, 1 + seed % 2, 6, 20, 40, dtype=dtype), normal(random, 1 + seed % 2, 2, 150, 40, dtype=dtype)
    arguments = draw_arguments(random, dtype, 6, 2, len(q), 20, 150, 40, 40)
    reduce, queries = ("sum", "max")[seed % 2], (None, 7)[seed // 2]
    _, lse, expected = reference.attend(q, k, k, return_lse=True, return_mass=True, mass_reduce=reduce,
                                        mass_queries=queries, **arguments)
    odd = np.repeat(lse.astype(np.float32), 2, axis=-1)[..., ::2]
    keywords = {"reduce": reduce, "queries": queries, **arguments}
    keywords = {name: x for name, x in keywords.items() if name not in ("sink_logits", "sink_kv")}
    got = emulated.mass(library, q, k, odd, on_device=seed > 1, **keywords)
    assert_close(got, expected, 1e-5)
    some = random.random(lse.shape)
    got = emulated.mass(library, q, k, odd, on_device=seed > 1, row_weights=some, **keywords)
    assert_close(got, reference.mass(q, k, odd, row_weights=some, **keywords), 1e-5)


SEQUENCES = {"cu_seqlens_q": np.array([0, 31, 31, 150, 200]),
             "cu_seqlens_k": np.array([0, 70, 90, 210, 260])}
NARROW = {  # heads, depth, queries, keys, pinned, arguments
    "ring comes round": ((4, 1), 128, 400, 400, 4, {"window": 129}),
    "eighths": ((8, 1), 64, 300, 333, 0, {"window": 137}),
    "fewer keys": ((8, 1), 64, 200, 200, 4, {"window": 128}),
    "three heads": ((6, 2), 80, 150, 150, 16, {"window": 90}),
    "one head": ((2, 2), 96, 200, 260, 1, {"window": 81}),
    "rows": ((16, 1), 64, 90, 120, 1, {"window": 64, "starts": np.array([3, 50]),
                                       "lengths": np.array([100, 60], np.int32),
                                       "q_lengths": np.array([90, 11])}),
    "packed": ((8, 2), 64, 200, 260, 4, {"window": 40, **SEQUENCES}),
    "softcap": ((8, 2), 64, 100, 100, 4, {"window": 50, "softcap": 5.0}),
    "alibi": ((8, 2), 64, 100, 120, 4, {"window": 50, "alibi_slopes": np.linspace(0.01, 0.3, 8)}),
}


@pytest.mark.parametrize("case", NARROW)
def test_narrow_windows_on_hopper(library, case):
    """Few multiprocessors, so that each comes to several heads, and rings come round."""
    (heads_q, heads_kv), depth, queries, keys, sinks, arguments = NARROW[case]
    random = np.random.default_rng(list(case.encode()))
    dtype = "float16" if case == "rows" else "bfloat16"
    batch = len(arguments["starts"]) if "starts" in arguments else 1
    q = normal(random, batch, heads_q, queries, depth, dtype=dtype)
    k, v = (normal(random, batch, heads_kv, keys, depth, dtype=dtype) for _ in range(2))
    arguments = {"sinks": sinks, "sink_logits": normal(random, heads_q), **arguments}
    if case == "packed":
        arguments["sink_bias"] = normal(random, heads_q, sinks)
        arguments["sink_q"] = normal(random, batch, heads_q, queries, depth, dtype=dtype)
    call = emulated.Call(q, k, v, want_mass=False, **arguments)
    got = call.run(library, emulated.Facts(90, 3, 232448, 8, 1))
    check(got, reference.attend(q, k, v, return_lse=True, **arguments), dtype)
    assert call.plan.path.startswith(b"prefill_window")


@pytest.mark.parametrize("queries", [40, 250], ids=["past", "all"])
def test_narrow_windows_keep_out_what_nobody_sees(library, queries):
    random = np.random.default_rng(4)
    q = normal(random, 1, 4, queries, 64, dtype="float16")
    k, v = (normal(random, 1, 1, 300, 64, dtype="float16") for _ in range(2))
    arguments = {"window": 50, "sinks": 4, "lengths": np.array([260]), "sink_bias": np.zeros((4, 4))}
    arguments["sink_bias"][:, 2] = arguments["sink_bias"][1, 0] = -np.inf
    expected = reference.attend(q, k, v, return_lse=True, **arguments)
    seen = np.zeros(300, bool)
    seen[[0, 1, 3]] = True
    seen[max(260 - queries - 49, 4):260] = True
    k[:, :, ~seen], v[:, :, ~seen] = np.nan, np.inf
    call = emulated.Call(q, k, v, want_mass=False, **arguments)
    check(call.run(library, emulated.H200_PRODUCTS), expected, "float16")
    assert call.plan.path == b"prefill_window_f16_64_136"
