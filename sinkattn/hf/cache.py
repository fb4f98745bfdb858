"""Caches of bounded memory for `generate`: transformers' cache interface over ours."""

import warnings
from functools import partial

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import sinkattn
from sinkattn.hf.handle import Handle
from sinkattn.hf.masks import Mask
from sinkattn.hf.rope import rope_of

_SPARE = 32  # tokens that assisted decoding may take back, unless the caller says


class StreamLayer(CacheLayerMixin):
    """One layer: a stream that appends, evicts and attends in one call.

    make : called with batch, kv_heads, head_dim, v_head_dim, dtype, device and rollback at the
        first tokens; returns the stream, with the interface of sinkattn.SinkCache: attend, kept,
        length, crop, reorder, reset, nbytes.
    window : of a layer that slides in the model itself, else None.

    `update` keeps nothing: it returns a handle that the attention function opens.
    """

    supports_early_init = False
    is_compileable = False
    is_croppable = True

    def __init__(self, make, window=None, rollback=0):
        super().__init__()
        self.make, self.window, self.rollback = make, window, rollback
        self.is_sliding = window is not None
        self.stream, self.batch_size, self.columns, self.padded = None, -1, 0, False
        self.step = None  # while a step is captured: which rows have the token, on the device

    def lazy_initialization(self, key_states, value_states=None):
        raise NotImplementedError("sinkattn.hf: the cache is made at the first tokens; early "
                                  "initialization is not supported")

    def update(self, key_states, value_states, *args, **kwargs):
        return Handle(key_states, self), value_states

    def attend(self, query, key, value, mask, **score):
        """out [batch, heads_q, tokens, v_head_dim] of a chunk, which is appended."""
        tokens = key.shape[2]
        self.refuse_other_mask(mask, tokens)
        columns = None if mask is None else mask.columns
        stream = self.stream_for(key, value)
        if self.step is not None:
            shift, lengths = None, self.step
        else:
            if columns is not None or self.padded:
                self.refuse_other_rows(stream, mask)
            shift, lengths = (None, None) if columns is None else mask.chunk_rows()
        if shift is not None:
            query, key, value = (moved(x, shift) for x in (query, key, value))
        out = query.new_empty(query.shape[0], tokens, query.shape[1], value.shape[3])
        out = out.transpose(1, 2)
        stream.attend(query, key, value, new_lengths=lengths, out=out, **score)
        self.stream, self.batch_size = stream, key.shape[0]
        self.columns += tokens
        self.padded = self.padded or columns is not None
        return out if shift is None else moved_back(out, shift)

    def refuse_other_mask(self, mask, tokens):
        """The checks that need no numbers."""
        if mask is None:
            return
        if not isinstance(mask, Mask) or not mask.causal or mask.sequences is not None:
            raise NotImplementedError("sinkattn.hf: a cache of ours attends causally, one sequence "
                                      "a row; the model asks for something else")
        if mask.window != self.window:
            raise NotImplementedError(
                f"sinkattn.hf: the model's mask has window {mask.window}, the cache was made for "
                f"{self.window} in this layer: make it from the config of this model")
        if mask.offset != self.columns or mask.queries != tokens:
            raise ValueError(f"sinkattn.hf: the mask is for {mask.queries} tokens after "
                             f"{mask.offset}, the cache has seen {self.columns} and gets {tokens}")

    def stream_for(self, key, value):
        batch = key.shape[0]
        if self.stream is not None and (self.columns or batch == self.batch_size):
            if batch != self.batch_size:
                raise ValueError(f"sinkattn.hf: the batch is {batch}, expected {self.batch_size}: "
                                 "rows of the cache. reset() it for another batch")
            return self.stream
        return self.make(batch=batch, kv_heads=key.shape[1], head_dim=key.shape[3],
                         v_head_dim=value.shape[3], dtype=key.dtype, device=key.device,
                         rollback=self.rollback)

    def refuse_other_rows(self, stream, mask):
        """A padding mask that was not there before would misplace every key. Only where the host
        knows the lengths."""
        if mask is not None and mask.columns is not None and mask.columns.is_cuda:
            return
        starts = None if mask is None else mask.starts
        expected = [self.columns] * len(stream.length) if starts is None else (
            self.columns - starts.clamp(max=self.columns)).tolist()
        seen = stream.length.tolist()
        if seen != expected:
            raise ValueError(f"sinkattn.hf: attention_mask says that the rows have {expected} "
                             f"tokens so far, the cache has {seen}: pass the same padding at every "
                             "call")

    def get_seq_length(self):
        """Columns seen, padding included: what positions and masks count from."""
        return self.columns

    def get_mask_sizes(self, query_length):
        return self.columns + int(query_length), 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length

    @property
    def nbytes(self):
        return 0 if self.stream is None else self.stream.nbytes

    def activate_past_recording(self):
        """Called before assisted decoding: the last tokens must be undoable."""
        if self.stream is None:
            self.rollback = self.rollback or _SPARE

    def refuse_crop(self, count):
        """Before any layer is cropped: all of them can, or none is."""
        if self.stream is None or count <= 0:
            return
        lengths = set(self.stream.length.tolist())
        if len(lengths) > 1:
            raise NotImplementedError("crop(): the rows of this cache have different lengths "
                                      f"{sorted(lengths)}")
        length = lengths.pop() - count
        if length < 0:
            raise ValueError(f"crop(): {count} tokens to take back, the cache has seen "
                             f"{self.columns}")
        if not self.stream.may_crop(length):
            raise ValueError(f"crop(): {count} tokens to take back, {self.stream.gone}")

    def crop(self, tokens_to_remove):
        count = -int(tokens_to_remove)
        if count < 0:
            raise ValueError(f"crop(): tokens_to_remove is {-count}, expected 0 or less: so many "
                             "tokens are taken back")
        if count == 0 or self.stream is None:
            return
        self.stream.crop(int(self.stream.length[0]) - count)
        self.columns -= count

    def reset(self):
        self.columns, self.padded = 0, False
        if self.stream is not None:
            self.stream.reset()

    def reorder_cache(self, beam_idx):
        if self.stream is not None:
            beam_idx = beam_idx.to(torch.int64)
            self.stream.reorder(beam_idx if beam_idx.is_cuda else beam_idx.cpu().numpy())

    def batch_repeat_interleave(self, repeats):
        raise NotImplementedError("sinkattn.hf: batch_repeat_interleave: the batch of a cache of "
                                  "ours is fixed; expand the inputs before the prompt")

    def batch_select_indices(self, indices):
        raise NotImplementedError("sinkattn.hf: batch_select_indices: the batch of a cache of ours "
                                  "is fixed")

    def offload(self):
        raise NotImplementedError("sinkattn.hf: offloading of a cache of ours")

    prefetch = offload


class _Stream(sinkattn.SinkCache):
    """A SinkCache that can say beforehand whether it can be cropped."""

    gone = "of which the ring has overwritten some; make the cache with rollback= so many"

    def may_crop(self, n):
        """Is everything that token n would see still held?"""
        sinks, window = self._numbers["sinks"], self._numbers["window"]
        wanted = range(max(n - window + 1, sinks), n)
        return all(not len(wanted) or wanted[0] in row for row in self.kept())


class StreamCache(Cache):
    """A cache of StreamLayers. What all caches of bounded memory for `generate` have in common."""

    def __init__(self, layers):
        super().__init__(layers=layers)

    @property
    def nbytes(self):
        """Bytes held by all layers: 0 before the first tokens, constant after."""
        return sum(layer.nbytes for layer in self.layers)

    def crop(self, tokens_to_remove):
        """Takes back the last -tokens_to_remove tokens of every row; all layers or none."""
        for layer in self.layers:
            layer.refuse_crop(-int(tokens_to_remove))
        super().crop(tokens_to_remove)


def text_config(config, owner="SinkCache"):
    """Of a config, or of a model. owner: the class that asks, for the messages."""
    config = getattr(config, "config", config)
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"{owner}(): config is {type(config).__name__}, expected the config of a "
                        "transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{owner}(): is_encoder_decoder: a cache for decoders alone")
    return config.get_text_config(decoder=True)


def layer_types(config, owner="SinkCache"):
    """"full_attention" or "sliding_attention" by layer; NotImplementedError for others."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "full_attention"
        if getattr(config, "sliding_window", None) is not None:
            kind = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        kinds = [kind] * config.num_hidden_layers
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others:
        raise NotImplementedError(f"{owner}(): layers of type {', '.join(others)}; expected full "
                                  "or sliding attention")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise NotImplementedError(f"{owner}(): kv_lora_rank: the model caches latents that it "
                                  "expands itself (latent attention)")
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", None):
        raise NotImplementedError(f"{owner}(): layers of this model share the keys of others (KV "
                                  "sharing)")
    return kinds


class SinkCache(StreamCache):
    """Pinned tokens and a ring of recent ones in every layer, as the cache of `generate`.

    config : of the model, or the model.
    sinks, window : as in sinkattn.SinkCache: the first tokens of a text, which stay, and the last
        ones, the token itself included. Layers that slide in the model keep the model's own window,
        without pinned tokens.
    positions : "slot" counts distances to the pinned tokens in slots of the cache (StreamingLLM);
        "original" in the text. The model turns its keys itself: slots are had by turning the query
        once more, against the pinned tokens alone. How the model turns is found out from its
        rotary module and tried out; what is not understood is refused by name.
    rollback : tokens that `crop` can take back when the ring is full; assisted decoding and prompt
        lookup on a new cache get 32 by themselves.

    Made empty; memory is taken at the first tokens, on the device and in the dtype of the model's
    keys, and does not grow (`nbytes`). Rows of a left-padded batch have streams of their own.
    The model must use sinkattn's attention (`sinkattn.hf.enable`), else the first token raises.

        cache = SinkCache(model.config, sinks=4, window=1020)
        model.generate(ids, past_key_values=cache)  # cache=cache from transformers 5.24 on:
        model.generate(ids, **{sinkattn.hf.cache_keyword(model): cache})  # whichever it is

    Raises NotImplementedError at construction for models whose layers are neither full nor sliding
    attention, whose keys are latents or shared between layers, and, with positions="slot", for
    rotations that change with the length (dynamic, longrope) or are not understood.

    Method: Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
    (arXiv 2309.17453). What has left the window is forgotten.
    """

    def __init__(self, config, sinks=4, window=1020, positions="slot", rollback=0):
        config = text_config(config)
        sinkattn.SinkCache(0, 1, 1, sinks=sinks, window=window, positions=positions,
                           rollback=rollback)  # its checks of the arguments
        kinds = layer_types(config)
        slot = positions == "slot" and sinks > 0 and "full_attention" in kinds
        rope = rope_of(config, "full_attention") if slot else None
        if "full_attention" not in kinds:
            warnings.warn(f"SinkCache(): every layer of this model slides over its own "
                          f"{config.sliding_window} tokens, which it keeps: sinks and window apply "
                          "to none", stacklevel=2)
        self.sinks, self.window, self.positions = sinks, window, positions
        super().__init__([
            StreamLayer(partial(make_stream, sinks=sinks, window=window, positions=positions,
                                rope=rope), rollback=rollback)
            if kind == "full_attention" else
            StreamLayer(partial(make_stream, sinks=0, window=config.sliding_window),
                        window=config.sliding_window, rollback=rollback)
            for kind in kinds])

    def __repr__(self):
        return (f"SinkCache({len(self.layers)} layers, sinks={self.sinks}, window={self.window}, "
                f"positions={self.positions}, {self.get_seq_length()} tokens seen, "
                f"{self.nbytes} bytes)")


def make_stream(batch, kv_heads, head_dim, *, dtype, device, **options):
    return _Stream(batch, kv_heads, head_dim, dtype=dtype, device=str(device), **options)


def moved(x, shift):
    """Each row's tokens [batch, heads, tokens, depth] moved to the left by its shift: padding goes
    to the right, where new_lengths says how many tokens are real. What comes in there is a copy."""
    tokens = torch.arange(x.shape[2], device=x.device)
    index = (tokens[None] + shift[:, None]).clamp(max=x.shape[2] - 1)
    return x.gather(2, index[:, None, :, None].expand(*x.shape))


def moved_back(x, shift):
    """The same to the right; padding is 0."""
    tokens = torch.arange(x.shape[2], device=x.device)
    index = tokens[None] - shift[:, None]
    padding = (index < 0)[:, None, :, None]
    index = index.clamp(min=0)[:, None, :, None].expand(*x.shape)
    return x.gather(2, index).masked_fill(padding, 0)
