"""attend on the device: what the shared suite (fixture `table`) does not ask."""

import os
import subprocess
import sys

import numpy as np
import pytest
from inputs.test_refusals import CASES, K, Q, V
from on_device import to_device, wrappers
from tolerance import FP32_RELATIVE, HALF_RELATIVE, assert_close, assert_lse_close, relative_error

from sinkattn import attend, merge, reference, show_config

KEYWORDS = [{}, {"window": 40, "sinks": 4}, {"sink_logits": 0.7, "softcap": 3.0},
            {"window": 9, "causal": False, "return_mass": True}]


def make(torch, *shape, dtype="bfloat16", seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, dtype))


def qkv(torch, batch=2, heads=(8, 2), queries=1, keys=300, depth=64, dtype="bfloat16"):
    return tuple(make(torch, batch, h, n, depth, dtype=dtype, seed=i)
                 for i, (h, n) in enumerate(((heads[0], queries), (heads[1], keys), (heads[1], keys))))


def wide(x):
    return x.double().cpu().numpy()


@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
@pytest.mark.parametrize("queries", [1, 7, 200])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cpu_and_the_gpu_agree(dtype, queries, keywords, torch):
    """To the sum of both bounds; neither is the other's oracle."""
    tensors = qkv(torch, queries=queries, dtype=dtype)
    there = attend(*tensors, return_lse=True, **keywords)
    here = attend(*(x.cpu() for x in tensors), return_lse=True, **keywords)
    bound = 2 * HALF_RELATIVE.get(dtype, FP32_RELATIVE)
    assert_close(wide(there[0]), wide(here[0]), bound)
    assert_lse_close(wide(there[1]), wide(here[1]), 2e-5 if dtype == "float32" else 2e-4)
    if len(there) == 3:
        assert_close(wide(there[2]), wide(here[2]), 2e-5 if dtype == "float32" else 2e-3)


FORMS = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]


@pytest.mark.parametrize("keywords", [{}, {"window": 513, "sinks": 7, "sink_logits": 0.5},
                                      {"window": 600, "sinks": 20}, {"causal": False}], ids=str)
@pytest.mark.parametrize("depths", FORMS, ids=str)
def test_long_calls_of_every_depth(depths, keywords, torch):
    """The forms of Hopper's prefill kernel, groups that do not divide its tile, keys beyond all."""
    q, k = (make(torch, 2, h, n, depths[0]) for h, n in ((6, 300), (2, 1300)))
    v = make(torch, 2, 2, 1300, depths[1], seed=2)
    k[1, :, 900:] = v[1, :, 900:] = torch.nan
    lengths = np.array([1300, 900])
    out, lse = attend(q, k, v, lengths=lengths, return_lse=True, **keywords)
    for row, length in enumerate(lengths):
        arrays = (wide(q[row:row + 1]), wide(k[row:row + 1, :, :length]), wide(v[row:row + 1, :, :length]))
        right, right_lse = reference.attend(*arrays, return_lse=True, **keywords)
        assert_close(wide(out[row:row + 1]), right, HALF_RELATIVE["bfloat16"])
        assert_lse_close(wide(lse[row:row + 1]), right_lse, 2e-4)


def test_long_calls_with_everything_that_changes_a_score(torch):
    q, k, v = qkv(torch, heads=(6, 2), queries=700, keys=900, depth=128)
    second, heads = make(torch, *q.shape, seed=9), np.linspace(-1, 1, 6).astype(np.float32)
    keywords = {"window": np.array([600, 900, 550, 700, 0, 1000]), "sinks": 5, "softcap": 4.0,
                "alibi_slopes": heads * 0.01, "sink_bias": heads[:, None] * np.ones((1, 5), np.float32)}
    before = show_config()["cuda_launches"]
    out = attend(q, k, v, sink_q=second, **keywords)
    taken = {name for name, count in show_config()["cuda_launches"].items() if count != before.get(name, 0)}
    assert torch.cuda.get_device_capability() != (9, 0) or taken <= {"prefill_hopper_bf16_featured_128", "stage"}
    right = reference.attend(*map(wide, (q, k, v)), sink_q=wide(second), **keywords)
    assert_close(wide(out), right, HALF_RELATIVE["bfloat16"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("depth", [64, 128])
def test_long_calls_whose_scores_are_negative(depth, dtype, torch):
    """Far below zero, then near it and far again, in the order in which slices of keys are taken."""
    q, k, v = qkv(torch, heads=(4, 2), queries=300, keys=1300, depth=depth, dtype=dtype)
    sizes = torch.where(torch.arange(1300, device="cuda") // 200 % 2 == 0, 3.0, 0.01)
    q, k = q.abs(), -k.abs() * sizes[:, None].to(k.dtype)
    for keywords in ({}, {"window": 700, "sinks": 4}, {"window": 1216, "sinks": 16}):
        out, lse = attend(q, k, v, return_lse=True, **keywords)
        right, right_lse = reference.attend(*map(wide, (q, k, v)), return_lse=True, **keywords)
        assert_close(wide(out), right, HALF_RELATIVE[dtype])
        assert_lse_close(wide(lse), right_lse, 2e-4)


def test_packed_sequences_are_calls_of_their_own(torch):
    cumulative = np.array([0, 300, 300, 333, 1000])
    q, k, v = qkv(torch, batch=1, heads=(6, 2), queries=1000, keys=1000, depth=64)
    out = attend(q, k, v, cu_seqlens_q=cumulative, cu_seqlens_k=cumulative)
    for begin, end in zip(cumulative[:-1], cumulative[1:], strict=True):
        if begin < end:
            alone = attend(*(x[:, :, begin:end].contiguous() for x in (q, k, v)))
            assert_close(wide(out[:, :, begin:end]), wide(alone), HALF_RELATIVE["bfloat16"])


@pytest.mark.parametrize(("keywords", "error", "match"), CASES)
def test_refusals_are_those_of_the_cpu(keywords, error, match, torch):
    """The same words, wherever the arrays are; what torch cannot hold is not asked."""
    arguments = {"q": Q, "k": K, "v": V, **keywords}
    moved = {name: tuple(map(to_device, x)) if name == "sink_kv" and isinstance(x, tuple)
             else to_device(x) if name in ("q", "k", "v", "sink_q", "sink_kv", "out") else x
             for name, x in arguments.items()}
    if any(isinstance(x, np.ndarray) for name, x in moved.items() if name in ("q", "k", "v", "out")):
        pytest.skip("no such tensor in torch")
    if any(word in match for word in ("read-only", "overlaps q", "numpy.ndarray", "has stride -1",
                                      "aligned", "bool8")):
        pytest.skip("a property that the copy to the device does not keep")
    with pytest.raises(error, match=r"attend\(\): .*" + match):
        attend(**moved)


def test_out_that_overlaps_is_refused(torch):
    q, k, v = qkv(torch, heads=(2, 2), keys=1)
    with pytest.raises(ValueError, match="out overlaps q"):
        attend(q, k, v, out=q)


@pytest.mark.parametrize("queries", [1, 16, 130])
def test_a_thousand_repeats_are_equal_bit_for_bit(queries, torch):
    q, k, v = qkv(torch, batch=3, queries=queries, keys=2000, depth=128)
    keywords = {"window": 700, "sinks": 4, "sink_logits": 0.5, "return_lse": True, "return_mass": True}
    first = attend(q, k, v, **keywords)
    busy = torch.randn(2048, 2048, device="cuda")
    other = torch.cuda.Stream()
    for i in range(1000):
        if i % 50 == 0:
            with torch.cuda.stream(other):
                busy @ busy
        again = attend(q, k, v, **keywords)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_results_do_not_depend_on_the_rest_of_the_batch(torch):
    """Nor on what the memory of results held before."""
    q, k, v = qkv(torch, batch=4, keys=900, depth=128)
    whole = attend(q, k, v, window=300, sinks=2)
    assert torch.equal(attend(q, k, v, window=300, sinks=2, out=torch.full_like(whole, torch.nan)), whole)
    alone = attend(q[2:3], k[2:3], v[2:3], window=300, sinks=2)
    assert relative_error(wide(alone), wide(whole[2:3])) < HALF_RELATIVE["bfloat16"]


@pytest.mark.parametrize("count", [1, 5, 60])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_is_that_of_the_cpu(dtype, count, torch):
    """Strided, odd depths, parts that saw nothing or everything; deterministic."""
    for shape in ((2, 3, 50, 128), (3, 7, 33), (16,)):
        outs = [make(torch, *shape, dtype=dtype, seed=i) for i in range(count)]
        lses = [9 * make(torch, *shape[:-1], dtype="float32", seed=99 + i) for i in range(count)]
        for i, (out, lse) in enumerate(zip(outs, lses)):
            lse[torch.rand_like(lse) < 0.2] = -torch.inf
            lse[torch.rand_like(lse) < 0.05 / count] = torch.inf
            out[lse == -torch.inf] = torch.nan
            if len(shape) == 4:
                outs[i] = out.transpose(1, 2).contiguous().transpose(1, 2)
        got, expected = merge(outs, lses), merge([x.cpu() for x in outs], [x.cpu() for x in lses])
        assert_close(wide(got[0]), wide(expected[0]), 2 * HALF_RELATIVE.get(dtype, FP32_RELATIVE))
        assert_lse_close(wide(got[1]), wide(expected[1]))
        assert all(torch.equal(a, b) for a, b in zip(got, merge(outs, lses)))


def test_every_auxiliary_dtype_of_the_device(torch):
    """Read by the kernels as they are: any float and any integer type, strided."""
    q, k, v = qkv(torch, queries=3, dtype="float32")
    logits, bias = torch.arange(16, device="cuda").view(8, 2) / 4, torch.ones(8, 4, device="cuda")
    plain = {"window": 40, "sinks": 4}
    expected = attend(q, k, v, sink_logits=logits.cpu(), sink_bias=bias.cpu(), lengths=[300, 77],
                      alibi_slopes=logits.cpu()[:, 1], **plain)
    for real in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for integer in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
            lengths = torch.tensor([300, 77], device="cuda")
            if integer in (torch.int8, torch.uint8):
                lengths = torch.tensor([100, 77], device="cuda")
            got = attend(q, k, v, sink_logits=logits.to(real), sink_bias=bias.to(real).t().contiguous().t(),
                         lengths=lengths.to(integer), alibi_slopes=logits.to(real)[:, 1], **plain)
            if lengths[0] == 300:
                assert torch.equal(got, expected)
            else:
                assert torch.equal(got[1], expected[1])


def test_lengths_out_of_range_are_clamped_and_checked_on_request(torch, monkeypatch):
    """The host does not read them; kernels stay inside the arrays."""
    q, k, v = qkv(torch, queries=3)
    wild = torch.tensor([10**12, -5], device="cuda")
    for name in ("starts", "lengths", "q_lengths"):
        assert torch.isfinite(attend(q, k, v, **{name: wild}).float()).all()
    for bad in ([0, 10**9], [-4, 300], [0, 150, 20, 300]):
        cu = torch.tensor(bad, device="cuda")
        attend(k[:1], k[:1], v[:1], cu_seqlens_q=cu, cu_seqlens_k=cu)
    torch.cuda.synchronize()
    monkeypatch.setenv("SINKATTN_CHECK", "1")
    with pytest.raises(ValueError, match=r"lengths\[0\] is 1000000000000, expected 0 to 300"):
        attend(q, k, v, lengths=wild)


@pytest.mark.parametrize("name", ["q", "k", "v", "sink_logits", "sink_q"])
def test_a_gradient_is_never_dropped_in_silence(name, torch):
    x = torch.randn(1, 2, 5, 16, device="cuda")
    arguments = {"q": x, "k": x, "v": x, "sink_logits": torch.zeros(2, device="cuda"), "sinks": 1, "sink_q": x}
    arguments[name] = arguments[name].clone().requires_grad_()
    assert attend(**arguments).requires_grad
    with torch.no_grad():
        assert not attend(**arguments).requires_grad


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)])
def test_empty_extents(shape, torch):
    q = torch.ones(shape, device="cuda")
    k = torch.ones(shape[0], 2, 5, 8, device="cuda")
    out, lse, mass = attend(q, k, k, return_lse=True, return_mass=True)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and (mass == 0).all()


def test_more_than_two_to_the_31_elements(torch):
    """Offsets are 64 bits wide; 9 GB of keys and as many of values."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free memory")
    keys = 2**31 // 128 + 1000
    k = torch.empty(2, 1, keys, 128, device="cuda", dtype=torch.bfloat16).normal_()
    v = torch.empty_like(k).normal_()
    q = torch.randn(2, 4, 1, 128, device="cuda").bfloat16()
    out = attend(q, k, v, window=64, sinks=3)
    tail = [torch.cat([x[:, :, :3], x[:, :, -64:]], 2) for x in (k, v)]
    expected = reference.attend(*(wide(x) for x in (q, *tail)))
    assert_close(wide(out), expected, HALF_RELATIVE["bfloat16"])
    whole = attend(q, k, v, return_lse=True)
    del k, v
    assert torch.isfinite(whole[0].float()).all()
    assert (whole[1] > np.log(keys) - 1).all()


def test_out_of_memory_is_survived(torch):
    """The result does not fit; the same arrays serve afterwards."""
    q, k, v = qkv(torch, batch=1, heads=(8, 8), queries=64, keys=64, depth=256)
    free = torch.cuda.mem_get_info()[0]
    huge = q[:, :, :1].expand(1, 8, max(free // (8 * 256 * 2) * 2, 2**27), 256)
    with pytest.raises(MemoryError):
        attend(huge, k, v)
    assert torch.isfinite(attend(q, k, v).float()).all()


def test_fork_is_refused_by_name(torch):
    code = """
import os, torch
from sinkattn import attend
x = torch.ones(1, 1, 1, 8, device="cuda")
attend(x, x, x)
child = os.fork()
if child == 0:
    try:
        attend(x, x, x)
    except RuntimeError as error:
        os._exit(0 if "'spawn'" in str(error) else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert (attend(x, x, x) == 1).all()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_what_ran_is_visible(torch):
    q, k, v = qkv(torch)
    before = sum(show_config()["cuda_launches"].values())
    attend(q, k, v)
    assert sum(show_config()["cuda_launches"].values()) > before


def test_the_wrappers_of_the_suite_keep_what_they_carry(torch):
    """Strides, and the memory between and behind the elements."""
    base = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    for view in (base, base[:, ::2, 1:, :3], np.broadcast_to(base[:1], (4, 3, 4, 5)),
                 base.transpose(1, 0, 2, 3)):
        moved = to_device(view)
        assert moved.stride() == tuple(s // 4 for s in view.strides)
        np.testing.assert_array_equal(moved.cpu().numpy(), view)
    q = np.ones((1, 2, 5, 16), np.float32)
    into = np.zeros((1, 2, 5, 20), np.float32)
    assert wrappers(True)["attend"](q, q, q, out=into[..., :16]) is not None
    assert (into[..., :16] == 1).all() and (into[..., 16:] == 0).all()
