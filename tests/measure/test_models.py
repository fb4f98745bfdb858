"""Probe, stream and the shipped model: against dense attention and sums written out."""

from functools import partial

import numpy as np
import pytest
from readers import Amnesiac, Perfect

from sinkattn import KVCache, Rope, SinkCache, attend, measure, policy
from sinkattn.demo.methods import Dense
from sinkattn.demo.text import held_out_text
from sinkattn.measure.probe import summarise
from sinkattn.reference import rotate

TEXT = np.frombuffer(held_out_text()[0], np.uint8)


def tokens(rows, length):
    return np.stack([np.concatenate([[256], TEXT[1000 * r:1000 * r + length]]) for r in range(rows)])


@pytest.mark.parametrize("applied", [False, True])
def test_full_cache_is_dense_attention_however_it_is_cut(applied):
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, h, 150, 16), dtype=np.float32) for h in (4, 2, 2))
    cache, position = measure.FullCache(2, 2, 16, rope=Rope.from_theta(16, applied=applied)), np.arange(150)
    turned = [x if applied else rotate(x, position, Rope.from_theta(16)).astype(np.float32) for x in (q, k)]
    expected, mass = attend(*turned, v, return_mass=True)
    parts = [cache.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 64), (64, 65))]
    twin = cache.copy()
    for own in (cache, twin):
        last = own.attend(q[:, :, 65:], k[:, :, 65:], v[:, :, 65:], return_mass=True)
        np.testing.assert_allclose(np.concatenate([*parts, last[0]], axis=2), expected, atol=1e-5)
        assert last[1].shape == mass.shape
    assert cache.length.tolist() == [150, 150] and cache.kept()[1].tolist() == list(range(150))
    assert cache.nbytes == 150 * 2 * 2 * 32 * 4


@pytest.mark.parametrize("step", [1, 5])
def test_a_probe_sees_what_was_lost(step):
    """Every sample against attention over the whole stream, the mask written out from sinks and window."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, h, 40, 8)).astype(np.float32) for h in (4, 2, 2))
    probe = measure.Probe(SinkCache(2, 2, 8, sinks=2, window=9), 2, 2, 8, top=3, sinks=2)
    for begin in range(0, 40, step):
        part = slice(begin, begin + step)
        probe.attend(q[:, :, part], k[:, :, part], v[:, :, part])
    weights = measure.weights(q, k)
    full = weights @ np.repeat(v, 2, axis=1)
    seen = [j < 2 or i - 9 < j for i in range(40) for j in range(40)]
    seen = np.reshape(seen, (40, 40)) & np.tri(40, dtype=bool)
    cut = np.where(seen, weights, 0)
    out = cut / cut.sum(axis=-1, keepdims=True) @ np.repeat(v, 2, axis=1)
    assert [sample["position"] for sample in probe.samples] == list(range(0, 40, step))
    for sample in probe.samples:
        i = sample["position"]
        group = weights[:, :, i, :i + 1].reshape(2, 2, 2, i + 1).mean(axis=2)
        np.testing.assert_allclose(sample["loss"], (group * ~seen[i, :i + 1]).sum(axis=-1), atol=1e-6)
        np.testing.assert_allclose(sample["least"], np.sort(group, axis=-1)[..., :max(i - 10, 0)].sum(axis=-1), atol=1e-6)
        np.testing.assert_allclose(sample["sinks"], group[..., :2].sum(axis=-1), atol=1e-6)
        heaviest = np.argsort(group, axis=-1)[..., -3:]
        np.testing.assert_array_equal(sample["top"], seen[i][heaviest].mean(axis=-1))
        gap = np.linalg.norm(out[:, :, i] - full[:, :, i], axis=-1) / np.linalg.norm(full[:, :, i], axis=-1)
        np.testing.assert_allclose(sample["error"], gap, atol=1e-5)
    found = summarise([probe, probe.copy()], since=20)
    late = [sample for sample in probe.samples if sample["position"] >= 20]
    assert found.loss.mean == pytest.approx(np.mean([sample["loss"] for sample in late]))
    assert np.shape(found.loss_by_head) == (2, 2) and np.shape(found.error_by_head) == (2, 4)
    assert found.queries == len(late) and found.loss.count == 2
    np.testing.assert_allclose(found.sink_by_head[1], np.mean([s["sinks"] for s in late], axis=(0, 1)))


def test_a_probe_passes_calls_on():
    x = np.ones((1, 2, 3, 8), np.float32)
    plain, probe = (SinkCache(1, 2, 8, sinks=1, window=4) for _ in range(2))
    probe = measure.Probe(probe, 1, 2, 8, every=2)
    for _ in range(4):
        expected = plain.attend(x, x, x, sink_logits=0.5, return_lse=True)
        found = probe.attend(x, x, x, sink_logits=0.5, return_lse=True)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    assert [sample["position"] for sample in probe.samples] == [0, 6]
    assert probe.nbytes == plain.nbytes and probe.length == plain.length
    assert probe.kept()[0].tolist() == plain.kept()[0].tolist()


def test_the_shipped_model_reads_as_in_the_demo():
    config_of = measure.shipped()(1).model.config
    model, dense = measure.shipped(), Dense(config_of, 2, 90)
    expected = model(2).model.forward(tokens(2, 89), dense)
    reader = model(2)
    logits = [reader.read(tokens(2, 89)[:, a:b]) for a, b in ((0, 50), (50, 90))]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=2e-3)
    twin = reader.copy()
    np.testing.assert_array_equal(twin.read([[65], [66]]), reader.read([[65], [66]]))
    assert reader.nbytes == 91 * 2 * config_of.layers * config_of.heads_kv * config_of.head_depth * 8


def test_bits_along_a_stream():
    """From the logits, by the definition; and no worse than no model at all."""
    model = measure.shipped(partial(SinkCache, sinks=4, window=28))
    found = measure.bits(model, tokens(2, 60), chunk=7, buckets=[[0, 20], [20, 60]])
    logits = model(2).read(tokens(2, 60)[:, :-1]).astype(np.float64)
    chance = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    cost = -np.log2([[chance[r, i, t] for i, t in enumerate(tokens(2, 60)[r, 1:])] for r in range(2)])
    assert [b.mean for b in found.bits] == pytest.approx([cost[:, :20].mean(), cost[:, 20:].mean()], abs=1e-3)
    assert found.bits[1].mean < 4 and found.bits[0].count == 2 and found.tokens_per_second > 0
    assert found.perplexity[1] == pytest.approx(2 ** found.bits[1].mean)
    assert found.nbytes == model(2).nbytes
    assert measure.bits(Amnesiac, np.full((1, 701), 97)).buckets == [[0, 512], [512, 700]]


def test_a_model_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    rows = np.random.default_rng(0).integers(0, 64, (2, 20))
    with torch.no_grad():
        expected = llama(torch.tensor(rows)).logits.numpy()
    for model in (measure.huggingface(llama), measure.huggingface(llama, transformers.DynamicCache)):
        reader = model(2)
        first = reader.read(rows[:, :11])
        twin = reader.copy()
        for own in (reader, twin):
            np.testing.assert_allclose(np.concatenate([first, own.read(rows[:, 11:])], axis=1), expected, atol=1e-5)
        assert reader.nbytes == 2 * 2 * 2 * 20 * 8 * 2 * 4


@pytest.mark.parametrize("call, error, words", [
    (lambda: measure.bits(Perfect, np.ones((2, 5))), TypeError, "tokens have dtype float64"),
    (lambda: measure.bits(Perfect, np.ones((2, 1), int)), ValueError, r"tokens have shape \[2, 1\]"),
    (lambda: measure.bits(Perfect, np.ones((2, 5), int), buckets=[[0, 5]]), ValueError, r"buckets has \[0, 5\]"),
    (lambda: measure.bits(Perfect, np.ones((2, 5), int), chunk=2.0), TypeError, "chunk is float"),
    (lambda: measure.bits(lambda rows: type("No", (), {"read": lambda self, t: np.zeros((1, 1, 9))})(), np.ones((2, 5), int)),
     ValueError, r"logits of shape \[1, 1, 9\]"),
    (lambda: measure.Probe(None, 1, 1, 8, every=0), ValueError, "every is 0"),
    (lambda: measure.Probe(SinkCache(1, 1, 8), 1, 1, 8).attend(None, None, None, new_lengths=[1]), NotImplementedError, "new_lengths"),
    (lambda: summarise([measure.Probe(SinkCache(1, 1, 8), 1, 1, 8)]), ValueError, "no sampled query"),
])
def test_bad_streams_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("step", [1, 4])
def test_a_probe_sees_what_a_policy_lost(step):
    """With ten kept by a random draw: a query saw what was held before its call, and itself."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, h, 40, 8)).astype(np.float32) for h in (4, 2, 2))
    make = partial(KVCache, 2, 2, 8, policy=policy.Random(), budget=10, sinks=2, recent=3)
    plain, probe = make(), measure.Probe(make(), 2, 2, 8)
    weights = measure.weights(q, k)
    for i in range(0, 40, step):
        part, seen = slice(i, i + step), np.zeros((2, 2, i + 1), bool)
        for row, head in np.ndindex(2, 2):
            seen[row, head, [*plain.kept()[row][head], i]] = True
        out = plain.attend(q[:, :, part], k[:, :, part], v[:, :, part])
        probe.attend(q[:, :, part], k[:, :, part], v[:, :, part])
        group = weights[:, :, i, :i + 1].reshape(2, 2, 2, i + 1).mean(axis=2)
        np.testing.assert_allclose(probe.samples[-1]["loss"], np.where(seen, 0, group).sum(axis=-1), atol=1e-6)
        cut = weights[:, :, i, :i + 1] * np.repeat(seen, 2, axis=1)
        expected = np.einsum("bhj,bhjd->bhd", cut / cut.sum(axis=-1, keepdims=True), np.repeat(v, 2, axis=1)[:, :, :i + 1])
        np.testing.assert_allclose(out[:, :, 0], expected, atol=1e-5)
    assert probe.samples[-1]["loss"].min() > 0.1
