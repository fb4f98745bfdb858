"""The caches that `compare` compares, by name, each cut to the same bytes."""

import dataclasses
import functools
import importlib.util

from sinkattn.cache import SinkCache

from .full import FullCache

FULL, WINDOW, SINKS = "all keys", "window", "sinks + window"


@dataclasses.dataclass(frozen=True)
class Method:
    """make(rows, kv_heads, head_dim, rope=...) gives the cache of a layer; slots : tokens that each
    head holds, None for all."""

    name: str
    slots: int | None
    make: object


def names():
    """What can be compared: the three without a score, then the policies of `KVCache`."""
    return [FULL, WINDOW, SINKS, *_policies()]


def _policies():
    if importlib.util.find_spec("sinkattn.policy") is None:
        return {}
    from sinkattn import policy

    return {name: getattr(policy, name) for name in policy.__all__
            if name not in ("Policy", "Custom")}


def find(name, budget, sinks, recent, positions, shape):
    """The `Method` of a name.

    budget : tokens that sinks + window holds; every other method gets as many as fit into the bytes
        of that cache, its own bookkeeping included. shape : (kv_heads, head_dim) of a layer.
    """
    if name == FULL:
        return Method(name, None, FullCache)
    if name in (WINDOW, SINKS):
        pinned = sinks if name == SINKS else 0
        make = functools.partial(SinkCache, sinks=pinned, window=budget - pinned,
                                 positions=positions)
        return Method(name, budget, make)
    known = _policies()
    if name not in known:
        raise ValueError(f"policies has {name!r}, expected some of {', '.join(names())}")
    limit = SinkCache(1, *shape, sinks=sinks, window=budget - sinks).nbytes
    return _fitted(name, known[name], limit, budget, sinks, recent, positions, shape)


def _fitted(name, policy, limit, budget, sinks, recent, positions, shape):
    from sinkattn import KVCache

    def make(slots):
        return functools.partial(KVCache, policy=policy(), budget=slots, sinks=sinks,
                                 recent=min(recent, slots - sinks), positions=positions)

    for slots in range(budget, sinks, -1):
        if make(slots)(1, *shape).nbytes <= limit:
            return Method(name, slots, make(slots))
    raise ValueError(f"budget is {budget}: {name} does not fit into its {limit} bytes")
