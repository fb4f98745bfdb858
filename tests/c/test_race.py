"""race.c under the thread sanitizer."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import native
import pytest

FLAGS = ("-O1", "-g", "-fsanitize=thread")
pytestmark = [pytest.mark.native, pytest.mark.skipif(native.INSTRUMENTED, reason="has tools of its own")]


def test_callers_forks_and_changing_threads_do_not_race(tmp_path):
    """A worker that woke too late read its scratch while the owner of the pool replaced it."""
    native.require("gcc", FLAGS)
    race = native.link(tmp_path / "race", [Path(__file__).with_name("race.c")],
                       native.compile_core(tmp_path / "objects", flags=FLAGS), flags=FLAGS)
    # Where addresses are random the sanitizer may not find room for its shadow.
    fixed = ("setarch", "-R") if shutil.which("setarch") else ()
    done = subprocess.run([*fixed, race, "10", "4"], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:die_after_fork=0"})
    assert done.returncode == 0, done.stderr[-6000:]
    compared, cancelled = map(int, re.findall(r"\d+", done.stdout))
    assert compared >= 500 and cancelled >= 1
