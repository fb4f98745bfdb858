"""The attention function, and how a model comes to use it."""

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from sinkattn.functional import attend
from sinkattn.hf.handle import Handle
from sinkattn.hf.masks import Mask, is_compiling, mask_function
from sinkattn.hf.sinks import sink_logits_of

NAME = "sinkattn"

# Keywords that reach an attention function and do not change what it computes.
_HARMLESS = frozenset({
    "cache_position", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
    "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids",
    "return_dict", "use_cache",
})


def register():
    """Makes the attention and the mask function known to transformers as "sinkattn".

    Then `model.set_attn_implementation("sinkattn")`, or `attn_implementation="sinkattn"` at
    construction. transformers itself only warns where a model cannot take it: `enable` raises.
    """
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def enable(model):
    """Switches a model's text layers to sinkattn, and returns the model.

    Raises NotImplementedError where the model does not go through transformers' attention
    interface (falcon, mpt, bloom, ...) and goes on with its own code.
    """
    register()
    config = model.config
    text = config.get_text_config(decoder=True)
    key = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    model.set_attn_implementation(NAME if key is None else {key: NAME})
    taken = (config if key is None else text)._attn_implementation
    if taken != NAME:
        raise NotImplementedError(
            f"enable(): {type(model).__name__} did not take the attention implementation '{NAME}' "
            f"and keeps '{taken}': its attention does not go through transformers' "
            "AttentionInterface")
    return model


def attention_function(module, query, key, value, attention_mask, scaling=None, dropout=0.0,
                       sliding_window=None, softcap=None, s_aux=None, is_causal=None,
                       cu_seq_lens_q=None, cu_seq_lens_k=None, output_attentions=None, **others):
    """Attention of one layer. Called by transformers' models.

    query : [batch, heads_q, tokens, depth]; key, value : [batch, heads_kv, keys, depth or depth_v],
        not repeated over groups; key may be the handle of a cache of ours.
    attention_mask : the Mask that our mask function made, or None (encoders without padding).
    s_aux : learned sink logits [heads_q] (gpt-oss).
    Returns (out [batch, tokens, heads_q, depth_v], None).
    Raises NotImplementedError for what would have to be dropped: dropout, attention weights, dense
        masks, tensors under keywords that are not known here.
    """
    refuse_what_we_lack(module, attention_mask, dropout, output_attentions, others)
    score = {"scale": scaling, "softcap": softcap,
             "sink_logits": sink_logits_of(module, query, s_aux)}
    packed = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    refuse_unlocated_sequences(packed, attention_mask, others)
    query, key, value = autocast(query, key, value)
    if isinstance(key, Handle):
        if packed:
            raise NotImplementedError("sinkattn: cu_seq_lens_q with a cache; packed sequences are "
                                      "attended without one")
        key, layer = key.open()
        return layer.attend(query, key, value, attention_mask, **score).transpose(1, 2), None
    if packed:
        place = packed_place(attention_mask, cu_seq_lens_q, cu_seq_lens_k, sliding_window)
    elif attention_mask is None:
        place = unmasked_place(module, query, key, is_causal, sliding_window)
    else:
        if is_causal is False and attention_mask.causal and query.shape[2] > 1:
            raise NotImplementedError("sinkattn: is_causal=False with a causal mask; set "
                                      "config.is_causal to False instead")
        refuse_other_lengths(attention_mask, query, key)
        place = attention_mask.keywords
        count = attention_mask.key_count
        if count is not None and count < key.shape[2]:  # a static cache: the rest is not written
            key, value = key[:, :, :count], value[:, :, :count]
    return call(query, key, value, place, score), None


def call(query, key, value, place, score):
    """attend, the result written where the model will read it: [batch, tokens, heads, depth_v]."""
    batch = query.shape[0]
    rows_end_to_end = "cu_seqlens_q" in place and batch > 1
    if rows_end_to_end:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    needs_gradient = torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad
        for x in (query, key, value, score["sink_logits"]))
    if needs_gradient or is_compiling():
        out = attend(query, key, value, **place, **score).transpose(1, 2)
    else:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        attend(query, key, value, out=out.transpose(1, 2), **place, **score)
    return out[0].unflatten(0, (batch, -1)) if rows_end_to_end else out


def packed_place(mask, cu_q, cu_k, window):
    """Packed sequences by the caller's boundaries."""
    if cu_q is None or cu_k is None:
        raise ValueError("sinkattn: cu_seq_lens_q and cu_seq_lens_k come together, one is None")
    if isinstance(mask, Mask):
        if mask.starts is not None or mask.offset != 0 or mask.batch != 1:
            raise NotImplementedError("sinkattn: cu_seq_lens_q with padding, a cache or a batch of "
                                      f"{mask.batch}; packed sequences come in a batch of 1")
        window, causal = mask.window, mask.causal
    else:
        causal = True
    return {"causal": causal, "window": window, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


def unmasked_place(module, query, key, is_causal, window):
    """A model that asks for no mask: an encoder, or attention to another sequence."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and query.shape[2] > 1
    if causal and query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"sinkattn: {query.shape[2]} queries and {key.shape[2]} keys, causal, without a mask: "
            "which keys a query sees is not stated")
    return {"causal": causal, "window": window}


def refuse_what_we_lack(module, mask, dropout, output_attentions, others):
    if dropout > 0:
        raise NotImplementedError(f"sinkattn: dropout is {dropout} in training; set "
                                  "config.attention_dropout to 0")
    config = getattr(module, "config", None)
    if output_attentions or getattr(config, "output_attentions", False):
        raise NotImplementedError("sinkattn: output_attentions asks for attention weights, which "
                                  "are never made; use attn_implementation='eager'")
    if mask is not None and not isinstance(mask, Mask):
        shape = list(getattr(mask, "shape", ()))
        raise NotImplementedError(f"sinkattn: attention_mask is {type(mask).__name__} {shape}, "
                                  "expected a 2-D padding mask: dense masks are not supported")
    for name, value in others.items():
        if name not in _HARMLESS and name != "seq_idx" and holds_tensor(value):
            raise NotImplementedError(
                f"sinkattn: {type(module).__name__} passes '{name}', a tensor that this attention "
                "does not know and may not drop")


def refuse_unlocated_sequences(packed, mask, others):
    """seq_idx alone: mixers of other kinds know where the sequences are, we would not."""
    known = packed or (isinstance(mask, Mask) and mask.sequences is not None)
    if others.get("seq_idx") is not None and not known:
        raise NotImplementedError("sinkattn: seq_idx without cu_seq_lens_q and cu_seq_lens_k or "
                                  "position_ids that begin anew: packed sequences would see each "
                                  "other")


def refuse_other_lengths(mask, query, key):
    """A model that adds keys after its mask was made: who sees them is not stated."""
    if (query.shape[2], key.shape[2]) != (mask.queries, mask.keys):
        raise NotImplementedError(
            f"sinkattn: {query.shape[2]} queries and {key.shape[2]} keys, the mask was made for "
            f"{mask.queries} and {mask.keys}: the model adds or drops some on its own")


def holds_tensor(value):
    if isinstance(value, dict):
        return any(holds_tensor(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def autocast(*tensors):
    """As torch's own attention under autocast: in its dtype."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if isinstance(x, Handle) or x.dtype == dtype else x.to(dtype) for x in tensors)
