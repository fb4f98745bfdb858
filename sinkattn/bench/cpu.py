"""One run on the CPU.

Results, also of other devices, are plain numbers and strings:
    device, machine, versions, settings, skipped, notes
    peaks    {kind: {rate, median, trials, unit, table}}; rate: the best trial of the run
    lines    one for each contestant of each work: suite, work, title, dtype, who, form, kernel,
             median_s, min_s (per call), calls (timed in a repeat), repeats, flops, bytes,
             items, unit, rate (of the median), limit, peak (the best trial among this work's own
             repeats),
             percent, times_ours, error, bound, hot, note
    failed   titles of the works whose own result was out of bounds
"""

import time

import numpy as np

from sinkattn import _core, get_num_threads, set_num_threads

from . import counts, peers
from .clock import interleave
from .machine import (
    ASSUMED_CACHE,
    KINDS_OF_LIMIT,
    MIB,
    Neighbours,
    Peaks,
    available_bytes,
    describe,
    last_cache_bytes,
    versions,
)
from .suites import QUICK, SUITES, Lab, Sizes

LIMIT_OF_UNIT = {"FLOP/s": "flops", "byte/s": "bytes", "token/s": "items"}


def make_arena(sizes, cache_bytes, quick):
    """Memory far above the last cache: the read peak and the cold works share it."""
    size = sizes.arena
    if not quick:
        size = min(max(size, 4 * (cache_bytes or ASSUMED_CACHE)), available_bytes() // 4)
    arena = np.empty(size // (2 * MIB) * (2 * MIB) or 2 * MIB, np.uint8)
    arena.fill(1)  # pages that were never written are all the same page of zeros
    return arena


def kernel_of(contestant):
    """The table and the ways through it that one call takes."""
    if contestant.who != "sinkattn":
        return None
    before = _core.config()["rows_by_path"]
    contestant.call(*contestant.sets[0])
    config = _core.config()
    ways = [name for name, rows in config["rows_by_path"].items() if rows > before[name]]
    return f"{config['cpu_table']}, {' + '.join(ways)}"


def time_work(work, repeats, peaks):
    """The lines of a work. Trials of the peak that limits it are interleaved with its repeats: on a
    shared machine both have their slow moments."""
    sets = len(work.contestants[0].sets)
    kinds = KINDS_OF_LIMIT[work.limit]
    times = interleave(work.contestants, sets, repeats, between=lambda: peaks.measure(kinds))
    peak = peaks.best_of_limit(work.limit, repeats)
    lines = []
    for one, timed in zip(work.contestants, times):
        lines.append({
            "suite": work.suite, "work": work.name, "title": work.title, "dtype": work.dtype,
            "who": one.who, "form": one.form, "kernel": None, "median_s": timed.median,
            "min_s": timed.least, "calls": timed.calls, "repeats": len(timed.seconds),
            "flops": work.flops, "bytes": work.bytes, "items": work.items,
            "unit": work.unit, "limit": work.limit,
            "peak": peak, "error": one.error(*timed.last), "bound": work.bound, "hot": one.hot,
            "note": work.note,
        })
    for one, line in zip(work.contestants, lines):
        line["kernel"] = kernel_of(one)
    return lines


def finish(lines):
    """Rates, percentages of the peaks, times against our own."""
    first = {}
    for line in lines:
        useful = line.get(LIMIT_OF_UNIT.get(line["unit"]))
        line["rate"] = useful / line["median_s"] if useful else None
        line["percent"] = counts.percent(line["rate"], line["peak"])
        ours = first.setdefault(line["title"], line)
        line["times_ours"] = counts.times_as_long(line["median_s"], ours["median_s"])
    shortest = {}
    for line in lines:
        if line["suite"] == "linear":
            least = shortest.setdefault("line", line)
            per_query = line["median_s"] / line["bytes"], least["median_s"] / least["bytes"]
            line["note"] = (f"{per_query[0] / per_query[1]:.2f}x the time a query of "
                            f"{least['work'].removeprefix('linear, ')}")


def limit_threads(threads, torch):
    """Ours, torch's and, where threadpoolctl is there to do it, NumPy's. Returns what NumPy has."""
    set_num_threads(threads)
    if torch is not None:
        torch.set_num_threads(threads)
    try:
        import threadpoolctl
    except ImportError:
        return "its own default (threadpoolctl is not installed)"
    threadpoolctl.threadpool_limits(threads, user_api="blas")
    return threads


def run(options, say):
    """options: suite (names), threads (None: as set), repeats, quick. say(text): progress."""
    torch, sizes = peers.load_torch(), QUICK if options.quick else Sizes()
    threads = options.threads or get_num_threads()
    numpy_threads = limit_threads(threads, torch)
    cache_bytes = last_cache_bytes()
    arena = make_arena(sizes, cache_bytes, options.quick)
    lab = Lab(sizes, torch, peers.load_bfloat16(), arena, cache_bytes)
    peaks, neighbours, begun = Peaks(arena), Neighbours(), time.perf_counter()
    lines = []
    for suite in options.suite:
        peaks.measure()
        for work in SUITES[suite](lab):
            say(work.title)
            lines += time_work(work, options.repeats, peaks)
    finish(lines)
    if torch is None:
        lab.skip("torch: not installed, so no lines of torch; pip install 'sinkattn[bench]'")
    failed = [line["title"] for line in lines
              if line["who"] == "sinkattn" and not line["error"] <= line["bound"]]
    return {
        "device": "cpu",
        "machine": describe(threads) | {"numpy_threads": numpy_threads,
                                        "busy_elsewhere": neighbours.share()},
        "versions": versions(torch),
        "settings": {"suites": list(options.suite), "repeats": options.repeats,
                     "read_buffer_bytes": arena.size,
                     "seconds": time.perf_counter() - begun},
        "peaks": peaks.summary(),
        "lines": lines,
        "skipped": lab.skipped,
        "failed": failed,
    }
