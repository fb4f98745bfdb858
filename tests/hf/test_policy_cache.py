"""hf.KVCache: what it holds is what sinkattn.KVCache holds, and generate runs on it."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np
from hf_models import CACHE, build, tokens

import sinkattn
from sinkattn import hf
from sinkattn.policy import H2O, KeyDiff, SinkWindow


def stream(model, ids, cache, cuts, mask=None):
    """Logits of all positions, the text entering in pieces."""
    edges, parts = [0, *cuts, ids.shape[1]], []
    for begin, end in zip(edges, edges[1:]):
        seen = {} if mask is None else {"attention_mask": mask[:, :end]}
        with torch.no_grad():
            parts.append(model(ids[:, begin:end], **{CACHE: cache}, **seen).logits)
    return torch.cat(parts, 1)


def close(a, b):
    return float((a - b).norm() / b.norm()) < 5e-6


def test_a_budget_for_everything_changes_nothing():
    model = hf.enable(build("llama"))
    ids = tokens(2, 12)
    expected = build("llama").generate(ids, max_new_tokens=10, do_sample=False, num_beams=2)
    cache = hf.KVCache(model, budget=64, sinks=2, recent=4)
    found = model.generate(ids, max_new_tokens=10, do_sample=False, num_beams=2, **{CACHE: cache})
    assert found.tolist() == expected.tolist()
    assert cache.get_seq_length() == 21
    assert [head.evicted for ledger in cache.ledgers() for row in ledger.heads for head in row] == [0] * 16


def test_a_window_by_policy_is_the_window():
    """Token by token: budget B holds the sinks, the last B - S, and the token itself."""
    model, ids = hf.enable(build("llama")), tokens(1, 40)
    cache = hf.KVCache(model.config, SinkWindow(), budget=12, sinks=3, recent=2)
    found = stream(model, ids, cache, range(1, 40))
    window = hf.SinkCache(model.config, sinks=3, window=10, positions="original")
    assert close(found, stream(model, ids, window, range(1, 40)))
    assert [kept.tolist() for kept in cache.layers[1].stream.kept()[0]] == [[0, 1, 2, *range(31, 40)]] * 2


def test_the_policy_gets_what_the_layer_computes():
    """The first layer's queries and keys, caught on their way, through a KVCache of their own."""
    model, ids, caught = hf.enable(build("llama")), tokens(2, 30), []
    cache = hf.KVCache(model.config, H2O(), budget=10, sinks=2, recent=3, chunk=4)
    layer = cache.layers[0]
    attend = layer.attend

    def catch(query, key, value, mask, **score):
        caught.append([x.clone() for x in (query, key, value)])
        return attend(query, key, value, mask, **score)

    layer.attend = catch
    stream(model, ids, cache, [11, 12, 13])
    own = sinkattn.KVCache(2, 2, 16, policy=H2O(), budget=10, sinks=2, recent=3, chunk=4)
    for query, key, value in caught:
        own.attend(query, key, value)
    assert cache.ledgers()[0].heads[0][0].evicted == 20
    for row, mine in zip(layer.stream.kept(), own.kept()):
        assert [head.tolist() for head in row] == [head.tolist() for head in mine]
    assert any(mine[0].tolist() != mine[1].tolist() for mine in own.kept())


def test_left_padded_rows_are_streams_of_their_own():
    model, ids, mask = hf.enable(build("llama")), tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[1, :9] = 0
    make = lambda: hf.KVCache(model.config, H2O(), budget=10, sinks=2, recent=3)  # noqa: E731
    found = stream(model, ids * mask, make(), range(1, 30), mask)
    assert close(found[:1], stream(model, ids[:1], make(), range(1, 30)))
    assert close(found[1:, 9:], stream(model, ids[1:, 9:], make(), range(1, 21)))


def test_budgets_by_layer_and_layers_that_slide():
    model = hf.enable(build("gemma3"))
    cache = hf.KVCache(model.config, KeyDiff(), budget=[5, 9], sinks=1, recent=2, every=1)
    stream(model, tokens(1, 30), cache, range(1, 30))
    assert len(cache.layers[0].stream.kept()[0]) == 7, "the model's own window"
    assert [len(kept) for kept in cache.layers[1].stream.kept()[0]] == [9, 9]
    assert cache.ledgers()[0] is None and cache.ledgers()[1].heads[0][0].kept == 9
    assert cache.nbytes == sum(layer.stream.nbytes for layer in cache.layers)
    assert "KeyDiff(), budget=[5, 9]" in repr(cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.ledgers()[1].heads[0][0].seen == 0


def test_what_has_left_is_not_taken_back():
    """With every=8 something leaves at 8, 16, 24, ...: until then the newest tokens can be cropped."""
    model, ids = hf.enable(build("llama")), tokens(1, 30)
    cache = hf.KVCache(model.config, H2O(), budget=8, sinks=1, recent=2, every=8)
    before = stream(model, ids, cache, range(1, 30))
    cache.crop(-5)
    again = stream(model, ids[:, 25:], cache, range(1, 5))
    assert cache.get_seq_length() == 30 and close(again, before[:, 25:])
    with pytest.raises(ValueError, match="what a policy evicts is gone"):
        cache.crop(-7)
    assert cache.get_seq_length() == 30


def test_assisted_generation_where_all_is_held():
    model, ids = hf.enable(build("llama")), tokens(1, 12)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    cache = hf.KVCache(model.config, budget=64, sinks=2, recent=4)
    found = model.generate(ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, **{CACHE: cache})
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("make, error, words", [
    (lambda c: hf.KVCache(c, budget=[64]), ValueError, "budget has 1 entries, expected 2"),
    (lambda c: hf.KVCache(c, budget=8), ValueError, "budget"),
    (lambda c: hf.KVCache(c, policy="H2O"), TypeError, "policy is str"),
    (lambda c: hf.KVCache(c, log=0), ValueError, "log is 0, expected 1 or more"),
    (lambda c: hf.KVCache(3), TypeError, r"KVCache\(\): config is int"),
])
def test_bad_arguments_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make(build("llama").config)


def test_recall_of_a_transformers_model_with_a_policy():
    """The measures read with it: a budget for everything recalls what no cache would."""
    from sinkattn import measure
    model = hf.enable(build("llama"))
    heads, alphabet = [[1, 2], [3, 4]], [10, 11, 12]
    plants = measure.plant(np.arange(20, 45), [20, 40], 2, heads=heads, alphabet=alphabet, tail=[5], answer=3, start=None)
    full = measure.recall(measure.huggingface(model), plants)
    kept = measure.recall(measure.huggingface(model, lambda: hf.KVCache(model, budget=200)), plants)
    assert [p.bits.mean for p in kept.first + kept.second] == pytest.approx([p.bits.mean for p in full.first + full.second], abs=1e-4)
