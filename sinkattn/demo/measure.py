"""Runs the demo's measurements and returns them as one plain dict."""

import functools
import math
import os
import time

import numpy as np

from . import recall
from .methods import (
    Dense,
    FirstTokenMass,
    Recomputed,
    Streaming,
    recompute,
    stream,
    stream_rows,
    with_bos,
)

SINGLE_STEPS = 64


def edges(tokens, trained):
    """Buckets of positions: the trained length, then doublings. -> list of (first, end)."""
    found, first, end = [], 0, trained
    while first < tokens:
        found.append((first, min(end, tokens)))
        first, end = end, 2 * end
    return found


def lay_out(text, tokens, streams):
    """`streams` rows of `tokens` bytes that begin evenly spaced in `text` (uint8 [n]) and go round
    at its end; -> uint8 [streams, tokens]."""
    starts = np.arange(streams) * text.size // streams
    rows = np.empty((streams, tokens), dtype=np.uint8)
    for row, start in zip(rows, starts, strict=True):
        row[:] = np.resize(np.roll(text, -start), tokens)
    return rows


def draw_positions(buckets, streams, count, generator):
    """Distinct (rows, positions) in equal numbers from every bucket, `count` or a few more."""
    rows, positions = [], []
    each = math.ceil(count / len(buckets))
    for first, end in buckets:
        size = (end - first) * streams
        chosen = generator.choice(size, size=min(each, size), replace=False)
        rows.append(chosen // (end - first))
        positions.append(first + chosen % (end - first))
    return np.concatenate(rows), np.concatenate(positions)


def by_bucket(cost, positions, buckets):
    """Mean of cost [n] over the positions [n] of every bucket; None where there is none."""
    means = []
    for first, end in buckets:
        inside = (positions >= first) & (positions < end) & ~np.isnan(cost)
        means.append(float(cost[inside].mean(dtype=np.float64)) if inside.any() else None)
    return means


def resident_bytes():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


class _Watch:
    """Passes progress on and notes the resident memory after a tenth of the work and at its end."""

    def __init__(self, progress, total):
        self.progress, self.total, self.done, self.early = progress, total, 0, None

    def advance(self, amount):
        self.done += amount
        if self.early is None and self.done >= self.total / 10:
            self.early = resident_bytes()
        self.progress.advance(amount)

    def growth(self):
        late = resident_bytes()
        return None if self.early is None or late is None else late - self.early


def time_single_steps(model, attention, text, steps):
    """Bytes per second when one byte enters at a time; text uint8 [1, steps]."""
    inputs = with_bos(text)
    begun = time.perf_counter()
    for step in range(steps):
        model.forward(inputs[:, step : step + 1], attention)
    return steps / (time.perf_counter() - begun)


def first_token_mass(model, rows, sinks, slots):
    """Share of attention on the first token, per layer: in dense attention over the second half of
    the trained length, and in the full cache of sinks + window."""
    trained = model.config.context
    shares = {}
    dense = FirstTokenMass(Dense(model.config, len(rows), trained), model.config.layers)
    stream(model, dense, rows[:, :trained], chunk=trained // 2)
    shares["dense, positions 256-511"] = dense.shares
    if sinks:
        cached = FirstTokenMass(
            Streaming(model.config, len(rows), sinks, slots), model.config.layers
        )
        stream(model, cached, rows[:, : 4 * trained], chunk=256)
        shares["sinks + window, cache full"] = cached.shares
    return shares


def run(model, text, options, make_progress, workers):
    """Every measurement; returns the results that `report.py` prints and `--json` writes.

    text : uint8 [n]
    options : tokens, streams, window, sinks, seed, samples, plants, dense_tokens
    make_progress : called with the total number of bytes to read; gives a `Progress`
    workers : `Workers`
    """
    config, slots, sinks = model.config, options.window, options.sinks
    rows = lay_out(text, options.tokens, options.streams)
    buckets = edges(options.tokens, config.context)
    dense_length = min(options.tokens, options.dense_tokens)
    generator = np.random.default_rng(options.seed)
    at_rows, at = draw_positions(buckets, options.streams, options.samples, generator)
    cached = {"window": 0, "1 sink + window": 1, "sinks + window": sinks}
    if sinks == 1:
        del cached["1 sink + window"]

    reading = rows.size * len(cached) + rows[:, :dense_length].size
    asking = recall.work(config, slots, options.plants)
    progress = make_progress(reading + len(at) * slots + asking)
    everywhere = np.broadcast_to(np.arange(options.tokens), rows.shape)
    past = [(config.context, options.tokens)]
    methods, costs = {}, {}

    def record(name, cost, seconds, attentions, single):
        costs[name] = cost[at_rows, at]
        methods[name] = {
            "bits_per_byte": by_bucket(cost.ravel(), everywhere.ravel(), buckets),
            "past_trained_length": by_bucket(cost.ravel(), everywhere.ravel(), past)[0],
            "bytes_per_second": int(np.count_nonzero(~np.isnan(cost))) / seconds,
            "bytes_per_second_one_at_a_time": single,
            "cache_bytes_per_stream": sum(a.nbytes for a in attentions) // options.streams,
        }

    progress.stage("dense")
    begun = time.perf_counter()
    cost = np.full(rows.shape, np.nan, dtype=np.float32)
    cost[:, :dense_length], buffers = stream_rows(
        model, lambda count: Dense(config, count, dense_length), rows[:, :dense_length], workers,
        progress,
    )
    seconds = time.perf_counter() - begun
    ahead = np.take(rows[:1], np.arange(SINGLE_STEPS), axis=1, mode="wrap")
    single = time_single_steps(model, buffers[0].first_row(SINGLE_STEPS), ahead, SINGLE_STEPS)
    record("dense", cost, seconds, buffers, single)
    methods["dense"]["stopped_at"] = dense_length if dense_length < options.tokens else None
    del buffers

    growth = None
    for name, pinned in cached.items():
        progress.stage(name)
        watch = _Watch(progress, rows.size)
        begun = time.perf_counter()
        cost, caches = stream_rows(
            model, functools.partial(Streaming, config, sinks=pinned, slots=slots), rows, workers,
            watch,
        )
        seconds = time.perf_counter() - begun
        growth = watch.growth()
        alone = Streaming(config, 1, pinned, slots)
        stream(model, alone, np.resize(rows[:1], (1, 2 * slots)))
        single = time_single_steps(model, alone, ahead, SINGLE_STEPS)
        record(name, cost, seconds, caches, single)

    progress.stage(f"re-computation at {len(at)} positions")
    begun = time.perf_counter()
    fresh = recompute(model, rows, at_rows, at, slots, workers, progress=progress)
    seconds = time.perf_counter() - begun
    few = slice(len(at) // 2, len(at) // 2 + 8)
    begun = time.perf_counter()
    for row, position in zip(at_rows[few], at[few], strict=True):
        recompute(model, rows, row[None], position[None], slots, workers)
    single = len(at[few]) / (time.perf_counter() - begun)
    costs["window, re-computed"] = fresh
    methods["window, re-computed"] = {
        "bits_per_byte": by_bucket(fresh, at, buckets),
        "past_trained_length": by_bucket(fresh, at, past)[0],
        "bytes_per_second": len(at) / seconds,
        "bytes_per_second_one_at_a_time": single,
        "cache_bytes_per_stream": Recomputed.nbytes,
        "sampled": len(at),
    }

    progress.stage("recall against distance")
    remembered = recall.measure(
        model, text, sinks, slots, options.plants, options.seed, workers, progress
    )
    shares = first_token_mass(model, rows, sinks, slots)
    progress.close()
    return {
        "model": {
            "parameters": model.size, "layers": config.layers, "trained_length": config.context,
        },
        "settings": {
            "tokens": options.tokens, "streams": options.streams, "window": slots,
            "sinks": sinks, "seed": options.seed,
        },
        "text": {"bytes": int(text.size), "times_round": options.tokens / text.size},
        "buckets": [list(bucket) for bucket in buckets],
        "methods": methods,
        "same_positions": compare(costs, at, buckets, config.context),
        "recall": remembered,
        "recall_chance": recall.CHANCE,
        "first_token_mass": shares,
        "resident_growth_bytes": growth,
    }


def compare(costs, positions, buckets, trained):
    """All methods on the positions of re-computation; the ratio of sinks + window to it is taken
    past the trained length (or everywhere, if the streams end before)."""
    beyond = positions >= trained if (positions >= trained).any() else positions >= 0
    ours, fresh = costs["sinks + window"][beyond], costs["window, re-computed"][beyond]
    gap = (ours - fresh).astype(np.float64)
    half = 1.96 * gap.std(ddof=1) / math.sqrt(len(gap))
    base = float(fresh.mean(dtype=np.float64))
    ratio = float(ours.mean(dtype=np.float64)) / base
    return {
        "count": len(positions),
        "count_past_trained_length": int(beyond.sum()),
        "bits_per_byte": {
            name: by_bucket(cost, positions, buckets) for name, cost in costs.items()
        },
        "past_trained_length": {
            name: by_bucket(cost[beyond], positions[beyond], [(0, positions.max() + 1)])[0]
            for name, cost in costs.items()
        },
        "sinks_window_over_recomputed": ratio,
        "interval_95": [ratio - half / base, ratio + half / base],
    }
