"""What is shipped: documents that run, commands that answer, one exported symbol."""

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native
import pytest

import sinkattn
from sinkattn import _core

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = Path(_core.__file__)


@pytest.mark.parametrize("document", ["README.md", "docs/semantics.md", "docs/measure.md", "docs/policies.md"])
def test_code_in_documents_runs(document):
    """Python blocks are executed in one namespace, top to bottom; >>> examples are compared."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    names = {}
    for block in blocks:
        for library in ("torch", "transformers"):
            if f"import {library}" in block or f"from {library}" in block:
                pytest.importorskip(library)
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, names, document, document, 0)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            runner.run(test, clear_globs=False)
            assert runner.failures == 0
            names.update(test.globs)
        else:
            exec(compile(block, document, "exec"), names)


@pytest.mark.parametrize("name", ["functional", "cache", "kv_cache", "rope"])
def test_docstring_examples(name):
    module = __import__(f"sinkattn.{name}", fromlist=["x"])
    assert doctest.testmod(module).failed == 0


@pytest.mark.skipif(native.INSTRUMENTED, reason="counters and sanitizers export their own")
@pytest.mark.skipif(shutil.which("nm") is None or not sys.platform.startswith("linux"),
                    reason="needs nm")
def test_only_the_init_function_is_exported():
    lines = subprocess.run(["nm", "-D", "--defined-only", EXTENSION], capture_output=True, text=True,
                           check=True).stdout.splitlines()
    names = {line.split()[-1] for line in lines} - {"_init", "_fini"}
    assert names == {"PyInit__core"}


@pytest.mark.skipif(native.INSTRUMENTED, reason="sanitizers need their own")
@pytest.mark.skipif(shutil.which("readelf") is None or not sys.platform.startswith("linux"),
                    reason="needs readelf")
def test_only_the_c_library_is_needed():
    text = subprocess.run(["readelf", "-d", EXTENSION], capture_output=True, text=True,
                          check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", text))
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


def test_the_stub_names_what_the_module_has():
    stub = (Path(sinkattn.__file__).parent / "_core.pyi").read_text()
    declared = set(re.findall(r"^(?:def|class) (\w+)", stub, re.M))
    assert declared == {name for name in dir(_core) if not name.startswith("__")}
    methods = set(re.findall(r"^    def (\w+)", stub.split("class Cache")[1], re.M)) - {"__new__"}
    assert methods == {name for name in dir(_core.Cache) if not name.startswith("_")}


@pytest.mark.parametrize(("arguments", "code"), [(["info"], 0), (["doctor"], 0), ([], 0), (["x"], 2)])
def test_commands_answer(arguments, code):
    done = subprocess.run([sys.executable, "-m", "sinkattn", *arguments], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "FAILED" not in done.stdout


def test_a_table_can_be_asked_for_by_the_environment():
    code = "import sinkattn; c = sinkattn.show_config(); print(c['cpu_table'], c['cpu_table_reason'])"
    for wish, chosen in (("reference", "reference SINKATTN_CPU"), ("nonsense", "unknown")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env={"SINKATTN_CPU": wish, "PYTHONPATH": ":".join(sys.path)})
        assert chosen in done.stdout


def test_public_names():
    assert set(sinkattn.__all__) == {"attend", "attend_backward", "mass", "merge", "SinkCache", "KVCache", "Ledger", "Rope", "policy",
                                     "pyramid", "set_num_threads",
                                     "get_num_threads", "show_config", "__version__"}
