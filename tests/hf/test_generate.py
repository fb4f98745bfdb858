"""generate gives the same tokens as eager attention while nothing is evicted, with our cache too."""

import copy

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import CACHE, EVERY, build, left_padded, tokens

import sinkattn.hf as hf

pytestmark = pytest.mark.filterwarnings("ignore:SinkCache.*every layer of this model slides")
SIXTEEN = {"max_new_tokens": 16, "min_new_tokens": 16}
WAYS = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 20},
        "beams": {"do_sample": False, "num_beams": 3}}


def generate(model, ids, seed=0, attention_mask=None, **keywords):
    """Without a mask transformers guesses one from padding tokens, which random models do generate."""
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return model.generate(ids, attention_mask=mask, **{**SIXTEEN, **keywords})


@pytest.mark.parametrize(("way", "family"), [*(("greedy", family) for family in EVERY), ("sampling", "llama"),
                                             ("sampling", "gpt_oss"), ("beams", "llama"), ("beams", "gpt_oss"),
                                             ("beams", "gpt_neox")])
def test_the_same_tokens(family, way):
    model = build(family)
    ids, padding = left_padded()
    given = {"attention_mask": padding, **WAYS[way]}
    expected = generate(model, ids, **given)
    hf.enable(model)
    assert (generate(model, ids, **given) == expected).all()
    cache = hf.SinkCache(model.config, sinks=4, window=60)
    assert (generate(model, ids, **given, **{CACHE: cache}) == expected).all()
    assert cache.get_seq_length() == expected.shape[1] - 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_static_cache(family):
    """Keys longer than what is written; for gemma2 a sliding layer too."""
    model = build(family)
    ids, padding = left_padded()
    given = {"attention_mask": padding, "do_sample": False}
    expected = generate(model, ids, **given)
    hf.enable(model)
    got = generate(model, ids, cache_implementation="static", disable_compile=True, **given)
    assert (got == expected).all()


@pytest.mark.parametrize("chunk", [5, 8])
def test_prompt_in_chunks(chunk):
    """Padding longer than a chunk: rows that have no token in it."""
    model = hf.enable(build("llama"))
    ids, padding = left_padded(4, 20)
    given = {"attention_mask": padding, "do_sample": False}
    expected = generate(model, ids, **given)
    cache = hf.SinkCache(model.config, sinks=2, window=60)
    got = generate(model, ids, prefill_chunk_size=chunk, **given, **{CACHE: cache})
    assert (got == expected).all()


def test_turns():
    """The second turn brings the whole text; what the cache has seen is not read again."""
    model = hf.enable(build("llama"))
    cache = hf.SinkCache(model.config, sinks=4, window=100)
    first = generate(model, tokens(1, 8), do_sample=False, **{CACHE: cache})
    text = torch.cat([first, tokens(1, 6, seed=9)], 1)
    got = generate(model, text, do_sample=False, **{CACHE: cache})
    assert (got == generate(model, text, do_sample=False)).all()
    cache.reset()
    assert (generate(model, tokens(1, 8), do_sample=False, **{CACHE: cache}) == first).all()


def test_a_prompt_kept_for_many_texts():
    model = hf.enable(build("llama"))
    prompt, cache = tokens(1, 9), hf.SinkCache(model.config, sinks=4, window=100)
    with torch.no_grad():
        model(prompt, **{CACHE: cache})
    for seed in (1, 2):
        text = torch.cat([prompt, tokens(1, 4, seed=seed)], 1)
        got = generate(model, text, do_sample=False, **{CACHE: copy.deepcopy(cache)})
        assert (got == generate(model, text, do_sample=False)).all()


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
@pytest.mark.parametrize("evicted", [False, True])
@pytest.mark.parametrize("way", ["assistant", "prompt_lookup"])
def test_tokens_taken_back(family, evicted, way):
    """Guesses that are refused leave no trace, on a full ring too. The assistant is another model,
    so most of its guesses are refused."""
    model = hf.enable(build(family))
    window = 12 if evicted else 100
    ids = tokens(1, 6).repeat(1, 4)
    expected = generate(model, ids, do_sample=False,
                        **{CACHE: hf.SinkCache(model.config, sinks=2, window=window)})
    given = {"prompt_lookup_num_tokens": 4}
    if way == "assistant":
        assistant = build(family, num_hidden_layers=1, **(
            {"layer_types": ["full_attention"]} if family == "gpt_oss" else {}))
        assistant.generation_config.assistant_confidence_threshold = 0
        assistant.generation_config.num_assistant_tokens = 5
        given = {"assistant_model": hf.enable(assistant)}
    cache = hf.SinkCache(model.config, sinks=2, window=window)
    taken, crop = [], cache.crop
    cache.crop = lambda n: (taken.append(-n), crop(n))
    got = generate(model, ids, do_sample=False, **given, **{CACHE: cache})
    assert (got == expected).all()
    assert max(taken) > 1  # one token can be taken back without spare slots


def test_crop_takes_all_layers_or_none():
    model = hf.enable(build("gpt_oss"))  # its first layer slides over 7
    cache = hf.SinkCache(model.config, sinks=2, window=100)
    with torch.no_grad():
        model(tokens(1, 20), **{CACHE: cache})
    with pytest.raises(ValueError, match="overwritten some; make the cache with rollback="):
        cache.crop(-4)
    assert cache.get_seq_length() == 20
    assert [layer.stream.length.tolist() for layer in cache.layers] == [[20], [20]]
    with pytest.raises(ValueError, match="cache has seen 20"):
        cache.crop(-21)
    with pytest.raises(ValueError, match="tokens_to_remove is 3, expected 0 or less"):
        cache.crop(3)
    cache.crop(0)
    cache.crop(-1)
    assert cache.get_seq_length() == 19
