"""Records, pictures, and `python -m sinkattn measure`."""

import dataclasses
import functools
import importlib.util
import json
import math
import sys

import numpy as np
import pytest

from sinkattn import measure
from sinkattn.__main__ import main
from sinkattn.demo.text import held_out_text
from sinkattn.measure.compare import _chosen
from sinkattn.measure.methods import FULL, SINKS, WINDOW, defaults, find, names, read_policy
from sinkattn.measure.report import text_report
from sinkattn.policy import H2O, SnapKV

TEXT = np.frombuffer(held_out_text()[0], np.uint8)


@pytest.fixture(scope="module")
def found(workers):
    return measure.compare(TEXT, [FULL, WINDOW, SINKS, "H2O"], rows=2, plants=2, distances=[60, 200, 300],
                           tokens=600, streams=2, workers=workers)


def test_students_interval():
    """Five values by hand: mean 3, s = sqrt(2.5), t(4) = 2.776."""
    found = measure.Estimate.of([1, 2, 3, 4, 5])
    assert (found.mean, found.count) == (3, 5)
    assert found.high - 3 == pytest.approx(2.776 * math.sqrt(2.5 / 5)) == 3 - found.low
    assert f"{measure.Estimate.of([2]):.1f}" == "2.0"


@pytest.mark.parametrize("count", [4, 12, 60])
def test_students_interval_covers_what_it_says(count):
    """2000 normal samples: within three standard deviations of 95 %."""
    random = np.random.default_rng(count)
    hits = [e.low <= 0 <= e.high for e in map(measure.Estimate.of, random.standard_normal((2000, count)))]
    assert abs(np.mean(hits) - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)


@pytest.mark.parametrize("share, between", [(0.04, 0.0), (0.5, 0.0), (0.5, 0.3)])
def test_the_interval_of_shares_covers_them(share, between):
    """Answers of 16 letters, independent or (between) right and wrong together."""
    random = np.random.default_rng(0)
    chance = np.clip(share + random.uniform(-between, between, (1000, 32)), 0, 1)
    shares = random.binomial(16, chance) / 16
    hits = [e.low <= share <= e.high for e in (measure.Estimate.of_shares(row, 16) for row in shares)]
    assert np.mean(hits) > 0.925


def test_the_interval_of_shares_is_never_empty():
    found = measure.Estimate.of_shares([1.0] * 10, 16)
    assert found.mean == found.high == 1 and found.low == pytest.approx(10 / (10 + 1.96**2))


def test_json_goes_there_and_back(found):
    assert measure.Comparison.from_json(found.to_json()) == found
    policy = found.policies[1]
    for record in (policy.near, policy.attention, policy.recall, policy.questions, policy):
        assert type(record).from_json(record.to_json()) == record


@pytest.mark.parametrize("change, words", [
    (lambda d: d.pop("low"), r"Estimate is \['count', 'high', 'mean'\], expected the fields"),
    (lambda d: d.update(more=1), "expected the fields"),
    (lambda d: d.update(count="7"), "Estimate.count is str, expected int"),
    (lambda d: d.update(mean=None), "Estimate.mean is NoneType, expected float"),
])
def test_a_record_that_does_not_fit_is_refused(change, words):
    plain = dataclasses.asdict(measure.Estimate.of([1.0, 2.0]))
    change(plain)
    with pytest.raises(ValueError, match=words):
        measure.Estimate.from_json(json.dumps(plain))
    with pytest.raises(ValueError, match="is int, expected list"):
        measure.Stream.from_json('{"buckets": 1, "bits": [], "tokens_per_second": 1, "nbytes": 0}')


def test_what_is_kept_and_forgotten(found):
    """The same three truths that the demo shows: all keys recall, a window does not, sinks keep the text readable."""
    full, window, sinks, h2o = found.policies
    assert full.attention.loss.mean == 0 and full.attention.top.mean == 1
    assert full.attention.error.mean < 1e-4
    assert window.attention.loss.mean > 2 * sinks.attention.loss.mean > 0.02
    assert window.near.bits[1].mean > 1.2 * sinks.near.bits[1].mean
    assert window.near.bits[0].mean == pytest.approx(sinks.near.bits[0].mean, abs=1e-5), "nothing is evicted before the budget is full"
    assert [p.accuracy.mean > 0.5 for p in sinks.recall.first] == [True, False, False]
    assert [p.accuracy.mean > 0.5 for p in full.recall.first] == [True] * 3
    assert sinks.questions.first.mean < 0.3 < full.questions.second.mean
    assert full.far.bits[1].mean > 2 * sinks.far.bits[1].mean
    assert window.nbytes == sinks.nbytes < full.nbytes / 3
    assert sinks.near_gap.mean == 0 < window.near_gap.mean
    assert 0.9 * sinks.nbytes < h2o.nbytes <= sinks.nbytes and h2o.budget < sinks.budget
    assert 0 < h2o.attention.least.mean < h2o.attention.loss.mean < window.attention.loss.mean
    assert min(min(row) for row in full.attention.sink_by_head) > 0.01


def test_every_method_gets_the_same_bytes():
    """As many slots as fit into the bytes of sinks + window, and one more would not."""
    from sinkattn import SinkCache
    limit = SinkCache(1, 2, 64, sinks=4, window=124).nbytes
    assert len(names()) > 12
    for name in names()[1:]:
        method = find(name, 128, 4, 32, "original", (2, 64))
        assert 0.95 * limit < method.make(1, 2, 64).nbytes <= limit, name
        if name not in (WINDOW, SINKS):
            more = functools.partial(method.make, budget=method.slots + 1)
            assert more(1, 2, 64).nbytes > limit, name


def test_a_policy_may_come_with_its_numbers():
    assert read_policy("H2O") == H2O()
    assert read_policy("SnapKV(w=16, pool='max')") == SnapKV(w=16, pool="max")
    assert set(names()) < set(defaults())


@pytest.mark.parametrize("words", ["SnapKV(16)", "SnapKV(w=x)", "SnapKV(v=1)", "SnapKV(w=1", "SnapKV(w=1.5)", "Custom"])
def test_a_policy_that_cannot_be_read_is_refused(words):
    with pytest.raises(ValueError, match="policies has"):
        read_policy(words)


def test_no_room_for_a_policy():
    """SnapKV keeps 32 tokens at least, and 32 numbers for each: more than the bytes of a small window. One that was
    asked for is refused, of all policies it is left out, and the report says so."""
    with pytest.raises(ValueError, match="budget is 40: SnapKV does not fit into its"):
        measure.compare(TEXT, ["SnapKV"], budget=40, recent=8)
    methods, left_out = _chosen(None, 40, 4, 8, (2, 64))
    assert "SnapKV" in left_out and "H2O" in [method.name for method in methods]
    assert {method.name for method in methods} | set(left_out) == set(defaults())


def test_a_policy_without_positions_in_slots_has_no_long_stream(workers):
    found = measure.compare(TEXT, [SINKS, "ExpectedAttention"], rows=2, plants=2, distances=[60], tokens=300,
                            streams=2, workers=workers)
    sinks, expected = found.policies
    assert sinks.far and expected.far is None and expected.far_gap is None and expected.near_gap.mean != 0
    assert "ExpectedAttention  " in text_report(found)


def test_what_was_left_out_is_said(found):
    text = text_report(dataclasses.replace(found, left_out=["SnapKV", "CUR"]))
    assert "Left out, for want of room: SnapKV, CUR." in text and "Left out" not in text_report(found)


def test_the_table_says_what_the_record_says(found):
    text = text_report(dataclasses.replace(found, text="a text"))
    assert "a text" in text
    for policy in found.policies:
        lines = [line for line in text.splitlines() if line.startswith(f"{policy.name}  ")]
        assert len(lines) == 4
        assert f"{policy.near.bits[-1]:.3f}" in lines[0] and f"{policy.attention.loss:.1%}" in lines[0]
        assert all(f"{point.accuracy:.2f}" in lines[1] for point in policy.recall.first)
        assert f"{policy.questions.second:.2f} (" in lines[2] and f"{policy.far.bits[1]:.3f}" in lines[3]
    worst = max(point.accuracy.mean for point in found.policies[2].recall.first[1:])
    assert f"beyond it at most {worst:.2f} of the letters" in text


def test_the_command(capsys, tmp_path):
    record, picture = tmp_path / "all.json", tmp_path / "all.png"
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    arguments = ["measure", "--quick", "--policies", f"{WINDOW}, SnapKV(w=8, kernel=9), {SINKS}", "--rows", "2", "--plants", "2",
                 "--distances", "60,200"]
    assert main([*arguments, "--json", str(record), *plot]) == 0
    said, written = capsys.readouterr().out, measure.Comparison.from_json(record.read_text())
    assert said.strip() == text_report(written)
    assert [p.name for p in written.policies] == [WINDOW, "SnapKV(w=8, kernel=9)", SINKS]
    assert written.settings["tokens"] == 0 and [p.far for p in written.policies] == [None] * 3
    assert [p.questions for p in written.policies] == [None] * 3, "one plant beyond the budget makes no pair"
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")
    assert main(["measure", "--quick", "--policies", SINKS, "--rows", "2", "--plants", "2", "--distances", "60", "--json", "-"]) == 0
    assert measure.Comparison.from_json(capsys.readouterr().out).policies[0].name == SINKS


@pytest.mark.parametrize("arguments, words", [
    (["--policies", "Best"], "--policies has 'Best', expected some of all keys"),
    (["--budget", "40", "--recent", "36"], "leave no room in --budget 40"),
    (["--budget", "7"], "expected 8 or more"),
    (["--distances", "0"], "expected 1 or more"),
])
def test_bad_options_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(["measure", *arguments])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["--text", "/no/such/file"], "No such file"),
    (["--distances", "480"], "a row of 520 tokens, expected at most the trained length, 512"),
    (["--budget", "500"], "budget is 500, expected 1 to 495"),
    (["--distances", "60,70"], "60 and 70 are 10 apart"),
])
def test_bad_settings_are_refused(arguments, words, capsys):
    assert main(["measure", "--quick", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_policies_are_known_by_name():
    with pytest.raises(ValueError, match="policies has 'None', expected some of all keys, window"):
        find("None", 64, 4, 16, "original", (2, 64))


def test_pictures(found, tmp_path):
    """By parts: what is drawn are the figures of the record."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figure = found.plot()
    panels = figure.axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [FULL, WINDOW, SINKS, "H2O"]
    shown = [text.get_text() for text in panels[0].texts]
    assert shown == [f"{p.accuracy:.2f}" for policy in found.policies for p in policy.recall.first]
    losses = panels[2].lines[0].get_xdata()
    np.testing.assert_allclose(losses, [policy.attention.loss.mean for policy in found.policies])
    assert panels[1].get_legend().get_texts()[0].get_text() == "asked when it shrank"
    policy = found.policies[2]
    drawn = policy.recall.plot().axes[0]
    np.testing.assert_allclose(drawn.lines[0].get_ydata(), [p.accuracy.mean for p in policy.recall.first])
    np.testing.assert_allclose(policy.near.plot().axes[0].lines[0].get_ydata(), [b.mean for b in policy.near.bits])
    np.testing.assert_allclose(policy.attention.plot().axes[0].lines[0].get_ydata(), policy.attention.loss_by_position)
    policy.recall.plot(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    pyplot.close("all")


def test_a_picture_without_matplotlib_says_what_to_install(found, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'sinkattn\[demo\]'"):
        found.plot()
    assert main(["measure", "--plot", "x.png"]) == 2
    assert "needs matplotlib" in capsys.readouterr().err
