"""Allocation refused at every site: MemoryError, nothing changed, nothing leaked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import native
import pytest
from errors import record

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux") or native.INSTRUMENTED,
                                reason="wraps the GNU C library")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What refuse_memory.py found: every request of every call refused, in turn."""
    native.require("gcc")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    native.link(library, [native.ROOT / "tests/c/faults.c"], [], flags=["-O1", "-fPIC", "-shared"])
    done = subprocess.run([sys.executable, "-W", "ignore", HERE / "refuse_memory.py"], timeout=300,
                          capture_output=True, text=True,
                          env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_request_of_every_call_may_be_refused(report):
    """The sweep ends by itself where a call succeeds: each request before was refused once."""
    for table in {name.split()[0] for name in report["refusals"]} - {"reference", "kv", "new"}:
        assert report["refusals"][f"{table} prefill"] >= 3
        assert report["refusals"][f"{table} decode"] >= 5
        assert report["refusals"][f"{table} mass"] >= 6
        assert report["refusals"][f"{table} backward"] >= 3
    assert report["refusals"]["reference new cache"] >= 8
    assert report["refusals"]["kv step"] >= 3 and report["refusals"]["kv parts"] >= 10
    assert sum(report["refusals"].values()) >= 50


def test_every_site_was_refused(report):
    """Each thing that csrc names as too large for memory was named in a MemoryError."""
    sites = {what for part in ("core", "cpu", "python") for path in (native.ROOT / "csrc" / part).rglob("*.[ch]")
             for what in re.findall(r'sa_no_memory\("([^"]*)"', path.read_text())}
    named = {match[1] for m in report["messages"]
             if (match := re.fullmatch(r"out of memory: \d+ bytes for (.*)", m))}
    assert named == sites
    for message in report["messages"]:
        record(message)


def test_the_interpreter_may_refuse_too(report):
    if not report["of_python"]:
        pytest.skip("this interpreter has no _testcapi.set_nomemory")
    assert report["of_python"]["dlpack"] >= 20 and report["of_python"]["merge"] >= 10
