"""Policies at equal bytes, on the shipped model: runs every measurement."""

import dataclasses
import time

import numpy as np

from sinkattn.rope import Rope

from . import recall as asking
from . import stream
from .methods import SINKS, NoRoom, defaults, find
from .models import shipped
from .plants import GAP, plant
from .probe import Probe, summarise
from .records import Comparison, Estimate, PolicyResult

START = 256
SINGLE_STEPS = 48
LEAD = 64  # bytes before the farthest plant, where there is room
LOOKS = 24  # queries of a row at which attention loss is taken, about


def default_distances(budget, trained):
    """Two inside the budget where they fit, and some beyond it, up to the trained length."""
    last = trained - LEAD - 78  # room for two questions behind the farthest plant
    shares = (0.5, 0.82, 1.25, 1.7, 2.3, 3.2)
    found = []
    for share in shares:
        distance = max(round(budget * share), 48 if not found else found[-1] + 40)
        if distance <= last:
            found.append(distance)
    if not found or last - found[-1] >= 40:
        found.append(last)
    return found


def crops(text, rows, length):
    """Rows of `length` bytes from places evenly spaced in `text`, going round at its end, START in
    front: int64 [rows, 1 + length]."""
    begins = np.arange(rows)[:, None] * text.size // rows
    body = np.take(text, begins + np.arange(length), mode="wrap").astype(np.int64)
    return np.concatenate([np.full((rows, 1), START), body], axis=1)


def compare(text, policies=None, *, budget=128, sinks=4, recent=32, rows=16, plants=32,
            distances=None, tokens=2048, streams=4, chunk=16, seed=0, workers=None,
            make_progress=None):
    """Compares policies on the shipped byte-level model; what `python -m sinkattn measure` runs.

    text : uint8 [n]. policies : names as `methods.find` takes them, default all that have room.
    budget : tokens a kv head of sinks + window; the others get the same bytes. sinks, recent : what
        every policy keeps at least.
    rows : streams of the trained length, for bits and attention loss. plants : rows with planted
        lines at `distances`. tokens, streams : the long streams, past the trained length, with
        positions counted in slots; tokens=0 leaves them out.
    chunk : bytes in one call. make_progress : called with the work in all, gives a `Progress`.
    Returns a `Comparison`.
    """
    from .models import _shipped_model

    config = _shipped_model().config
    trained, shape = config.context, (config.heads_kv, config.head_depth)
    distances = default_distances(budget, trained) if distances is None else distances
    near, left_out = _chosen(policies, budget, sinks, recent, shape)
    rope = Rope(config.inverse_frequencies())
    far = [_in_slots(method.name, budget, sinks, recent, shape, rope) for method in near]
    planted = plant(text, distances, plants, seed=seed)
    if planted.reach > trained:
        raise ValueError(f"distances reach to {max(distances)}: a row of {planted.reach} tokens, "
                         f"expected at most the trained length, {trained}")
    lead = min(LEAD, GAP + trained - planted.reach)
    planted = plant(text, distances, plants, lead=lead, seed=seed)
    if not 1 <= budget < trained - chunk:
        raise ValueError(f"budget is {budget}, expected 1 to {trained - chunk - 1}, so that "
                         "something is forgotten within the trained length")
    texts = crops(text, rows, trained - 1), crops(text, streams, tokens)
    asked = asking.work(planted, len(distances) > 1, sum(d > budget for d in distances) > 1)
    one = rows * trained + streams * tokens + asked + SINGLE_STEPS
    progress = make_progress(one * len(near)) if make_progress else None

    results, costs = [], {}
    for method, long_method in zip(near, far):
        if progress is not None:
            progress.stage(method.name)
        result, costs[method.name] = _measure(
            method, long_method, texts, planted, budget, sinks, chunk, workers, progress)
        results.append(result)
    if progress is not None:
        progress.close()
    if SINKS in costs:
        results = [_with_gaps(result, costs[result.name], costs[SINKS]) for result in results]
    settings = {
        "budget": budget, "sinks": sinks, "recent": recent, "rows": rows, "plants": plants,
        "tokens": tokens, "streams": streams, "chunk": chunk, "seed": seed, "trained": trained,
        "layers": config.layers, "kv_heads": config.heads_kv,
    }
    return Comparison(settings=settings, text="", policies=results, left_out=left_out)


def _chosen(policies, budget, sinks, recent, shape):
    """(methods, names of those that were not asked for by name and have no room)."""
    found, left_out = [], []
    for name in defaults() if policies is None else policies:
        try:
            found.append(find(name, budget, sinks, recent, "original", shape))
        except NoRoom:
            if policies is not None:
                raise
            left_out.append(name)
    return found, left_out


def _in_slots(name, budget, sinks, recent, shape, rope):
    """The method with positions counted in slots; None for a policy that knows no such thing."""
    try:
        method = find(name, budget, sinks, recent, "slot", shape)
        method.make(1, *shape, rope=rope)
        return method
    except NotImplementedError:
        return None


def _with_gaps(result, costs, base):
    near, far = (None if own is None else Estimate.of(own - other)
                 for own, other in zip(costs, base))
    return dataclasses.replace(result, near_gap=near, far_gap=far)


def _measure(method, long_method, texts, planted, budget, sinks, chunk, workers, progress):
    """(PolicyResult, (bits of each near row past the budget, of each far row's last bucket))."""
    short, long = texts
    length = short.shape[1] - 1
    looks_from = budget + chunk
    every = max((length - looks_from) // chunk // LOOKS, 1)

    def probed(rows, kv_heads, head_dim, rope):
        cache = method.make(rows, kv_heads, head_dim, rope=rope)
        return Probe(cache, rows, kv_heads, head_dim, rope=rope, every=every, sinks=max(sinks, 1))

    buckets = [[0, budget], [budget, length]]
    cost, seconds, readers = stream.stream_costs(shipped(probed), short, chunk, workers, progress)
    near = stream.summarise(cost, buckets, seconds, readers)
    attention = summarise([reader.caches for reader in readers], looks_from)

    model = shipped(method.make)
    remembered = asking.recall(model, planted, chunk=chunk, workers=workers, progress=progress)
    beyond, questions = np.flatnonzero(planted.distances[0] > budget), None
    if len(beyond) > 1:
        questions = asking.two_questions(model, planted, among=beyond, chunk=chunk,
                                         workers=workers, progress=progress)
    far = far_cost = None
    if long.shape[1] > 1 and long_method is not None:
        far, far_cost = _far(long_method, long, chunk, workers, progress)
    single = _single(method, short, budget, progress)
    return PolicyResult(
        name=method.name, budget=method.slots, nbytes=near.nbytes // len(short), near=near,
        near_gap=None, attention=attention, recall=remembered, questions=questions, far=far,
        far_gap=None, single_per_second=single,
    ), (cost[:, budget:].mean(axis=1), far_cost)


def _far(method, tokens, chunk, workers, progress):
    cost, seconds, readers = stream.stream_costs(shipped(method.make), tokens, chunk, workers,
                                                 progress)
    found = stream.summarise(cost, stream.doublings(cost.shape[1], 512), seconds, readers)
    return found, cost[:, found.buckets[-1][0]:].mean(axis=1)


def _single(method, tokens, budget, progress):
    """Tokens per second of one row, one token at a time, once the budget is full."""
    reader = shipped(method.make)(1)
    reader.read(tokens[:1, :budget])
    begun = time.perf_counter()
    for step in range(SINGLE_STEPS):
        reader.read(tokens[:1, budget + step:budget + step + 1])
    seconds = time.perf_counter() - begun
    if progress is not None:
        progress.advance(SINGLE_STEPS)
    return SINGLE_STEPS / seconds
