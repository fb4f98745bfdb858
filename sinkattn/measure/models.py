"""Language models that the measures can read with."""

import copy
import functools
import inspect
import typing

import numpy as np

from .full import FullCache


class Reader(typing.Protocol):
    """A language model with its caches, in the middle of a batch of streams.

    What the measures call a *model* is anything that, called with a number of rows, returns one of
    these, empty.
    """

    nbytes: int  # of the caches, now

    def read(self, tokens):
        """Goes on with tokens int [rows, n]; returns logits [rows, n, vocabulary] (NumPy): [:, i]
        says what follows tokens[:, i]."""

    def copy(self):
        """A reader of its own with the same past, so that several questions start from one text."""


class _ShippedReader:
    def __init__(self, model, caches):
        self.model, self.caches = model, caches

    def read(self, tokens):
        def attention(layer, q, k, v, at):
            return self.caches[layer].attend(q, k, v)

        return self.model.forward(np.asarray(tokens), attention)

    def copy(self):
        return type(self)(self.model, [cache.copy() for cache in self.caches])

    @property
    def nbytes(self):
        return sum(cache.nbytes for cache in self.caches)


@functools.cache
def _shipped_model():
    from sinkattn.demo.cli import MODEL
    from sinkattn.demo.model import Model

    return Model.load(MODEL)


def shipped(cache=FullCache):
    """The byte-level model of `python -m sinkattn demo`, each layer with a cache of its own.

    cache : called as cache(rows, kv_heads, head_dim, rope=Rope), q and k being raw; returns an
        object with attend(q, k, v), copy() and nbytes: a `SinkCache`, a `KVCache`, a `Probe`.
    Tokens are bytes, 256 opens a text. It was trained on 512 tokens at a time: past that, positions
    "original" (and `FullCache`) are outside what it has learned.

    >>> from functools import partial
    >>> from sinkattn import SinkCache
    >>> reader = shipped(partial(SinkCache, sinks=4, window=60))(1)
    >>> reader.read([[256, *b"import num"]]).argmax(axis=-1)[0, -1:].astype(np.uint8).tobytes()
    b'p'
    """
    from sinkattn.rope import Rope

    def start(rows):
        model = _shipped_model()
        config = model.config
        rope = Rope(config.inverse_frequencies())
        return _ShippedReader(model, [
            cache(rows, config.heads_kv, config.head_depth, rope=rope)
            for _ in range(config.layers)
        ])

    return start


class _TransformersReader:
    def __init__(self, model, past):
        self.model, self.past = model, past
        known = inspect.signature(model.forward).parameters
        self.keyword = "cache" if "cache" in known else "past_key_values"  # 5.24 renamed it

    def read(self, tokens):
        import torch

        tokens = torch.as_tensor(np.asarray(tokens, np.int64), device=self.model.device)
        with torch.no_grad():
            out = self.model(input_ids=tokens, use_cache=True, **{self.keyword: self.past})
        return out.logits.float().cpu().numpy()

    def copy(self):
        twin = getattr(self.past, "copy", None)
        return type(self)(self.model, twin() if twin else copy.deepcopy(self.past))

    @property
    def nbytes(self):
        own = getattr(self.past, "nbytes", None)
        if own is not None:
            return own
        held = [tensor for layer in self.past.layers
                for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)


def huggingface(model, cache=None):
    """A causal language model of transformers, in evaluation mode.

    model : called as model(input_ids=..., past_key_values=..., use_cache=True), or cache=...
    cache : called without arguments for every batch of streams; default transformers' DynamicCache,
        which keeps everything.
    """
    def start(rows):
        if cache is not None:
            return _TransformersReader(model, cache())
        from transformers import DynamicCache

        return _TransformersReader(model, DynamicCache())

    return start
