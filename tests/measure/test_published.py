"""What README and docs quote is what the shipped records say."""

import re
from pathlib import Path

import numpy as np
import pytest

from sinkattn.measure import Comparison
from sinkattn.measure.report import text_report

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def record():
    return Comparison.from_json((ROOT / "docs/measure/policies.json").read_text())


def mean(points, inside):
    return np.mean([p.accuracy.mean for p in points if (p.distance <= 128) == inside])


def test_the_table_of_the_readme(record):
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (.*) \|$", text[text.index("## The honest half"):text.index("## Install")], re.M)[1:]
    assert len(rows) == len(record.policies) > 12, "unflattering rows included"
    for row, policy in zip(rows, record.policies):
        name, *cells = row.split(" | ")
        assert name.strip("`").split(", 4 times")[0] == policy.name
        gap = policy.near_gap
        said = [f"{policy.near.bits[-1]:.3f} ({gap.mean:+.3f} ± {(gap.high - gap.low) / 2:.3f})", f"{policy.attention.loss:.1%}",
                *(f"{mean(policy.recall.first, inside):.2f}" for inside in (True, False)),
                f"{policy.questions.first:.2f}", f"{policy.questions.second:.2f}",
                f"{policy.far.bits[-1]:.2f}" if policy.far else "-"]
        if policy.name == "sinks + window":
            said[0] = f"{policy.near.bits[-1]:.3f}"
        assert cells == said


def test_what_the_readme_concludes(record):
    policies = {policy.name: policy for policy in record.policies}
    scored = [p for p in record.policies if p.name[0].isupper()]
    assert all(p.near_gap.high > 0 for p in scored), "none is better on plain text"
    assert sum(p.near_gap.low > 0 for p in scored) > len(scored) / 2, "most are worse"
    assert max(mean(p.recall.first, False) for p in scored) == pytest.approx(0.30, abs=0.005)
    assert mean(policies["Random"].recall.first, False) == pytest.approx(0.22, abs=0.005)
    assert min(record.policies[1:], key=lambda p: p.attention.loss.mean).name == "TOVA"
    assert [p.name for p in scored if p.far and p.far_gap.mean < p.near_gap.mean] == ["SinkWindow", "SnapKV(w=16, kernel=33)"]
    beyond = [p.accuracy.high for p in policies["sinks + window"].recall.first if p.distance > 128]
    assert max(beyond) < 0.1, "sinks + window forgets at the window's edge"
    settings = record.settings
    assert (settings["budget"], settings["sinks"], settings["recent"], settings["rows"], settings["plants"]) == (128, 4, 32, 16, 32)
    assert "better none" in text_report(record)


def test_the_speeds_of_the_readme():
    record = Comparison.from_json((ROOT / "docs/measure/speed.json").read_text())
    base = next(p for p in record.policies if p.name == "sinks + window")
    scored = [p for p in record.policies if p.name[0].isupper()]
    text = (ROOT / "README.md").read_text()
    for speed in (lambda p: p.far.tokens_per_second, lambda p: p.single_per_second):
        ratios = [speed(p) / speed(base) for p in scored]
        assert f"{min(ratios):.2f} to {max(ratios):.2f} times" in text
