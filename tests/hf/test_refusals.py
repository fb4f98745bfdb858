"""What is not honoured is refused by name, never dropped."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from hf_models import CACHE, build, left_padded, tokens

import sinkattn.hf as hf
from sinkattn.hf import cache as caches
from sinkattn.hf import versions
from sinkattn.hf.attention import attention_function
from sinkattn.hf.masks import Mask, Pattern, mask_function

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def refused(message, error=NotImplementedError):
    return pytest.raises(error, match=message)


@pytest.fixture
def llama():
    return hf.enable(build("llama"))


@pytest.mark.parametrize(("name", "config"), [
    ("Falcon", SMALL), ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}),
    ("Mpt", {"d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 50}),
    ("GPTNeo", {**SMALL, "num_heads": 2, "attention_types": [[["global"], 1]]})])
def test_models_that_do_not_take_it(name, config):
    """transformers itself only logs a warning, and goes on with its own attention."""
    made = getattr(transformers, f"{name}Config")(**config)
    with refused(f"{name}ForCausalLM did not take the attention implementation 'sinkattn'"):
        hf.enable(getattr(transformers, f"{name}ForCausalLM")(made))


def test_dropout():
    model = hf.enable(build("llama", attention_dropout=0.1))
    with torch.no_grad(), refused(r"dropout is 0.1 in training; set config.attention_dropout"):
        model.train()(tokens(1, 4))
    with torch.no_grad():
        model.eval()(tokens(1, 4))


def test_attention_weights(llama):
    with torch.no_grad(), refused("output_attentions"):
        llama(tokens(1, 4), output_attentions=True)


def test_dense_masks(llama):
    dense = torch.zeros(1, 1, 4, 4)
    with torch.no_grad(), refused(r"attention_mask is Tensor \[1, 1, 4, 4\], expected a 2-D padding mask"):
        llama(tokens(1, 4), attention_mask=dense)


def test_holes(llama):
    mask = torch.tensor([[1, 1, 0, 1]])
    with torch.no_grad(), refused("attention_mask has a hole: zeros between ones"):
        llama(tokens(1, 4), attention_mask=mask)
    ids, mask = left_padded(2, 8)
    with refused("pad on the left"):  # the first generated token stands behind the padding
        llama.generate(ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=3, pad_token_id=0)


def call(**keywords):
    """The attention function as a model calls it."""
    x = torch.ones(1, 2, 4, 8)
    module = torch.nn.Module()
    mask = keywords.pop("mask", Mask(Pattern(causal=True), 1, 4, 4, 0))
    return attention_function(module, x, x, x, mask, scaling=1.0, **keywords)


@pytest.mark.parametrize("name", ["indices", "block_indices", "position_bias", "sinks", "whatever"])
def test_unknown_tensors(name):
    for value in (torch.ones(3), [torch.ones(3)], {"x": (torch.ones(3),)}):
        with refused(f"Module passes '{name}', a tensor that this attention does not know"):
            call(**{name: value})


def test_what_changes_nothing_passes():
    call(position_ids=torch.arange(4)[None], num_items_in_batch=torch.tensor(3), use_cache=True, whatever=7)


def test_packed_sequences():
    two = torch.tensor([0, 1, 4], dtype=torch.int32)
    with refused("cu_seq_lens_q and cu_seq_lens_k come together", ValueError):
        call(cu_seq_lens_q=two)
    with refused("cu_seq_lens_q with padding, a cache or a batch of 2"):
        call(cu_seq_lens_q=two, cu_seq_lens_k=two, mask=Mask(Pattern(causal=True), 2, 4, 4, 0))
    with refused("seq_idx without cu_seq_lens_q"):
        call(seq_idx=torch.zeros(1, 4, dtype=torch.int32))
    with refused("is_causal=False with a causal mask"):
        call(is_causal=False)
    out, _ = call(mask=None, cu_seq_lens_q=two, cu_seq_lens_k=two, seq_idx=torch.zeros(1, 4))
    assert out.shape == (1, 4, 2, 8)


def test_no_mask_at_all():
    x = torch.ones(1, 2, 4, 8)
    module = torch.nn.Module()
    with refused("4 queries and 3 keys, causal, without a mask"):
        attention_function(module, x, x[:, :, :3], x[:, :, :3], None, scaling=1.0)
    module.is_causal = False
    attention_function(module, x, x[:, :, :3], x[:, :, :3], None, scaling=1.0)


def test_models_that_work_on_masks_or_add_keys():
    mask = Mask(Pattern(causal=True), 1, 4, 4, 0)
    with refused("'dtype' of a mask: the model works on masks itself", AttributeError):
        mask.dtype  # noqa: B018
    with refused("an index into a mask"):
        mask[0]
    with refused("4 queries and 4 keys, the mask was made for 4 and 3: the model adds or drops some"):
        call(mask=Mask(Pattern(causal=True), 1, 4, 3, 0))


def test_other_masks():
    from transformers import masking_utils as m
    given = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    with refused("chunked attention"):
        mask_function(**given, mask_function=m.chunked_causal_mask_function(2, torch.zeros(1)))
    with refused("not causal, bidirectional, sliding or packed: .*<lambda>"):
        mask_function(**given, mask_function=m.and_masks(m.causal_mask_function, lambda b, h, q, k: q > k))
    with refused("adds a mask of its own .or_mask_function.: .*<lambda>"):
        mask_function(**given, mask_function=m.or_masks(m.causal_mask_function, lambda b, h, q, k: q > k))
    blocks = m.blockwise_overlay(torch.tensor([[-1, 0, 0, -1]]))
    with refused("block_sequence_ids"):
        mask_function(**given, mask_function=m.or_masks(m.causal_mask_function, blocks))
    none = m.blockwise_overlay(torch.full((1, 4), -1))
    assert mask_function(**given, mask_function=m.or_masks(m.causal_mask_function, none)).causal


# --- the cache --------------------------------------------------------------------------------

def forward(model, ids, cache, **keywords):
    with torch.no_grad():
        return model(ids, **{CACHE: cache}, **keywords).logits


def test_another_attention_cannot_read_our_cache():
    """Silently it would attend to the new chunk alone."""
    for attention in ("eager", "sdpa"):
        model = build("llama", attention)
        with refused("was called on keys that live in our cache. Either the model does not use"):
            forward(model, tokens(1, 4), hf.SinkCache(model.config))


def test_what_can_be_read_of_a_handle(llama):
    keys = torch.ones(1, 2, 3, 4)
    handle = caches.Handle(keys, "layer")
    assert handle.shape == keys.shape and handle.dtype is keys.dtype and handle.size(2) == 3
    assert handle.open() == (keys, "layer") or True
    with refused("the keys of one cache entry are attended twice"):
        handle.open()


def test_models_that_a_cache_does_not_fit():
    with refused("kv_lora_rank: the model caches latents"):
        hf.SinkCache(transformers.DeepseekV3Config(**SMALL))
    with refused("layers of type chunked_attention"):
        hf.SinkCache(transformers.Llama4TextConfig(**SMALL))
    with refused("is_encoder_decoder"):
        hf.SinkCache(transformers.WhisperConfig())
    with refused("KV sharing"):
        hf.SinkCache(transformers.Gemma3nTextConfig())
    with refused("config is dict, expected the config", TypeError):
        hf.SinkCache({})
    with refused("window is 0, expected 1", ValueError):
        hf.SinkCache(transformers.LlamaConfig(), window=0)
    with refused("positions is 'text', expected 'slot' or 'original'", ValueError):
        hf.SinkCache(transformers.LlamaConfig(), positions="text")


@pytest.mark.parametrize(("config", "reason"), [
    (("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
     "rope_type is 'dynamic'"),
    (("Phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
                                   "long_factor": [2.0] * 8, "original_max_position_embeddings": 16},
               "pad_token_id": None}), "rope_type is 'longrope'"),
    (("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}),
     "mrope_section"),
    (("Cohere2", {"layer_types": ["full_attention"]}), "only under a condition"),
    (("GPT2", {}), "has 0 rotary modules|calls apply_rotary_pos_emb"),
    (("HunYuanDenseV1", {}), "changes queries or keys after it has turned them")])
def test_turns_that_are_not_understood(config, reason):
    """By name, with the way out: positions='original' needs no rotation."""
    name, own = config
    made = getattr(transformers, f"{name}Config")(**SMALL, **own)
    with refused(f"positions='slot'.*({reason}).*positions='original'"):
        hf.SinkCache(made)
    hf.SinkCache(made, positions="original")
    hf.SinkCache(made, sinks=0)


def test_a_config_from_elsewhere():
    class OwnConfig(transformers.LlamaConfig):
        __module__ = "nowhere.configuration_own"
    with refused("there is no nowhere.modeling_own that goes with OwnConfig"):
        hf.SinkCache(OwnConfig(**SMALL))


def test_a_turn_that_is_not_the_modules_own(monkeypatch):
    """What the source promises is tried out."""
    from transformers.models.llama import modeling_llama as code
    original = code.apply_rotary_pos_emb
    config = transformers.LlamaConfig(**SMALL)
    monkeypatch.setattr(code, "apply_rotary_pos_emb", lambda q, k, cos, sin: original(q, k, cos, -sin))
    with refused("turns neither halves nor pairs"):
        hf.SinkCache(config)
    monkeypatch.setattr(code, "apply_rotary_pos_emb", lambda q, k: q)
    with refused("could not be tried out .TypeError"):
        hf.SinkCache(config)


def test_every_layer_slides():
    with pytest.warns(UserWarning, match="every layer of this model slides over its own 7 tokens"):
        hf.SinkCache(build("mistral").config)


def test_a_cache_made_for_another_model(llama):
    config = build("gpt_oss").config
    with refused("mask has window None, the cache was made for 7"):
        forward(llama, tokens(1, 4), hf.SinkCache(config))


def test_another_batch_and_other_padding(llama):
    cache = hf.SinkCache(llama.config)
    ids, mask = left_padded(2, 8)
    forward(llama, ids, cache, attention_mask=mask)
    with refused("the batch is 3, expected 2", ValueError):
        forward(llama, tokens(3, 1), cache)
    with refused("rows have .9, 9|rows have .8, 8", ValueError):
        forward(llama, tokens(2, 1), cache)
    assert cache.get_seq_length() == 8
    with refused("different lengths .5, 8."):
        cache.crop(-1)
    cache.reset()
    assert forward(llama, tokens(3, 2), cache).shape[0] == 3


def test_not_causal_or_packed_with_a_cache(llama):
    layer = hf.SinkCache(llama.config).layers[0]
    x = torch.ones(1, 2, 4, 16)
    for mask in (Mask(Pattern(causal=False), 1, 4, 4, 0), torch.ones(1, 1, 4, 4)):
        with refused("attends causally, one sequence a row"):
            layer.attend(x, x, x, mask)
    with refused("for 4 tokens after 3, the cache has seen 0", ValueError):
        layer.attend(x, x, x, Mask(Pattern(causal=True), 1, 4, 7, 3))
    key, _ = layer.update(x, x)
    with refused("cu_seq_lens_q with a cache"):
        attention_function(torch.nn.Module(), x, key, x, None, scaling=1.0, cu_seq_lens_q=torch.tensor([0, 4]))


def test_what_a_cache_cannot_do(llama):
    cache = hf.SinkCache(llama.config)
    for do in (lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0])),
               lambda: cache.layers[0].offload(), lambda: cache.layers[0].lazy_initialization(None)):
        with refused("sinkattn.hf: "):
            do()
    assert cache.get_max_length() == -1 and not cache.is_compileable
    cache.crop(-3)  # nothing was seen: nothing to do
    cache.reorder_cache(torch.tensor([0]))
    cache.reset()


# --- versions and imports -----------------------------------------------------------------------

def test_versions(monkeypatch):
    assert all(map(versions.supported, ("5.17.0", "5.23.0", "5.24.0", "5.31.0.dev0")))
    assert not any(map(versions.supported, ("5.16.1", "4.57.6", "6.0.0")))
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda name: "4.57.6")
    with refused("transformers is 4.57.6, expected 5.17 or later and below 6", ImportError):
        versions.require()

    def missing(name):
        raise versions.importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(versions.importlib.metadata, "version", missing)
    with refused("sinkattn.hf needs torch, which is not installed", ImportError):
        versions.require()


def test_the_package_alone_imports_neither():
    code = "import sys, sinkattn; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
