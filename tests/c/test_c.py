"""Pure C parts with tests in C: compiled with warnings as errors and sanitizers, and run."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror",
         "-fsanitize=undefined", "-fno-sanitize-recover"]


@pytest.mark.parametrize("test, parts", [
    ("test_choose.c", [f"csrc/cuda/{name}.c" for name in ("choose", "choose_prefill", "choose_backward")]),
    ("test_select.c", ["csrc/core/select.c", "csrc/core/ledger.c"]),
])
def test_c_part(test, parts, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "program"
    sources = [str(Path(__file__).parent / test), *(str(ROOT / part) for part in parts)]
    subprocess.run([compiler, *FLAGS, *sources, "-o", str(program), "-lm"], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
