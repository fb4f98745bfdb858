"""KVCache on the device: what the shared suite (fixtures `table`, `device`) does not ask."""

import numpy as np
import pytest

from sinkattn import KVCache, show_config
from sinkattn.policy import (
    CUR,
    H2O,
    H2OEMA,
    TOVA,
    H2ONorm,
    KeyDiff,
    KNorm,
    Random,
    Scissorhands,
    SinkWindow,
    SnapKV,
    VLengthH2O,
)

POLICIES = [SinkWindow(), H2O(), H2ONorm(), H2OEMA(0.9), VLengthH2O(), Scissorhands(5), TOVA(),
            SnapKV(w=8, kernel=3), KNorm(), KeyDiff(), CUR(5), Random(7)]


def chunk(torch, tokens=1, batch=2, heads=(8, 2), depth=64, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return tuple(torch.randn(batch, h, tokens, depth, device="cuda", generator=generator).bfloat16()
                 for h in (heads[0], heads[1], heads[1]))


def positions(cache):
    return [[kept.tolist() for kept in row] for row in cache.kept()]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_the_gpu_keeps_what_the_cpu_keeps(policy, torch):
    """float32: scores differ by rounding, and no two of this stream are so close."""
    making = {"policy": policy, "budget": 60, "sinks": 2, "recent": 9, "chunk": 39}
    here, there = (KVCache(2, 2, 64, device=device, **making) for device in ("cpu", "cuda"))
    for step, tokens in enumerate([3, 50, 1, 1, 0, 1, 130, 1, 1, 7]):
        q, k, v = (x.float() for x in chunk(torch, tokens, seed=step))
        out = here.attend(q.cpu(), k.cpu(), v.cpu())
        assert torch.allclose(there.attend(q, k, v).cpu(), out, atol=2e-5)
        assert positions(there) == positions(here), step
    assert [[head.forgotten for head in row] for row in there.ledger.heads] == [
        [head.forgotten for head in row] for row in here.ledger.heads]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_captured_step_replays(policy, torch):
    """Everything that a step changes lives on the device: replayed or called, the same bits."""
    cache = KVCache(2, 2, 64, policy=policy, budget=128, sinks=4, recent=16, dtype="bfloat16",
                    device="cuda")
    cache.attend(*chunk(torch, 200))
    other = cache.copy()
    q, k, v = chunk(torch, seed=1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = cache.attend(q, k, v)
    for step in range(12):
        new = chunk(torch, seed=step + 5)
        for target, source in zip((q, k, v), new):
            target.copy_(source)
        graph.replay()
        assert torch.equal(other.attend(*new), out)
    for (name, a), b in zip(cache.state_dict().items(), other.state_dict().values()):
        assert np.array_equal(a, b), name


def test_a_long_prompt_never_holds_more_than_budget_and_chunk(torch):
    """Measured where torch's allocator counts: 100 000 tokens whose keys and values are 51 MB."""
    q, k, v = chunk(torch, 100_000, batch=1, heads=(2, 2))
    out = torch.empty_like(q)
    before = torch.cuda.memory_allocated()
    cache = KVCache(1, 2, 64, policy=H2O(), budget=1024, dtype="bfloat16", device="cuda")
    torch.cuda.reset_peak_memory_stats()
    cache.attend(q, k, v, out=out)
    slots = 1024 + 128
    assert torch.cuda.max_memory_allocated() - before < 2 * cache.nbytes < 3 * 2 * slots * (2 * 64 * 2 + 40)
    assert [len(kept) for kept in cache.kept()[0]] == [1024, 1024] and cache.length.tolist() == [100_000]


def test_work_goes_to_the_current_stream(torch):
    cache = KVCache(2, 2, 64, budget=64, recent=8, dtype="bfloat16", device="cuda")
    expected = cache.copy().attend(*chunk(torch, 30))
    late = [torch.zeros_like(x) for x in chunk(torch, 30)]
    source = chunk(torch, 30)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, x in zip(late, source):
            target.copy_(x, non_blocking=True)
        out = cache.attend(*late)
        assert not side.query(), "the call waited"
    side.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("policy", [SinkWindow(), H2O(), H2ONorm(), H2OEMA(0.9)], ids=repr)
@pytest.mark.parametrize("budget, batch", [(60, 2), (1500, 1), (4096, 8)])
def test_a_step_in_one_launch_is_one_in_three(policy, budget, batch, torch):
    """With its mass wanted a step goes through the kernels of longer calls: the same but for the order of sums."""
    def launches():
        return show_config()["cuda_launches"].get("decode_evict_bf16_128", 0)
    making = {"policy": policy, "budget": budget, "recent": 16, "dtype": "bfloat16", "device": "cuda"}
    heads = (32, 8)
    cache = KVCache(batch, 8, 128, **making)
    cache.attend(*chunk(torch, budget - 2, batch=batch, heads=heads, depth=128))
    other, before = cache.copy(), launches()
    for step in range(20):
        new = chunk(torch, batch=batch, heads=heads, depth=128, seed=step + 1)
        out, lse = cache.attend(*new, return_lse=True)
        expected, sums, _ = other.attend(*new, return_lse=True, return_mass=True)
        assert torch.allclose(out.float(), expected.float(), atol=1e-2) and torch.allclose(lse, sums, atol=1e-5)
    assert launches() == before + 20
    assert positions(cache) == positions(other)
    for a, b in zip(cache.ledger.heads[-1], other.ledger.heads[-1]):
        assert (a.evicted, a.forgotten) == (b.evicted, b.forgotten) and a.mass == pytest.approx(b.mass, rel=1e-5)
