"""The caches that `compare` compares, by name, each cut to the same bytes."""

import ast
import dataclasses
import functools
import importlib.util

from sinkattn.cache import SinkCache

from .full import FullCache

WHOLE = 1 << 16  # tokens in one call that are attended before any leaves
FULL, WINDOW, SINKS = "all keys", "window", "sinks + window"


class NoRoom(ValueError):
    """A policy whose bookkeeping leaves no room for what it must keep."""


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


def defaults():
    """All of `names()`, and SnapKV with a window and a pool as long as the planted questions and
    lines, without which it can hold on to little of them."""
    found = names()
    if "SnapKV" in found:
        found.insert(found.index("SnapKV") + 1, "SnapKV(w=16, kernel=33)")
    return found


def _policies():
    if importlib.util.find_spec("sinkattn.policy") is None:
        return {}
    from sinkattn import policy

    return {name: kind for name, kind in vars(policy).items()
            if isinstance(kind, type) and issubclass(kind, policy.Policy)
            and kind not in (policy.Policy, policy.Custom)}


def find(name, budget, sinks, recent, positions, shape):
    """The `Method` of a name; a policy's may have its numbers with it, as "SnapKV(kernel=33)".

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
    limit = SinkCache(1, *shape, sinks=sinks, window=budget - sinks).nbytes
    return _fitted(name, read_policy(name), limit, budget, sinks, recent, positions, shape)


def read_policy(text):
    """The policy that "H2O" or "SnapKV(w=16, pool='max')" stands for. ValueError for a name that
    is none, and for numbers that are no plain literals by name."""
    name, bracket, _ = text.partition("(")
    known = _policies()
    if name not in known:
        raise ValueError(f"policies has {text!r}, expected some of {', '.join(names())}")
    if not bracket:
        return known[name]()
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("expected numbers by name")
        numbers = {item.arg: ast.literal_eval(item.value) for item in call.keywords}
        return known[name](**numbers)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"policies has {text!r}: {error}") from None


def _fitted(name, policy, limit, budget, sinks, recent, positions, shape):
    from sinkattn import KVCache

    def make(slots):
        return functools.partial(KVCache, policy=policy, budget=slots, sinks=sinks,
                                 recent=min(recent, slots - sinks), positions=positions,
                                 chunk=WHOLE, track_mass=False, log=0)

    for slots in range(budget, sinks + max(1, policy.protects) - 1, -1):
        if make(slots)(1, *shape).nbytes <= limit:
            return Method(name, slots, make(slots))
    raise NoRoom(f"budget is {budget}: {name} does not fit into its {limit} bytes")
