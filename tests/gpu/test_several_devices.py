"""Two devices: calls and caches of the second while the first is current, both at once, copies from one to the other.

Each call has its twin on the first device: two devices of one kind give the same bits.
"""

import numpy as np
import pytest

from sinkattn import KVCache, Rope, SinkCache, attend, attend_backward, mass, merge
from sinkattn.policy import H2O, SnapKV

CALLS = [{}, {"window": 9, "sinks": 2}, {"window": 300, "sinks": 4, "sink_logits": 0.5}, {"causal": False, "softcap": 3.0},
         {"sink_logits": np.linspace(0, 1, 8, dtype=np.float32), "lengths": np.array([700, 3])}]


@pytest.fixture
def torch(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    yield torch
    assert torch.cuda.current_device() == 0, "the current device was left changed"


def tensors(torch, *counts, batch=2, depth=64, seed=0):
    """q with 8 heads, k and v with 2, of so many tokens: on the first device, and the same on the second."""
    generator = torch.Generator().manual_seed(seed)
    first = [torch.randn(batch, heads, n, depth, generator=generator).bfloat16().cuda(0) for heads, n in zip((8, 2, 2), counts)]
    return first, [x.to("cuda:1") for x in first]


def same(torch, there, here):
    """Results on the second device are those of the first."""
    if isinstance(there, dict):
        there, here = there.values(), here.values()
    if isinstance(there, torch.Tensor):
        assert there.device.index == 1 and here.device.index == 0
        assert torch.equal(there.cpu(), here.cpu())
    else:
        for a, b in zip(there, here, strict=True):
            same(torch, a, b)


@pytest.mark.parametrize("keywords", CALLS, ids=str)
@pytest.mark.parametrize(("queries", "depth"), [(1, 64), (16, 128), (700, 64), (700, 128), (700, 80)])
def test_calls_on_the_device_that_is_not_current(queries, depth, keywords, torch):
    first, second = tensors(torch, queries, 700, 700, depth=depth)
    if "lengths" in keywords:
        keywords = {**keywords, "q_lengths": np.array([queries, min(queries, 2)])}
    results = [attend(*x, return_lse=True, return_mass=True, **keywords) for x in (second, first)]
    same(torch, *results)
    if queries == 700:
        (out, lse, _), (out0, lse0, _) = results
        same(torch, attend_backward(out, *second, out, lse, **keywords), attend_backward(out0, *first, out0, lse0, **keywords))
        if "sink_logits" not in keywords:
            same(torch, mass(*second[:2], lse, **keywords), mass(*first[:2], lse0, **keywords))


def test_merge_and_gradients_on_the_second_device(torch):
    first, second = tensors(torch, 40, 40, 40)
    parts = [[attend(x[0], x[1][:, :, i:i + 20], x[2][:, :, i:i + 20], causal=False, return_lse=True) for i in (0, 20)]
             for x in (second, first)]
    same(torch, *(merge(*zip(*part)) for part in parts))
    gradients = []
    for x in (second, first):
        x = [y.clone().requires_grad_() for y in x]
        attend(*x, window=9, sinks=2, sink_logits=0.5).float().square().sum().backward()
        gradients.append([y.grad for y in x])
    same(torch, *gradients)


MAKERS = {
    "SinkCache": lambda device: SinkCache(2, 2, 64, sinks=4, window=60, rollback=4, rope=Rope.from_theta(64, applied=True),
                                          dtype="bfloat16", device=device),
    "KVCache, H2O": lambda device: KVCache(2, 2, 64, policy=H2O(), budget=60, recent=8, dtype="bfloat16", device=device),
    "KVCache, SnapKV": lambda device: KVCache(2, 2, 64, policy=SnapKV(w=8), budget=60, recent=8, dtype="bfloat16", device=device),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_caches_on_the_device_that_is_not_current(make, torch):
    """Steps, chunks, rows that change places or begin anew, a state from one device to the other."""
    here, there = make("cuda:0"), make("cuda:1")
    assert "cuda:1" in repr(there)
    for step, tokens in enumerate([3, 1, 150, 1, 1, 7, 1]):
        first, second = tensors(torch, tokens, tokens, tokens, seed=step)
        same(torch, there.attend(*second), here.attend(*first))
        if step == 3:
            for cache in (here, there):
                cache.reorder([1, 0]), cache.reset([1])
    assert there.length.tolist() == here.length.tolist() == [164, 9]
    for (name, a), b in zip(there.state_dict().items(), here.state_dict().values()):
        assert np.array_equal(a, b), name
    moved = make("cuda:1")
    moved.load_state_dict(here.state_dict())
    first, second = tensors(torch, 1, 1, 1, seed=9)
    same(torch, moved.attend(*second), here.attend(*first))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_step_captured_on_the_second_device(make, torch):
    cache, twin = make("cuda:1"), make("cuda:1")
    for each in (cache, twin):
        each.attend(*tensors(torch, 100, 100, 100)[1])
    inputs = tensors(torch, 1, 1, 1)[1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        out = cache.attend(*inputs)
    for step in range(5):
        new = tensors(torch, 1, 1, 1, seed=step)[1]
        for target, source in zip(inputs, new):
            target.copy_(source)
        graph.replay()
        assert torch.equal(out, twin.attend(*new))


def test_work_goes_to_the_current_stream_of_its_own_device(torch):
    """Inputs come late on a side stream of the second device; the first is busy, and nobody waits for it."""
    _, (q, k, v) = tensors(torch, 500, 500, 500)
    cache = MAKERS["SinkCache"]("cuda:1")
    expected = attend(q, k, v, window=100), MAKERS["SinkCache"]("cuda:1").attend(q, k, v)
    late = [torch.zeros_like(x) for x in (q, k, v)]
    for device in (0, 1):
        torch.cuda.synchronize(device)
    side, busy = torch.cuda.Stream(1), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    with torch.cuda.stream(side):  # makes the second device current, and its stream
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, (q, k, v)):
            target.copy_(source, non_blocking=True)
        with torch.cuda.device(0):
            got = attend(*late, window=100), cache.attend(*late)
        assert not side.query(), "the call waited"
    side.synchronize()
    assert not busy.query(), "the call waited for the other device"
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    torch.cuda.synchronize(0)


def test_both_devices_at_once(torch):
    """Calls in turns, without a wait between: scratch and counters are each device's own."""
    sets = [tensors(torch, 1, 9000, 9000, seed=seed) for seed in range(2)]
    expected = [[attend(*x, sinks=2, window=8000) for x in pair] for pair in sets]
    got = [[attend(*x, sinks=2, window=8000) for x in pair] for _ in range(50) for pair in sets]
    for at, pair in enumerate(got):
        assert all(torch.equal(a, b) for a, b in zip(pair, expected[at % 2]))


def test_a_result_goes_on_to_the_other_device(torch):
    """Layers on different devices: torch orders the copy behind our work, and our next call behind the copy."""
    (q, k, v), (_, k1, v1) = tensors(torch, 300, 300, 300)
    for device in (0, 1):
        torch.cuda.synchronize(device)
    torch.cuda._sleep(50_000_000)
    got = attend(attend(q, k, v).to("cuda:1", non_blocking=True), k1, v1, window=50)
    twin = attend(attend(q, k, v), k, v, window=50)
    same(torch, got, twin)


def test_tensors_of_both_devices_are_refused_by_name(torch):
    (q, k, v), (q1, k1, v1) = tensors(torch, 5, 5, 5)
    with pytest.raises(ValueError, match=r"attend\(\): k is on cuda:0, expected cuda:1 \(the device of q\)"):
        attend(q1, k, v1)
    with pytest.raises(ValueError, match=r"attend\(\): v is on cuda:1, expected cuda:0 \(the device of q\)"):
        attend(q, k, v1)
    with pytest.raises(ValueError, match=r"attend\(\): out is on cuda:0, expected cuda:1"):
        attend(q1, k1, v1, out=torch.empty_like(q))
    with pytest.raises(ValueError, match=r"attend\(\): lengths is on cuda:0, expected cuda:1"):
        attend(q1, k1, v1, lengths=torch.tensor([5, 5], device="cuda:0"))
    with pytest.raises(ValueError, match=r"attend\(\): sink_logits is on cuda:1, expected cuda:0"):
        attend(q, k, v, sink_logits=torch.zeros(8, device="cuda:1"))
    with pytest.raises(ValueError, match=r"attend\(\): k is on the CPU, expected cuda:1"):
        attend(q1, k.cpu(), v1)
    for make in MAKERS.values():
        cache = make("cuda:1")
        with pytest.raises(ValueError, match=r"q is on cuda:0, expected cuda:1"):
            cache.attend(q, k, v)
        assert cache.length.tolist() == [0, 0]
        with pytest.raises(ValueError, match=rf"device is cuda:{torch.cuda.device_count()}, expected cuda:0 to cuda:"):
            make(f"cuda:{torch.cuda.device_count()}")


def test_a_model_on_the_second_device(torch):
    """generate with a cache there, called and captured, while the first device is current."""
    pytest.importorskip("transformers")
    from hf_models import CACHE, build, left_padded

    import sinkattn.hf as hf
    model = hf.enable(build("llama")).to("cuda:1")
    ids, padding = (x.to("cuda:1") for x in left_padded(2))
    cache, results = hf.SinkCache(model, sinks=2, window=12), []

    def generate():
        cache.reset()
        return model.generate(ids, attention_mask=padding, max_new_tokens=20, min_new_tokens=20, do_sample=False,
                              **{CACHE: cache})
    results.append(generate())
    with hf.capture(model, cache) as guard:
        results.append(generate())
        assert guard.replays == 18
    assert results[0].device.index == 1
    assert torch.equal(*results)
