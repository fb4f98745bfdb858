"""One run on CUDA: `run(options, say) -> results`, in the form of the CPU's.

Short calls are captured into a graph, once for each set of arguments, and the graph is replayed;
repeats of all contestants are interleaved. `python -m sinkattn.bench.cuda` prints a bare table.
"""

import argparse
import statistics
import time

import numpy as np

import sinkattn
from sinkattn.bench.cuda_works import SUITES, works
from sinkattn.config import cuda_devices

CALLS_IN_A_REPEAT = 64    # of short calls, at least
OVERHEAD_CALLS = 10_000


def load_torch():
    """torch with a GPU, or the reason why there is none."""
    count, sentence = cuda_devices()
    if count == 0:
        raise SystemExit(f"sinkattn bench: --device cuda: {sentence}")
    try:
        import torch
    except ImportError:
        raise SystemExit("sinkattn bench: --device cuda needs torch: "
                         "pip install 'sinkattn[bench]'") from None
    if not torch.cuda.is_available():
        raise SystemExit("sinkattn bench: --device cuda: this torch has no CUDA")
    return torch


class Graph:
    """All calls of a contestant once, captured; run() gives seconds per call."""

    def __init__(self, torch, calls):
        self.torch, self.calls = torch, calls
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        self.replays = max(1, CALLS_IN_A_REPEAT // len(calls))

    def run(self):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        begin.record()
        for _ in range(self.replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / (self.replays * len(self.calls))


class Eager:
    """Calls as they are: long ones hide their host time behind the one before."""

    def __init__(self, torch, calls):
        self.torch, self.calls = torch, calls
        for call in calls:
            call()
        self.turns = 4

    def run(self):
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.calls[-1]()
        begin.record()
        for _ in range(self.turns):
            for call in self.calls:
                call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / (self.turns * len(self.calls))


class HostTime:
    """The median host time of a call; the queue never fills."""

    def __init__(self, torch, calls):
        self.torch, self.call = torch, calls[0]
        for _ in range(100):
            self.call()

    def run(self):
        times, clock = [], time.perf_counter
        for i in range(OVERHEAD_CALLS):
            if i % 200 == 0:
                self.torch.cuda.synchronize()
            begin = clock()
            self.call()
            times.append(clock() - begin)
        return statistics.median(times)


def launched(call):
    """The kernels of ours that one call launches."""
    before = sinkattn.show_config()["cuda_launches"]
    call()
    after = sinkattn.show_config()["cuda_launches"]
    return " + ".join(name if count - before.get(name, 0) == 1 else
                      f"{count - before.get(name, 0)} {name}"
                      for name, count in after.items() if count > before.get(name, 0))


def error_of(torch, contestant):
    """Relative L2 of the first call's result over the rows that the expectation has."""
    if contestant.expected is None:
        return 0.0
    expected = contestant.expected()
    got = contestant.calls[0]()
    got = got[:expected.shape[0], :, -expected.shape[2]:].double()
    return float((got - expected).norm() / expected.norm())


def time_work(torch, work, repeats, skipped):
    kind = HostTime if work.suite == "overhead" else Graph if work.graph else Eager
    lines, timers = [], []
    for one in work.contestants:
        try:
            error = error_of(torch, one)
            kernel = launched(one.calls[0]) if one.who == "sinkattn" else None
            timers.append(kind(torch, one.calls))
        except Exception as reason:  # a peer that cannot do the work
            if one.who == "sinkattn":
                raise
            skipped.append(f"{work.title}: {one.form}: {str(reason).splitlines()[0][:80]}")
            continue
        lines.append({
            "suite": work.suite, "work": work.name, "title": work.title, "dtype": work.dtype,
            "who": one.who, "form": one.form, "kernel": kernel, "flops": work.flops,
            "bytes": work.bytes, "unit": work.unit, "limit": None, "peak": None, "error": error,
            "bound": work.bound, "hot": one.hot, "note": work.note, "repeats": repeats,
            "calls": len(one.calls), "seconds": [],
        })
    for _ in range(repeats):
        for line, timer in zip(lines, timers):
            line["seconds"].append(timer.run())
    for line in lines:
        seconds = line.pop("seconds")
        line["median_s"], line["min_s"] = statistics.median(seconds), min(seconds)
    return lines


def finish(lines, peaks):
    first = {}
    for line in lines:
        work = {"byte/s": line["bytes"], "FLOP/s": line["flops"]}.get(line["unit"])
        line["rate"] = work / line["median_s"] if work else None
        line["limit"] = {"byte/s": "copy", "FLOP/s": "matmul"}.get(line["unit"])
        line["peak"] = peaks[line["limit"]]["rate"] if line["limit"] else None
        line["percent"] = 100 * line["rate"] / line["peak"] if line["limit"] else None
        ours = first.setdefault(line["title"], line)
        line["times_ours"] = line["median_s"] / ours["median_s"]


def measure_peaks(torch, quick):
    """What this card does at best: a copy (bytes read and written), a bf16 matrix product."""
    size = 256 if quick else 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty((1 << 20) if quick else (2 << 30), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    peaks = {}
    for kind, unit, call, work in (
            ("copy", "byte/s", lambda: target.copy_(source), 2 * source.numel()),
            ("matmul", "FLOP/s", lambda: torch.mm(a, b), 2 * size ** 3)):
        timer = Eager(torch, [call])
        seconds = [timer.run() for _ in range(5)]
        peaks[kind] = {"rate": work / min(seconds), "median": work / statistics.median(seconds),
                       "trials": 5, "unit": unit, "table": f"torch {kind}"}
    return peaks


def describe(torch):
    facts = torch.cuda.get_device_properties(0)
    return {"processor": f"{facts.name} (sm_{facts.major}{facts.minor}), "
                         f"{facts.multi_processor_count} SMs, {facts.total_memory >> 30} GiB",
            "threads": sinkattn.get_num_threads(), "processors": facts.multi_processor_count,
            "last_cache_bytes": facts.L2_cache_size, "busy_elsewhere": None}


def run(options, say):
    """options: suite (names), repeats, quick. say(text): progress."""
    torch, begun = load_torch(), time.perf_counter()
    torch.manual_seed(0)
    peaks, lines, skipped = measure_peaks(torch, options.quick), [], []
    with torch.no_grad():
        for work in works(torch, options.suite, options.quick):
            say(work.title)
            lines += time_work(torch, work, options.repeats, skipped)
            work.contestants.clear()
            torch.cuda.empty_cache()
    finish(lines, peaks)
    skipped += [f"{name}: not a work of the CUDA table" for name in options.suite
                if name not in SUITES]
    versions = {"sinkattn": sinkattn.__version__, "numpy": np.__version__,
                "torch": torch.__version__, "compiler": sinkattn.show_config()["compiler"],
                "python": sinkattn.show_config()["python"]}
    return {
        "device": "cuda", "machine": describe(torch), "versions": versions,
        "settings": {"suites": list(options.suite), "repeats": options.repeats,
                     "read_buffer_bytes": 2 << 30, "seconds": time.perf_counter() - begun},
        "peaks": peaks, "lines": lines, "skipped": skipped,
        "failed": [line["title"] for line in lines
                   if line["who"] == "sinkattn" and not line["error"] <= line["bound"]],
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m sinkattn.bench.cuda")
    parser.add_argument("--suite", default=",".join(SUITES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    options.suite = options.suite.split(",")
    results = run(options, lambda text: None)
    print(results["machine"]["processor"], results["versions"])
    print({name: f"{peak['rate'] / 1e9:.0f} G{peak['unit']}"
           for name, peak in results["peaks"].items()})
    title = None
    for line in results["lines"]:
        if line["title"] != title:
            title = line["title"]
            print(f"\n{title}  [{line['note']}]")
        rate = f"{line['rate'] / 1e9:9.0f} G{line['unit']}" if line["rate"] else ""
        print(f"  {line['who']:9}{line['form']:34}{line['median_s'] * 1e6:10.2f} us {rate}  "
              f"x{line['times_ours']:.2f}  error {line['error']:.1e}  {line['kernel'] or ''}")
    for text in (*results["skipped"], *(f"WRONG: {t}" for t in results["failed"])):
        print(text)
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
