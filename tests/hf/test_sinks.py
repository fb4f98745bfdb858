"""Sink logits that a model did not come with, and the null tokens."""

import copy
import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import CACHE, build, tokens

import sinkattn.hf as hf


def logits_of(model, ids, **keywords):
    with torch.no_grad():
        return model(ids, **keywords).logits


def assert_same(got, expected):
    assert (got - expected).abs().max() <= 5e-6 * expected.abs().max()


def eager_with(model, ids, logits):
    """Eager attention of gpt-oss has a logit per head: the same numbers in the softmax's denominator."""
    from transformers.models.llama import modeling_llama

    def attend(module, query, key, value, mask, scaling, **_):
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        score = query @ key.mT * scaling + mask
        extra = logits[module.layer_idx][None, :, None, None].expand(*score.shape[:3], 1)
        weight = torch.cat([score, extra], -1).softmax(-1)[..., :-1]
        return (weight @ value).transpose(1, 2), weight
    original = modeling_llama.eager_attention_forward
    modeling_llama.eager_attention_forward = attend
    try:
        return logits_of(model, ids)
    finally:
        modeling_llama.eager_attention_forward = original


@pytest.mark.parametrize("form", ["number", "heads", "layers and heads", "list", "parameter",
                                  "parameters"])
def test_set_sink_logits(form):
    ids, model = tokens(2, 20), build("llama")
    table = torch.tensor([[0.5, -1.0, 2.0, 3.0], [1.0, 0.0, -2.0, 4.0]])
    x = {"number": 1.5, "heads": table[0].tolist() and table[0].numpy(), "layers and heads": table,
         "list": [table[0], 1.5], "parameter": torch.nn.Parameter(table.clone()),
         "parameters": [torch.nn.Parameter(row.clone()) for row in table]}[form]
    expected = {"number": torch.full((2, 4), 1.5), "heads": table[0].expand(2, 4),
                "list": torch.stack([table[0], torch.full((4,), 1.5)])}.get(form, table)
    plain = logits_of(model, ids)
    wanted = eager_with(model, ids, expected)
    hf.set_sink_logits(model, x)
    assert_same(logits_of(model, ids), wanted)
    assert_same(logits_of(copy.deepcopy(model), ids), wanted)
    assert_same(logits_of(model, ids, **{CACHE: hf.SinkCache(model.config, window=60)}), wanted)
    trained = [name for name, _ in model.named_parameters() if "sink_logits" in name]
    assert len(trained) == {"parameter": 1, "parameters": 2}.get(form, 0)
    hf.set_sink_logits(model, None)
    assert_same(logits_of(model, ids), plain)
    assert not [name for name, _ in model.named_parameters() if "sink_logits" in name]


def test_beside_a_models_own_sinks():
    """Both enter the denominator: two logits a head are one, log(exp a + exp b)."""
    ids, model = tokens(2, 20), build("gpt_oss")
    changed = copy.deepcopy(model)
    for layer in changed.model.layers:
        layer.self_attn.sinks.data = torch.logaddexp(layer.self_attn.sinks.data, torch.tensor(1.0))
    expected = logits_of(changed, ids)
    hf.set_sink_logits(model, 1.0)
    assert_same(logits_of(model, ids), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_null_tokens_are_a_logit(family):
    """Four zero embeddings before the text, eager, against log 4 in the denominator. The text stands at
    the same positions, the null tokens before it, so that the model's float32 angles are the same."""
    ids, model = tokens(1, 20), build(family)
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings = torch.cat([torch.zeros(1, 4, 64), embeddings], 1)
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, position_ids=torch.arange(-4, 20)[None],
                         use_cache=False, attention_mask=torch.ones(1, 24)).logits[:, 4:]
    plain = logits_of(model, ids)
    hf.null_sinks(model, 4)
    assert_same(logits_of(model, ids), expected)
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()
    hf.null_sinks(model, 0)
    assert_same(logits_of(model, ids), plain)


def test_null_tokens_where_zero_does_not_stay_zero():
    with pytest.raises(NotImplementedError, match=r"null_sinks\(\): model.layers.0.self_attn.k_proj has a bias"):
        hf.null_sinks(build("qwen2"))
    with pytest.raises(NotImplementedError, match="has a bias"):
        hf.null_sinks(build("gpt_neox"))
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM
    with pytest.raises(NotImplementedError, match="wpe is a second embedding"):
        hf.null_sinks(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)))
    with pytest.raises(NotImplementedError, match=r"null_sinks\(\)"):
        hf.null_sinks(OPTForCausalLM(OPTConfig(hidden_size=16, num_hidden_layers=1, ffn_dim=16, vocab_size=50,
                                               num_attention_heads=2, word_embed_proj_dim=16)))
    norm = build("llama")
    norm.model.layers[1].input_layernorm.register_parameter("bias", torch.nn.Parameter(torch.zeros(64)))
    with pytest.raises(NotImplementedError, match=r"layers.1.input_layernorm has a bias"):
        hf.null_sinks(norm)
    mlp = build("llama", mlp_bias=True)
    torch.nn.init.normal_(mlp.model.layers[0].mlp.down_proj.bias)
    with pytest.raises(NotImplementedError, match="layer 1 makes keys that are not zero of zero embeddings"):
        hf.null_sinks(mlp)


def test_another_attention_does_not_drop_them():
    ids, model = tokens(1, 5), build("llama")
    hf.set_sink_logits(model, 1.0)
    model.set_attn_implementation("eager")
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(NotImplementedError, match="now uses the attention 'eager', which would drop"):
            logits_of(one, ids)
    hf.set_sink_logits(model, None)
    model.set_attn_implementation("eager")
    logits_of(model, ids)


def test_arguments():
    model = build("llama")
    with pytest.raises(TypeError, match=r"null_sinks\(\): n is bool, expected an int"):
        hf.null_sinks(model, True)
    with pytest.raises(TypeError, match=r"null_sinks\(\): n is float, expected an int"):
        hf.null_sinks(model, math.pi)
    with pytest.raises(ValueError, match=r"null_sinks\(\): n is -1, expected 0 or more"):
        hf.null_sinks(model, -1)
    with pytest.raises(TypeError, match="x is bool, expected a number"):
        hf.set_sink_logits(model, True)
    with pytest.raises(ValueError, match=r"x has shape \[3\], expected \[\] or \[4\] or \[2, 4\]"):
        hf.set_sink_logits(model, torch.zeros(3))
    with pytest.raises(ValueError, match=r"x has 3 entries, expected 2"):
        hf.set_sink_logits(model, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"x has shape \[2, 4\], expected \[\] or \[4\]"):
        hf.set_sink_logits(model, [torch.zeros(2, 4), 1.0])
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration  # two stacks of layers
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50}
    both = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=small, decoder=small, vocab_size=50))
    with pytest.raises(NotImplementedError, match=r"layer: how many\), expected one for each of 1 layers"):
        hf.set_sink_logits(both, 1.0)
