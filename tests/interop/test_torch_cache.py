"""SinkCache in a torch tensor: the step as an operator that says what it changes."""

import copy

import numpy as np
import pytest

import sinkattn
from sinkattn import Rope

torch = pytest.importorskip("torch")

from torch._dynamo.utils import counters

from sinkattn.torch import SinkCache, schema

FORMS = {"plain": {}, "rope": {"rope": Rope.from_theta(16), "rollback": 3},
         "original, half": {"rope": Rope.from_theta(8, interleaved=True), "positions": "original",
                            "dtype": torch.bfloat16, "v_head_dim": 8}}
BACKEND = {"backend": "aot_eager", "fullgraph": True}


def pair_of_caches(form):
    keywords = {"sinks": 2, "window": 6, **FORMS[form]}
    return SinkCache(2, 2, 16, **keywords), sinkattn.SinkCache(2, 2, 16, **keywords)


def chunk(tokens, form="plain"):
    dtype, depth_v = FORMS[form].get("dtype", torch.float32), FORMS[form].get("v_head_dim", 16)
    return [torch.randn(2, heads, tokens, depth, dtype=dtype) for heads, depth in ((4, 16), (2, 16), (2, depth_v))]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_step_is_the_step(form):
    """Chunks of any length, compiled and not in turn, in one cache."""
    ours, plain = pair_of_caches(form)
    keywords = {"sink_logits": 0.3, "softcap": 20.0, "return_lse": True, "return_mass": True}
    step = torch.compile(lambda *x: ours.attend(*x, **keywords), **BACKEND)
    for tokens, call in ((3, step), (1, step), (1, ours.attend), (9, step), (1, step), (1, step)):
        tensors = chunk(tokens, form)
        got = call(*tensors, **({} if call is step else keywords))
        for a, b in zip(got, plain.attend(*tensors, **keywords)):
            same(a, b)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 3
    same(*(torch.from_numpy(c.length) for c in (ours, plain)))


@pytest.mark.parametrize("form", FORMS)
def test_torchs_own_checks(form):
    """The state is all in the declared tensor: a copy of it is a copy of the cache."""
    cache, _ = pair_of_caches(form)
    cache.attend(*chunk(9, form))
    logits, rows = torch.randn(4), torch.tensor([1, 2])
    for rest in ((), (rows, logits, None, None, None, 0.5, None, None, True)):
        torch.library.opcheck(schema.cache_attend, (cache.storage, *chunk(2, form), *cache._schema_config, *rest))


def test_no_step_is_dropped_repeated_or_moved():
    """Two equal steps in a graph, the first one's result unused: a pure operator would run once."""
    ours, plain = pair_of_caches("plain")
    x = chunk(2)

    def steps(*x):
        ours.attend(*x)
        return ours.attend(*x)
    compiled = torch.compile(steps, **BACKEND)
    for _ in range(3):
        plain.attend(*x)
        same(compiled(*x), plain.attend(*x))
    assert ours.length.tolist() == [12, 12]


def test_rows_out_and_learned_rows_under_a_compiler():
    ours, plain = pair_of_caches("plain")
    tensors, into = chunk(3), torch.empty(2, 4, 3, 16)
    rows = (torch.randn(2, 1, 16), torch.randn(2, 1, 16))
    step = torch.compile(lambda q, k, v, out: ours.attend(q, k, v, new_lengths=[3, 1], out=out, sink_kv=rows,
                                                          sink_bias=torch.ones(4, 2)), **BACKEND)
    assert step(*tensors, into) is into
    same(into, plain.attend(*tensors, new_lengths=[3, 1], sink_kv=rows, sink_bias=torch.ones(4, 2)))


@pytest.mark.parametrize("name", ["q", "v"])
def test_gradients_are_refused_compiled_or_not(name):
    cache, _ = pair_of_caches("plain")
    given = dict(zip("qkv", chunk(2)))
    given[name].requires_grad_()
    for call in (cache.attend, lambda q, k, v: schema.cache_attend(cache.storage, q, k, v, *cache._schema_config)):
        with pytest.raises(NotImplementedError, match=rf"SinkCache.attend\(\): {name} requires grad"):
            call(**given)
    with pytest.raises(Exception, match=rf"SinkCache.attend\(\): {name} requires grad"):
        torch.compile(cache.attend, **BACKEND)(**given)
    assert cache.length.tolist() == [0, 0]
    with torch.no_grad():
        torch.compile(cache.attend, **BACKEND)(**given)
    assert cache.length.tolist() == [2, 2]


def test_the_other_methods_work_on_the_tensor():
    ours, plain = pair_of_caches("rope")
    for cache in (ours, plain):
        torch.manual_seed(1)
        cache.attend(*chunk(9))
        cache.crop(8)
        cache.reorder([1, 1])
    twins = ours.copy(), copy.deepcopy(ours)
    tensors = chunk(1)
    first, second = plain.attend(*tensors), plain.attend(*tensors)
    again = SinkCache(2, 2, 16, sinks=2, window=6, **FORMS["rope"])
    again.load_state_dict(ours.state_dict())
    for cache in (*twins, again, ours):
        same(cache.attend(*tensors), first)
        same(torch.compile(cache.attend, **BACKEND)(*tensors), second)
    assert len({cache.storage.data_ptr() for cache in (*twins, again, ours)}) == 4
    ours.reset()
    assert ours.length.tolist() == [0, 0] and twins[0].length.tolist() == [10, 10]


def test_a_plain_cache_lives_in_any_array():
    """And is emptied there."""
    room = np.full(20000, 7, np.uint8)[:16000]
    cache, own = (sinkattn.SinkCache(2, 2, 16, sinks=2, window=6, storage=s) for s in (room, None))
    x = np.ones((2, 2, 9, 16), np.float32)
    np.testing.assert_array_equal(cache.attend(x, x, x), own.attend(x, x, x))
    assert cache.nbytes == own.nbytes and (room[:cache.nbytes // 2].view(np.float32)[:16] == 1).all()


@pytest.mark.parametrize(("word", "value", "match"), [
    (0, -1, r"SinkCache\(\): length\[0\] is -1, expected"),
    (2, 99, r"SinkCache\(\): low\[0\] is 99, expected 3 to 9"),
])
def test_a_storage_that_lies_is_refused(word, value, match):
    """Numbers in it decide where memory is read."""
    cache, _ = pair_of_caches("plain")
    cache.attend(*chunk(9))
    at = cache.nbytes // 8 - 4
    assert cache.storage.view(torch.int64)[at:at + 4].tolist() == [9, 9, 3, 3]
    cache.storage.view(torch.int64)[at + word] = value
    with pytest.raises(ValueError, match=match):
        schema.cache_attend(cache.storage, *chunk(1), *cache._schema_config)
    with pytest.raises(ValueError, match=r"storage has 100 bytes, expected at least"):
        schema.cache_attend(cache.storage[:100], *chunk(1), *cache._schema_config)
