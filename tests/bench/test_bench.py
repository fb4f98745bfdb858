"""The bench: its arithmetic, its results, its refusals. Nothing timed is asserted."""

import json
import subprocess
import sys

import numpy as np
import pytest

from sinkattn import Rope, SinkCache, _core, attend
from sinkattn.bench import clock, counts, hugging_face, main, statement
from sinkattn.bench.report import duration, quantity, text_report
from sinkattn.bench.suites import BY_NAME_ONLY, SUITES, Contestant, causal_mask

FIELDS = {"suite", "work", "title", "dtype", "who", "form", "kernel", "median_s", "min_s", "calls",
          "repeats", "flops", "bytes", "unit", "limit", "rate", "peak", "percent", "times_ours",
          "error", "bound", "hot", "note", "items"}


def run_quick(capsys, *arguments):
    code = main(["--quick", "--json", "-", *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("length", "window", "sinks"), [(1, None, 0), (70, None, 0), (70, 9, 0), (70, 9, 4),
                                                         (70, 1, 100), (5, 64, 4)])
def test_pairs_are_what_the_mask_shows(length, window, sinks):
    assert counts.visible_pairs(length, window, sinks) == causal_mask(length, window, sinks).sum()


def test_useful_work():
    assert counts.attention_flops(10, 8, 128) == 2 * 10 * 8 * (128 + 128)
    assert counts.array_bytes(2, (3, 4), (5,)) == 2 * 17


def test_percentages():
    assert counts.percent(50.0, 200.0) == 25.0
    assert counts.percent(50.0, None) is None and counts.percent(None, 200.0) is None
    assert counts.times_as_long(3.0, 1.5) == 2.0
    assert counts.roof(2.0, 100.0, 30.0) == 60.0 and counts.roof(9.0, 100.0, 30.0) == 100.0


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0112, "11.2 ms"), (1e-6, "1 us"), (0.9999, "1000 ms"), (1234.0, "1234 s")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_quantities_have_their_unit():
    assert quantity(4.1e10, "byte/s") == "41 GB/s"
    assert quantity(5.3e11, "FLOP/s") == "530 GFLOP/s"
    assert quantity(7.05e14, "FLOP/s") == "705 TFLOP/s"
    assert quantity(None, "call") == ""


def test_the_statement_finds_a_wrong_row():
    """The check must fail on what is wrong: here one number of the last query."""
    q, k, v = np.random.default_rng(1).standard_normal((3, 1, 2, 40, 16)).astype(np.float32)
    out = attend(q, k, v, window=8, sinks=2)
    assert statement.error_of(out, q, k, v, 8, 2) < 2e-6
    assert statement.error_of(out, q, k, v, 9, 2) > 1e-2
    out[0, 1, 39, 3] += 0.1
    assert statement.error_of(out, q, k, v, 8, 2) > 1e-3


def test_sets_go_round_and_the_last_result_is_known():
    seen = []
    one = Contestant("sinkattn", "f", lambda x: seen.append(x) or x * x, [(0,), (1,), (2,)], None)
    times, = clock.interleave([one], 3, 3, settle=False, repeat=1e-9)
    assert seen == [i % 3 for i in range(len(seen))]
    index, result = times.last
    assert result == index * index and len(times.seconds) == 3


@pytest.mark.parametrize("kind", ["fma", "bf16_dot", "read"])
def test_peaks_name_their_table(kind, table):
    """A peak comes from the table in use, or from one that has such instructions."""
    try:
        rate, name = _core.peak(kind, np.ones(1 << 19, np.float32))
    except NotImplementedError:
        pytest.skip(f"no table has {kind} here")
    assert rate > 0 and _core.config()["cpu_tables"][name] == "usable"
    if kind != "bf16_dot" and table != "reference":
        assert name == table


@pytest.mark.parametrize("arguments", [("nonsense", None), (3, None), ("fma",), ("read", b"short")])
def test_peak_refuses(arguments):
    with pytest.raises(ValueError, match=r"peak\(\)"):
        _core.peak(*arguments)


def test_a_run_has_every_line_and_every_field(capsys):
    code, results = run_quick(capsys)
    assert code == 0 and results["failed"] == []
    assert {line["suite"] for line in results["lines"]} == set(SUITES) - set(BY_NAME_ONLY)
    for line in results["lines"]:
        assert set(line) == FIELDS
        assert line["median_s"] >= line["min_s"] > 0
        assert (line["kernel"] is not None) == (line["who"] == "sinkattn")
        if line["limit"] and line["peak"]:
            assert line["percent"] == pytest.approx(100 * line["rate"] / line["peak"])
    for key in ("device", "machine", "versions", "settings", "peaks"):
        assert results[key]
    report = text_report(results)
    assert all(line["title"] in report and line["form"] in report for line in results["lines"])


def test_every_line_names_the_kernel_that_ran(capsys, table):
    _, results = run_quick(capsys, "--suite", "window,decode")
    kernels = {line["kernel"] for line in results["lines"] if line["who"] == "sinkattn"}
    assert kernels and all(kernel.startswith(f"{table}, ") for kernel in kernels)


def test_a_wrong_result_is_called_wrong(capsys, monkeypatch):
    monkeypatch.setattr("sinkattn.bench.suites.bound_of", lambda dtype, keys: 0.0)
    assert main(["--quick", "--suite", "window"]) == 1
    assert "out of bounds" in capsys.readouterr().out


def test_unknown_suites_are_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["--suite", "window,nonsense"])
    error = capsys.readouterr().err
    assert "no suite nonsense" in error and all(name in error for name in SUITES)


def test_steps_by_policy_are_right_and_stand_beside_a_sink_cache(capsys):
    code, results = run_quick(capsys, "--suite", "policies")
    assert code == 0 and results["failed"] == []
    forms = [line["form"] for line in results["lines"]]
    assert forms[0] == "SinkCache.attend" and "KVCache.attend, H2O" in forms


def test_generate_of_hugging_face(capsys):
    """By name alone; where transformers is missing, a sentence in its place."""
    code, results = run_quick(capsys, "--suite", "hf")
    assert code == 0
    if not results["lines"]:
        assert any("is not installed" in reason for reason in results["skipped"])
        return
    assert [line["who"] for line in results["lines"]] == ["sinkattn", "torch"]
    assert all(line["rate"] == pytest.approx(8 / line["median_s"]) for line in results["lines"])
    assert "token/s" in text_report(results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_on_its_own(capsys, dtype):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    assert hugging_face.main(["--quick", "--repeats", "1", "--dtype", dtype]) == 0
    head, context, ours, theirs = capsys.readouterr().out.splitlines()
    assert head.startswith("1 rows, 1 calls of 8 tokens") and context == "after 32 tokens"
    assert ours.split()[0] == "SinkCache" and theirs.split()[:3] == ["sdpa", "+", "DynamicCache"]
    assert float(ours.rpartition(" ")[2]) < {"float32": 2e-6, "bfloat16": 8e-3}[dtype]
    step, whole, held = map(float, theirs.split()[3:])
    assert step > 0 and whole > 0 and held == 2 * 2 * 32 * 16 * {"float32": 4, "bfloat16": 2}[dtype]


def test_a_wrong_step_of_a_stream_is_seen():
    """The check of generate's first layer must fail on another window."""
    random = np.random.default_rng(2)
    cache = SinkCache(1, 1, 8, sinks=2, window=6, rope=Rope.from_theta(8, applied=True))
    q, k, v = random.standard_normal((3, 1, 1, 20, 8)).astype(np.float32)
    out = cache.attend(q, k, v)[:, :, -1:]
    state = cache.state_dict()
    assert hugging_face.error_of_step(state, q[:, :, -1:], out) < 2e-6
    assert hugging_face.error_of_step(state | {"window": np.int64(5)}, q[:, :, -1:], out) > 1e-3


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--repeats", "4"], ["--device", "tpu"]])
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_device_that_is_not_built_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "sinkattn.bench.cuda", None)
    with pytest.raises(SystemExit, match="--device cuda is not in this build"):
        main(["--quick", "--device", "cuda"])


def test_the_plot_is_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "roofline.png"
    assert main(["--quick", "--suite", "prefill,linear,decode", "--plot", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_without_torch_the_lines_are_ours_and_numpy(tmp_path):
    """In a process of its own, where torch cannot be imported; and the bench is not imported at all
    by the package."""
    code = ("import sys, sinkattn; assert not any(x.startswith('sinkattn.bench') for x in sys.modules); "
            "import importlib.util as u; found = u.find_spec; "
            "u.find_spec = lambda name, *a: None if name == 'torch' else found(name, *a); "
            "from sinkattn.bench import main; code = main(['--quick', '--suite', 'decode']); "
            "assert 'torch' not in sys.modules; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "torch: not installed" in done.stdout and "SDPA" not in done.stdout
