"""Past the window: what a stream gives equals a computation over the whole text, in float64, from the
definition."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import CACHE, build, modeling, tokens

import sinkattn.hf as hf

SINKS, WINDOW, LENGTH = 3, 9, 40
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 32}


def stream(model, ids, cuts, positions="slot", mask=None):
    """Logits of the text, fed in chunks."""
    cache, out, begin = hf.SinkCache(model.config, SINKS, WINDOW, positions), [], 0
    with torch.no_grad():
        for end in [*cuts, ids.shape[1]]:
            given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": (
                mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]}
            out.append(model(ids[:, begin:end], **given, **{CACHE: cache}).logits)
            begin = end
    return torch.cat(out, 1), cache


def relative(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def seen(length, sinks, window):
    t, j = np.arange(length)[:, None], np.arange(length)[None]
    return (j <= t) & ((j < sinks) | (j > t - window))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def written_llama(model, ids, slot=True):
    """A Llama in NumPy and float64, with nothing of transformers but the weights and frequencies."""
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    config, length = model.config, ids.shape[1]
    frequencies = model.model.rotary_emb.inv_freq.double().numpy()
    scaling = model.model.rotary_emb.attention_scaling

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def turn(x, position):  # [heads, length, depth]
        angle = position[:, None] * frequencies
        c, s, (a, b) = np.cos(angle), np.sin(angle), np.split(x, 2, axis=-1)
        return np.concatenate([a * c - b * s, b * c + a * s], -1) * scaling

    def heads(x, matrix, count):
        return (x @ matrix.T).reshape(length, count, -1).transpose(1, 0, 2)

    x = w["model.embed_tokens.weight"][ids[0].numpy()]
    place = np.arange(length)
    capped = np.minimum(place, SINKS + WINDOW - 1) if slot else place
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        y = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (heads(y, w[f"{at}self_attn.{name}_proj.weight"], count) for name, count in (
            ("q", 4), ("k", 2), ("v", 2)))
        k, v = np.repeat(turn(k, place), 2, 0), np.repeat(v, 2, 0)
        score = turn(q, place) @ k.swapaxes(1, 2)
        score[:, :, :SINKS] = (turn(q, capped) @ k.swapaxes(1, 2))[:, :, :SINKS]
        score = np.where(seen(length, SINKS, WINDOW), score / 4, -np.inf)  # depth 16
        y = (softmax(score) @ v).transpose(1, 0, 2).reshape(length, -1)
        x = x + y @ w[at + "self_attn.o_proj.weight"].T
        y = norm(x, w[at + "post_attention_layernorm.weight"])
        gate = y @ w[at + "mlp.gate_proj.weight"].T
        y = gate / (1 + np.exp(-gate)) * (y @ w[at + "mlp.up_proj.weight"].T)
        x = x + y @ w[at + "mlp.down_proj.weight"].T
    return torch.from_numpy(norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T)[None]


@pytest.mark.parametrize("rope", [None, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
def test_a_llama_written_out(rope):
    model = hf.enable(build("llama", **({"rope_parameters": rope} if rope else {})))
    ids = tokens(1, LENGTH)
    expected = written_llama(model, ids)
    got, cache = stream(model, ids, range(1, LENGTH))
    assert relative(got, expected) < 5e-6
    assert relative(stream(model, ids, [2, 9, 29, 30])[0], expected) < 5e-6
    assert relative(stream(model, ids, [], "original")[0], written_llama(model, ids, False)) < 5e-6
    assert relative(got, written_llama(model, ids, False)) > 1e-2  # the two differ
    assert [row.tolist() for row in cache.layers[0].stream.kept()] == [[*range(3), *range(31, 40)]]


def test_linear_scaling_and_another_base():
    model = hf.enable(build("llama", rope_parameters={"rope_type": "linear", "rope_theta": 500.0,
                                                      "factor": 3.0}))
    ids = tokens(1, LENGTH)
    assert relative(stream(model, ids, [11])[0], written_llama(model, ids)) < 5e-6


def test_left_padded_rows_are_streams_of_their_own():
    """Row by row as if alone, however the padding falls on the chunks."""
    model = hf.enable(build("llama"))
    ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.int64)
    starts = [0, 5, 13]
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    for cuts in ([], [4, 9, 20, 21, 22], range(1, LENGTH)):
        got, _ = stream(model, ids * mask, cuts, mask=mask)
        for row, start in enumerate(starts):
            expected = written_llama(model, ids[row:row + 1, start:])
            assert relative(got[row:row + 1, start:], expected) < 5e-6


def written_attention(turn):
    """Attention over a whole text in float64, by the definition of the stream: for models of which only
    the turning is their own. turn(x, positions): the model's own function."""
    def turned(raw, whole, place, module):
        part = turn(raw, place, module)
        return torch.cat([part, whole[..., part.shape[-1]:]], -1).double()  # phi turns a part alone

    def attend(module, query, key, value, mask, scaling, softcap=None, s_aux=None, **_):
        (raw_query, raw_key), length = turn.raw, query.shape[2]
        sliding = mask.window
        sinks, window = (0, sliding) if sliding else (SINKS, WINDOW)
        place = torch.arange(length)
        group = query.shape[1] // key.shape[1]
        keys = turned(raw_key, key, place, module).repeat_interleave(group, 1)
        value = value.double().repeat_interleave(group, 1)
        score = turned(raw_query, query, place, module) @ keys.mT
        capped = turned(raw_query, query, place.clamp(max=sinks + window - 1), module) @ keys.mT
        score[..., :sinks] = capped[..., :sinks]
        score = score * scaling
        score = score if softcap is None else torch.tanh(score / softcap) * softcap
        score = score.masked_fill(~torch.from_numpy(seen(length, sinks, window)), -torch.inf)
        if s_aux is not None:
            extra = s_aux.double()[None, :, None, None].expand(*score.shape[:3], 1)
            score = torch.cat([score, extra], -1)
        weight = score.softmax(-1)[..., :length]
        return (weight @ value).transpose(1, 2).to(query.dtype), None
    return attend


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_neox", "cohere", "gemma3", "phi", "phi3"])
def test_other_ways_of_turning(family, monkeypatch):
    """Interleaved pairs, a part of the head, YaRN on pinned and sliding layers, two sets of frequencies."""
    own = {"phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                        "partial_rotary_factor": 0.5}}}
    model, ids = build(family, **own.get(family, {})), tokens(1, LENGTH)
    code, base = modeling(model), model.base_model
    original = code.apply_rotary_pos_emb

    def turn(x, place, module):
        kind = [module.layer_type] if family == "gemma3" else []
        angles = base.rotary_emb(x, place[None], *kind)
        return original(x, x, *angles)[0]

    def catch(q, k, *angles, **keywords):
        turn.raw = q, k
        return original(q, k, *angles, **keywords)
    hf.register()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from sinkattn.hf.masks import mask_function
    AttentionInterface.register("written_out", written_attention(turn))
    AttentionMaskInterface.register("written_out", mask_function)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(code, "apply_rotary_pos_emb", catch)
        model.set_attn_implementation("written_out")
        expected = model(ids, use_cache=False).logits.double()
    hf.enable(model)
    got, cache = stream(model, ids, [1, 2, 17, 18])
    assert relative(got, expected) < 1e-5
    windows = {layer.window for layer in cache.layers}
    assert windows == ({None, 7} if family in ("gpt_oss", "gemma3") else {None})


def test_memory_does_not_grow():
    model = hf.enable(build("llama"))
    cache = hf.SinkCache(model.config, SINKS, WINDOW)
    assert cache.nbytes == 0
    sizes = set()
    with torch.no_grad():
        for _ in range(5):
            model(tokens(2, 16), **{CACHE: cache})
            sizes.add(cache.nbytes)
    slots = SINKS + WINDOW
    assert len(sizes) == 1 and sizes.pop() < 2 * 2 * 2 * 2 * slots * 16 * 4 + 2048  # layers, k and v, rows, heads
    assert cache.get_seq_length() == 80 and "80 tokens seen" in repr(cache)
