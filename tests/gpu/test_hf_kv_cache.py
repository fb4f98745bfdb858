"""hf.KVCache where model and cache are on the device."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from hf_models import CACHE, build, tokens

from sinkattn import hf
from sinkattn.policy import H2O, KeyDiff, SinkWindow, SnapKV


@pytest.mark.parametrize("policy", [H2O(), SinkWindow(), KeyDiff(), SnapKV(w=4, kernel=3)], ids=repr)
def test_the_gpu_says_what_the_cpu_says(policy, torch):
    """float32, a prompt in one piece and then token by token: the same logits, and the same positions kept."""
    here, ids = hf.enable(build("llama")), tokens(2, 30)
    there = hf.enable(build("llama").cuda())
    kept, logits = [], []
    for model in (here, there):
        cache = hf.KVCache(model.config, policy, budget=10, sinks=2, recent=3 if policy.protects < 4 else 4, every=1, chunk=7)
        edges = [0, 15, *range(16, 31)]
        parts = []
        for begin, end in zip(edges, edges[1:]):
            with torch.no_grad():
                parts.append(model(ids[:, begin:end].to(model.device), **{CACHE: cache}).logits.cpu())
        logits.append(torch.cat(parts, 1))
        kept.append([[[head.tolist() for head in row] for row in layer.stream.kept()] for layer in cache.layers])
    assert kept[0] == kept[1]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 1e-4


def test_generate_evicts_on_the_gpu(torch):
    model, ids = hf.enable(build("llama").cuda()), tokens(2, 12).cuda()
    whole = model.generate(ids, max_new_tokens=20, do_sample=False)
    cache = hf.KVCache(model.config, H2O(), budget=64, sinks=2, recent=4)
    assert model.generate(ids, max_new_tokens=20, do_sample=False, **{CACHE: cache}).tolist() == whole.tolist()
    cache = hf.KVCache(model.config, H2O(), budget=16, sinks=2, recent=4)
    assert model.generate(ids, max_new_tokens=20, do_sample=False, **{CACHE: cache}).shape == whole.shape
    assert [head.evicted for ledger in cache.ledgers() for row in ledger.heads for head in row] == [15] * 8
