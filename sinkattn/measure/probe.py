"""Probe: what a cache's evictions cost, measured while a stream runs through it."""

import numpy as np

from sinkattn.cache import SinkCache

from .arrays import attention_loss, kept_mask, least_loss, output_error, sink_mass, top_keys
from .full import FullCache
from .records import Attention, Estimate

_REFUSED = ("new_lengths", "sink_bias", "out")


class Probe:
    """Stands in for a cache, passes every call on, and keeps all keys and values beside it, so that
    each sampled query can be asked what full attention would have done.

    cache : `SinkCache`, `KVCache`, or any object with `attend`, `kept()` and `nbytes`. Its rows
        must advance together.
    kv_heads, head_dim, v_head_dim, rope : what the cache was made with.
    every : int, the first query of every so many calls is looked at; read token by token to look at
        every token.
    top : int, how many of the heaviest keys `top_keys` looks for. sinks : int, of `sink_mass`.

    The keys and values are those that the stream with eviction produced: the measure is local to
    the layer, not the sum of what went wrong below it. Full attention keeps distances in the text,
    so past a model's trained length it is no yardstick. Memory grows with the stream: an instrument
    for thousands of tokens, not millions.
    """

    def __init__(self, cache, batch, kv_heads, head_dim, *, v_head_dim=None, rope=None, every=1,
                 top=16, sinks=4):
        if every < 1:
            raise ValueError(f"Probe(): every is {every}, expected 1 or more")
        self.cache, self.heads, self.every = cache, kv_heads, every
        self.top, self.sinks = top, sinks
        self._full = FullCache(batch, kv_heads, head_dim, v_head_dim=v_head_dim, rope=rope)
        self._calls, self.samples = 0, []

    def attend(self, q, k, v, **options):
        """As the cache's; new_lengths, sink_bias and out raise NotImplementedError."""
        for name in _REFUSED:
            if options.get(name) is not None:
                raise NotImplementedError(f"Probe.attend(): {name} is given, expected None")
        position = self._full.seen
        looks = self._calls % self.every == 0 and q.shape[2] > 0
        held = self.cache.kept() if looks else None
        result = self.cache.attend(q, k, v, **options)
        self._calls += 1
        self._full.append(k, v)
        if looks:
            out = result[0] if isinstance(result, tuple) else result
            asked = {name: value for name, value in options.items()
                     if name not in ("return_lse", "return_mass")}
            self._sample(np.asarray(q)[:, :, :1], position, self._seen(held, position),
                         np.asarray(out)[:, :, 0], asked)
        return result

    def _seen(self, held, position):
        """Which keys the query at `position` saw: what was held before the call and itself, less
        the token that a ring gives up for it."""
        mask = kept_mask(held, self.heads, position + 1)
        mask[:, :, position] = True
        if isinstance(self.cache, SinkCache):
            sinks, window = (self.cache._numbers[name] for name in ("sinks", "window"))
            mask[:, :, sinks:max(sinks, position + 1 - window)] = False
        return mask

    def _sample(self, q, position, kept, out, options):
        full, mass = self._full.look(q, position, return_mass=True, **options)
        self.samples.append({
            "position": position,
            "loss": attention_loss(mass, kept),
            "least": least_loss(mass, kept.sum(axis=-1)),
            "error": output_error(out, full[:, :, 0]),
            "top": top_keys(mass, kept, min(self.top, position + 1)),
            "sinks": sink_mass(mass, self.sinks),
        })

    def copy(self):
        """The cache and all beside it, twice."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, cache=self.cache.copy(), _full=self._full.copy(),
                             samples=list(self.samples))
        return twin

    @property
    def nbytes(self):
        """Of the cache alone."""
        return self.cache.nbytes

    @property
    def length(self):
        return self.cache.length

    def kept(self):
        return self.cache.kept()


def summarise(probes, since=0):
    """`Attention` over the queries from position `since` on.

    probes : one Probe a layer; or a list of such lists, whose rows are independent of each other
        and were read alike (the parts of a batch).
    """
    parts = [probes] if isinstance(probes[0], Probe) else probes
    first = parts[0][0]
    chosen = [i for i, sample in enumerate(first.samples) if sample["position"] >= since]
    if not chosen:
        raise ValueError(f"summarise(): no sampled query at or past position {since}")

    def gather(name):  # [rows, layers, queries, heads]
        return np.concatenate([
            np.stack([np.stack([probe.samples[i][name] for i in chosen], axis=1)
                      for probe in part], axis=1) for part in parts])

    found = {name: gather(name) for name in ("loss", "least", "error", "top", "sinks")}
    by_head = {name: values.mean(axis=(0, 2)).tolist() for name, values in found.items()}
    over_rows = {name: Estimate.of(values.mean(axis=(1, 2, 3))) for name, values in found.items()}
    return Attention(
        **over_rows, loss_by_head=by_head["loss"], error_by_head=by_head["error"],
        top_by_head=by_head["top"], sink_by_head=by_head["sinks"],
        positions=[first.samples[i]["position"] for i in chosen],
        loss_by_position=found["loss"].mean(axis=(0, 1, 3)).tolist(),
        queries=len(chosen), top_count=first.top, sink_count=first.sinks,
    )
