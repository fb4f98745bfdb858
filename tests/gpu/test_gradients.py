"""attend_backward on the device: what the shared suite (numerics/test_backward.py) does not ask."""

import numpy as np
import pytest
from gpu.test_calls import qkv, wide
from numerics.test_backward import HALF_RELATIVE, flat
from tolerance import relative_error

from sinkattn import attend, attend_backward

KEYWORDS = [{}, {"window": 200, "sinks": 4, "sink_logits": 0.7}, {"causal": False, "softcap": 3.0}]


def forward(torch, dtype="bfloat16", queries=700, keys=700, depth=128, **keywords):
    q, k, v = qkv(torch, queries=queries, keys=keys, depth=depth, dtype=dtype)
    out, lse = attend(q, k, v, return_lse=True, **keywords)
    return torch.randn_like(out.float()).to(out.dtype), q, k, v, out, lse


@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
@pytest.mark.parametrize("depth", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cpu_and_the_gpu_agree(dtype, depth, keywords, torch):
    call = forward(torch, dtype, depth=depth, **keywords)
    there = flat(attend_backward(*call, **keywords))
    here = flat(attend_backward(*(x.cpu() for x in call), **keywords))
    for name, gradient in there.items():
        assert relative_error(wide(gradient), wide(here[name])) <= 2 * HALF_RELATIVE.get(dtype, 1e-5), name


ONE_PASS = [{}, {"causal": False}, {"window": 200, "sinks": 4, "sink_logits": 0.7},
            {"window": [10, 0, 300, 64, 5, 9, 0, 1], "lengths": [600, 700], "starts": [40, 0], "q_lengths": [300, 130]}]


@pytest.mark.parametrize("keywords", ONE_PASS, ids=str)
@pytest.mark.parametrize(("dtype", "depth", "queries"), [("bfloat16", 128, 700), ("float16", 64, 300), ("float16", 104, 700)])
def test_sums_in_any_order_are_close_to_those_in_order(dtype, depth, queries, keywords, torch):
    """deterministic=False: other kernels on Hopper. Rows of infinite lse and keys that no query sees are not felt."""
    call = forward(torch, dtype, queries=queries, depth=depth, **keywords)
    expected = flat(attend_backward(*call, **keywords))
    dout, q, k, v, out, lse = (x.clone() for x in call)
    if "starts" in keywords:
        k[0, :, :40] = v[0, :, :40] = k[0, :, 640:] = torch.nan
    silent = lse.isinf()
    dout[silent] = q[silent] = torch.nan
    got = flat(attend_backward(dout, q, k, v, out, lse, deterministic=False, **keywords))
    for name, gradient in got.items():
        assert relative_error(wide(gradient), wide(expected[name])) <= HALF_RELATIVE[dtype], name


def test_packed_sequences_and_learned_keys_in_any_order(torch):
    q, k, v = qkv(torch, batch=1, queries=500, keys=500, depth=128)
    keywords = {"cu_seqlens_q": [0, 130, 130, 500], "cu_seqlens_k": [0, 90, 150, 500], "window": 150,
                "sink_kv": tuple(x[0, :, :3].contiguous() for x in (k, v)), "sink_logits": [np.inf, *range(7)]}
    out, lse = attend(q, k, v, return_lse=True, **keywords)
    expected, got = (flat(attend_backward(out, q, k, v, out, lse, deterministic=same, **keywords)) for same in (True, False))
    for name, gradient in got.items():
        assert relative_error(wide(gradient), wide(expected[name])) <= HALF_RELATIVE["bfloat16"], name


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_as_close_as_twice_torchs_own(deterministic, dtype, torch):
    """Against float64, beside autograd through torch's attention in the same half type."""
    dout, q, k, v, out, lse = forward(torch, dtype, depth=64)

    def autograd(kind):
        tensors = [x.clone().to(kind).requires_grad_() for x in (q, k, v)]
        groups = [x.repeat_interleave(4, 1) for x in tensors[1:]]
        scores = tensors[0] @ groups[0].transpose(-1, -2) * 64**-0.5
        mask = torch.ones(700, 700, dtype=torch.bool, device="cuda").tril()
        result = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ groups[1]
        return torch.autograd.grad(result, tensors, dout.to(kind))

    exact, peer = autograd(torch.float64), autograd(out.dtype)
    got = attend_backward(dout, q, k, v, out, lse, deterministic=deterministic)
    for name, expected, theirs in zip("qkv", exact, peer):
        ours = relative_error(wide(got[name]), wide(expected))
        assert ours <= 2 * relative_error(wide(theirs), wide(expected)) + 1e-6, name


def test_repeats_are_equal_bit_for_bit_also_beside_other_work(torch):
    keywords = {"window": 300, "sinks": 4, "sink_logits": 0.5, "sink_bias": np.zeros((8, 4), np.float32)}
    call = forward(torch, **keywords)
    first = flat(attend_backward(*call, **keywords))
    busy, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for i in range(200):
        if i % 20 == 0:
            with torch.cuda.stream(other):
                busy @ busy
        again = flat(attend_backward(*call, **keywords))
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_captured_call_is_replayed(torch):
    """New content of the same memory; arrays of the host are part of the graph."""
    keywords = {"window": 100, "sinks": 2, "sink_logits": [0.1 * i for i in range(8)]}
    call = forward(torch, **keywords)
    attend_backward(*call, **keywords)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend_backward(*call, **keywords)
    call[0].copy_(torch.randn_like(call[0].float()))
    graph.replay()
    for name, expected in attend_backward(*call, **keywords).items():
        assert torch.equal(got[name], expected), name
