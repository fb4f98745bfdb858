"""Order: the caller's stream, captured graphs, other libraries' streams, no waiting."""

import numpy as np
import pytest

from sinkattn import Rope, SinkCache, attend

MAKING = {"sinks": 4, "window": 60, "dtype": "bfloat16", "device": "cuda"}


def chunk(torch, tokens=1, batch=2, heads=(8, 2), depth=64, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return tuple(torch.randn(batch, h, tokens, depth, device="cuda", generator=generator).bfloat16()
                 for h in (heads[0], heads[1], heads[1]))


def test_work_goes_to_the_current_stream(torch):
    """On a side stream the inputs are ready late; on the default stream they would not be."""
    q, k, v = (x.contiguous() for x in chunk(torch, 500))
    expected = attend(q, k, v, window=100)
    late = [torch.zeros_like(x) for x in (q, k, v)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, (q, k, v)):
            target.copy_(source, non_blocking=True)
        out = attend(*late, window=100)
        assert not side.query(), "the call waited"
    side.synchronize()
    assert torch.equal(out, expected)


def test_two_interleaved_streams_do_not_disturb_each_other(torch):
    """Scratch and counters are not shared by calls that overlap."""
    sets = [chunk(torch, 1, seed=i) for i in range(2)]
    keys = [chunk(torch, 9000, seed=9 + i)[1:] for i in range(2)]
    expected = [attend(q, *kv, sinks=2, window=8000) for (q, _, _), kv in zip(sets, keys)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(200):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(attend(sets[i][0], *keys[i], sinks=2, window=8000))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(x, expected[i]) for x in got[i])


@pytest.mark.parametrize("queries", [1, 40])
def test_a_captured_call_replays_on_new_contents(queries, torch):
    """Host arrays are part of the graph, not addresses that are gone when it runs."""
    q, k, v = chunk(torch, 700)
    q = q[:, :, :queries].contiguous()
    lengths = torch.tensor([700, 700], device="cuda")

    def call():
        return attend(q, k, v, window=90, sinks=3, lengths=lengths, return_lse=True,
                      sink_logits=np.linspace(0, 1, 8, dtype=np.float32))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the first call of all may be a captured one
        out, lse = call()
    for step in range(3):
        for x in (q, k, v):
            x.normal_()
        lengths.copy_(torch.tensor([700 - step, 300 + step]))
        graph.replay()
        expected = call()
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("rope", [None, Rope.from_theta(64), Rope.from_theta(64, applied=True)],
                         ids=["none", "raw", "applied"])
def test_a_captured_step_of_64_layers_replays_for_a_whole_generation(rope, torch):
    """Lengths live on the device: the same graph appends, evicts and wraps by itself."""
    caches, twins = ([SinkCache(2, 2, 64, rope=rope, **MAKING) for _ in range(64)] for _ in range(2))
    q, k, v = (x.expand(64, *x.shape).contiguous() for x in chunk(torch))
    first = chunk(torch, 5, seed=1)
    for cache, twin in zip(caches, twins):
        cache.attend(*first), twin.attend(*first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [cache.attend(q[i], k[i], v[i]) for i, cache in enumerate(caches)]
    assert caches[0].length.tolist() == [5, 5]
    for step in range(200):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        if step % 20 == 0 or step > 195:
            for i in (0, 31, 63):
                assert torch.equal(outs[i], twins[i].attend(q[i], k[i], v[i]))
        else:
            for i in (0, 31, 63):
                twins[i].attend(q[i], k[i], v[i])
    assert caches[63].length.tolist() == [205, 205]
    np.testing.assert_array_equal(caches[31].kept()[1], twins[31].kept()[1])


def test_ten_thousand_replayed_steps_end_in_the_right_window(torch):
    cache = SinkCache(1, 2, 64, **MAKING)
    q, k, v = chunk(torch, batch=1)
    pinned = [x.clone() for x in chunk(torch, 4, batch=1, seed=3)]
    cache.attend(*pinned)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.attend(q, k, v)
    tail = []
    for step in range(10_000):
        for x in (q, k, v):
            x.normal_()
        if step >= 10_000 - 60:
            tail.append((k.clone(), v.clone()))
        graph.replay()
    keys, values = (torch.cat([pinned[1 + i], *(t[i] for t in tail)], 2) for i in range(2))
    assert cache.length.tolist() == [10_004]
    expected = attend(q.float(), keys.float(), values.float())
    assert (out.float() - expected).norm() <= 8e-3 * expected.norm()


def test_a_call_does_not_wait(torch):
    """200 calls return while the device is still busy with what came before."""
    q, k, v = chunk(torch, 64)
    cache = SinkCache(2, 2, 64, **MAKING)
    lengths = torch.tensor([64, 3], device="cuda")
    attend(q, k, v, window=9, lengths=lengths, sink_logits=[0.0] * 8, return_mass=True)
    cache.attend(q, k, v)
    cache.reset([0])
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    for _ in range(50):
        attend(q, k, v, window=9, lengths=lengths, sink_logits=[0.0] * 8, return_mass=True)
        cache.attend(q, k, v)
        cache.reset([0])
        cache.reorder([1, 0])
    done.record()
    assert not done.query()
    torch.cuda.synchronize()
