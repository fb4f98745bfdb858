"""Small random models of Hugging Face families, with weights large enough that attention matters."""

import importlib
import inspect

import torch
import transformers

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50,
         "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": None,
         "eos_token_id": None}

# family -> (prefix of its classes, what its config has beside SIZES)
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gpt_oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 7}),
    "gemma2": ("Gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"sliding_window": 7, "query_pre_attn_scalar": 16,
                          "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "cohere": ("Cohere", {}),
}
EVERY = list(FAMILIES)


def build(family, attention="eager", **more):
    """In evaluation mode, the same weights every time."""
    prefix, own = FAMILIES[family]
    name = "Gemma3TextConfig" if family == "gemma3" else f"{prefix}Config"
    config = getattr(transformers, name)(**{**SIZES, **own, **more})
    torch.manual_seed(3)
    model = getattr(transformers, f"{prefix}ForCausalLM")._from_config(
        config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_().add_(2)
            elif parameter.ndim > 1:
                parameter.mul_(8)
    return model


def modeling(model):
    """The module that a model's code is in."""
    return importlib.import_module(type(model).__module__)


def tokens(*shape, seed=5):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(batch=3, length=12, seed=5):
    """(ids, attention_mask): row 0 whole, the others padded on the left."""
    ids, mask = tokens(batch, length, seed=seed), torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, :2 * row + 1] = 0
    return ids * mask, mask


CACHE = ("cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
         else "past_key_values")  # the keyword's name since transformers 5.24
