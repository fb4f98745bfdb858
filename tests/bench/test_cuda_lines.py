"""What the CUDA bench hands to the table, without a GPU; with one, its smallest run."""

import argparse

import pytest

from sinkattn.bench import cuda
from sinkattn.bench.report import text_report
from sinkattn.config import cuda_devices


def line(**facts):
    return {"suite": "decode", "work": "decode", "title": "decode", "dtype": "bfloat16",
            "who": "sinkattn", "form": "attend", "kernel": "decode_bf16_128", "flops": 1e6,
            "bytes": 2e9, "unit": "byte/s", "limit": None, "peak": None, "error": 1e-3,
            "bound": 8e-3, "hot": False, "note": "cold", "repeats": 5, "calls": 4,
            "median_s": 1e-3, "min_s": 9e-4, **facts}


def test_lines_make_a_table():
    """Rates are useful bytes over the median, of the peak that limits them, and against ours."""
    lines = [line(), line(who="torch", form="SDPA cudnn", kernel=None, median_s=2e-3, error=2e-3),
             line(suite="overhead", title="overhead", unit="call", median_s=8e-6)]
    peaks = {kind: {"rate": 4e12, "median": 4e12, "trials": 5, "unit": unit, "table": f"torch {kind}"}
             for kind, unit in (("copy", "byte/s"), ("matmul", "FLOP/s"))}
    cuda.finish(lines, peaks)
    assert lines[0]["rate"] == 2e12 and lines[0]["percent"] == 50 and lines[1]["times_ours"] == 2
    assert lines[2]["rate"] is None and lines[2]["percent"] is None
    results = {
        "device": "cuda", "lines": lines, "peaks": peaks, "skipped": [], "failed": [],
        "machine": {"processor": "a GPU", "threads": 2, "processors": 132, "busy_elsewhere": None,
                    "last_cache_bytes": 60 << 20},
        "versions": dict.fromkeys(("sinkattn", "numpy", "torch", "compiler", "python"), "1"),
        "settings": {"repeats": 5, "read_buffer_bytes": 2 << 30, "suites": ["decode"]},
    }
    text = text_report(results)
    assert "SDPA cudnn" in text and "50 %" in text and "decode_bf16_128" in text


def test_the_smallest_run(monkeypatch):
    if cuda_devices()[0] == 0:
        with pytest.raises(SystemExit, match="--device cuda: "):
            cuda.load_torch()
        pytest.skip("no GPU")
    pytest.importorskip("torch")
    monkeypatch.setenv("SINKATTN_BENCH_FLEX", "0")
    options = argparse.Namespace(suite=["decode", "cache", "prefill", "overhead"], repeats=2, quick=True)
    results = cuda.run(options, lambda text: None)
    assert not results["failed"]
    assert {entry["suite"] for entry in results["lines"]} == set(options.suite)
    assert text_report(results)
