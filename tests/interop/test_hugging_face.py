"""Parity with the eager attention of Hugging Face models, random weights."""

import pytest

from sinkattn import attend

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50,
         "max_position_embeddings": 128}


def build(family):
    if family == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM
        return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")), "llama"
    if family == "mistral":
        from transformers import MistralConfig, MistralForCausalLM
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7,
                                                attn_implementation="eager")), "mistral"
    from transformers import GptOssConfig, GptOssForCausalLM
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=7,
                          attn_implementation="eager")
    return GptOssForCausalLM(config), "gpt_oss"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_eager_attention_of_a_model_is_ours(family, monkeypatch):
    """Each layer's q, k, v, window and sinks through attend give what eager gave."""
    torch.manual_seed(0)
    model, name = build(family)
    model.eval()
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
    eager, differences = module.eager_attention_forward, []

    def compare(layer, query, key, value, attention_mask, scaling, **keywords):
        expected = eager(layer, query, key, value, attention_mask, scaling=scaling, **keywords)
        window = getattr(layer, "sliding_window", None) or keywords.get("sliding_window")
        sinks = getattr(layer, "sinks", None)
        ours = attend(query, key, value, scale=scaling, window=window, sink_logits=sinks)
        differences.append((ours.transpose(1, 2) - expected[0]).abs().max().item())
        return expected

    monkeypatch.setattr(module, "eager_attention_forward", compare)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.copy_(torch.randn_like(parameter) + 2)
        model(torch.randint(0, 50, (2, 40)))
    assert len(differences) == 2
    assert max(differences) < 2e-6
