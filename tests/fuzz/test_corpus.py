"""The inputs that fuzzing kept, replayed: under the sanitizers, and under valgrind, which alone sees
what is read before it was written. Each tool must first catch a mistake made on purpose."""

import shutil
import subprocess
from pathlib import Path

import native
import pytest
from libfuzzer import HARNESSES

HERE = Path(__file__).resolve().parent
pytestmark = [pytest.mark.native, pytest.mark.skipif(native.INSTRUMENTED, reason="has tools of its own")]
VALGRIND = ("valgrind", "-q", "--error-exitcode=9")  # 3.19 knows AVX2 and no AVX-512
UNKNOWN = ("attend_avx512.c", "attend_avx512bf16.c", "attend_amx.c")  # could not run there


def build(folder, flags, without=()):
    objects = native.compile_core(folder / "objects", flags=flags, without=without)
    return {name: native.link(folder / name, [HERE / f"{name}.c", HERE / "replay.c"], objects, flags=flags)
            for name in HARNESSES}


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    native.require("gcc", native.SANITIZE)
    return build(tmp_path_factory.mktemp("sanitized"), native.SANITIZE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    native.require("gcc")
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    return build(tmp_path_factory.mktemp("plain"), ("-O1", "-g"), UNKNOWN)


def replay(command, name):
    corpus = HERE / "corpus" / f"{name}.txt"
    done = subprocess.run([*command, corpus], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) == len(corpus.read_text().splitlines()) >= 10


def canary(command, kind):
    done = subprocess.run([*command, kind], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize("name", HARNESSES)
def test_the_corpus_runs_under_the_sanitizers(name, sanitized):
    assert "heap-buffer-overflow" in canary([sanitized[name]], "memory")
    assert "signed integer overflow" in canary([sanitized[name]], "integer")
    replay([sanitized[name]], name)


@pytest.mark.parametrize("name", [n for n in HARNESSES if n != "merge"])  # it has no long double
def test_the_corpus_runs_under_valgrind(name, plain):
    assert "Invalid read" in canary([*VALGRIND, plain[name]], "memory")
    assert "uninitialised" in canary([*VALGRIND, plain[name]], "undefined")
    replay([*VALGRIND, plain[name]], name)
