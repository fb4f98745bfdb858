"""Compiles the extension. Metadata lives in pyproject.toml.

SINKATTN_WERROR=1      warnings are errors
SINKATTN_SANITIZE=...  for example address,undefined
SINKATTN_DEBUG=1       -O1 -g, assertions on
SINKATTN_COVERAGE=1    gcov counters
SINKATTN_CANARY=1      with mistakes that a sanitizer or valgrind must catch
SINKATTN_CUDA=...      auto, 1 or 0; csrc/cuda/nvcc.py has the rest
"""

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.platform == "win32":
    sys.exit("sinkattn does not build on Windows: its thread pool needs POSIX threads.")

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc/cuda"))
import nvcc

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Kernel source -> flags, and what the compiler then defines; left out where it does not.
ISA_FLAGS = {
    "attend_avx2.c": (AVX2, "__AVX2__"),
    "attend_avx512.c": (AVX512, "__AVX512F__"),
    "attend_avx512bf16.c": ([*AVX512, "-mavx512bf16"], "__AVX512BF16__"),
    "attend_amx.c": ([*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"], "__AMX_BF16__"),
    "attend_neon.c": ([], "__aarch64__"),
    "attend_neonbf16.c": (["-march=armv8.2-a+bf16"], "__ARM_FEATURE_BF16_VECTOR_ARITHMETIC"),
}


def switch(name):
    return os.environ.get(name, "") not in ("", "0")


def common_flags():
    # Python's own flags may say -fwrapv: nothing here wraps, and decode would be a tenth slower.
    flags = ["-std=gnu11", "-fvisibility=hidden", "-pthread", "-fno-math-errno", "-fno-wrapv",
             "-ffp-contract=off", "-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
    flags += ["-O1", "-g", "-UNDEBUG"] if switch("SINKATTN_DEBUG") else ["-O3", "-DNDEBUG"]
    if switch("SINKATTN_WERROR"):
        flags.append("-Werror")
    return flags + instrument_flags()


def instrument_flags():
    flags = []
    if sanitize := os.environ.get("SINKATTN_SANITIZE"):
        # Without -fwrapv, which hides overflows from the sanitizer.
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all",
                  "-fno-omit-frame-pointer", "-g"]
    if switch("SINKATTN_COVERAGE"):
        flags += ["--coverage"]
    if switch("SINKATTN_CANARY"):
        flags += ["-DSA_CANARY"]
    return flags


def accepts(compiler, flags, macro):
    """Does the compiler take the flags for the architecture that it compiles for?"""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(f"#ifndef {macro}\n#error\n#endif\nint probe(void) {{ return 0; }}\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def one_architecture(command):
    """macOS: a Python for two architectures asks for both, and no kernel is for both."""
    kept, words = [], iter(command)
    for word in words:
        if word == "-arch":
            next(words, None)
        else:
            kept.append(word)
    return [*kept, "-arch", platform.machine()]


class BuildExt(build_ext):
    """One object file a source, each with its own flags, in parallel, rebuilt when it must be."""

    def build_extension(self, ext):
        if sys.platform == "darwin" and "ARCHFLAGS" not in os.environ:
            self.compiler.compiler_so = one_architecture(self.compiler.compiler_so)
            self.compiler.linker_so = one_architecture(self.compiler.linker_so)
        compiler = self.compiler.compiler_so
        kernels = {name: flags for name, (flags, macro) in ISA_FLAGS.items()
                   if accepts(compiler, flags, macro)}
        have = [f"-DSA_HAVE_{name[len('attend_'):-2].upper()}" for name in kernels]
        sources = [Path(s) for s in ext.sources
                   if Path(s).name not in ISA_FLAGS or Path(s).name in kernels]
        includes = [f"-I{d}" for d in [*self.include_dirs]] + ["-isystem", numpy.get_include()]
        images, line = nvcc.prepare(self.build_temp)
        print(line, file=sys.stderr)
        flags = [*common_flags(), *have, *includes, f"-I{images}"]
        newest_image = max(p.stat().st_mtime for p in images.glob("*.h"))
        newest = max(p.stat().st_mtime for p in [*ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"])

        def compile_one(source):
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [*compiler, *flags, *kernels.get(source.name, []), "-c", str(source),
                       "-o", str(target)]
            stamp = target.with_suffix(".command")
            since = [newest, source.stat().st_mtime]
            if source.parent.name == "cuda":
                since.append(newest_image)
            current = (target.exists() and stamp.exists() and stamp.read_text() == str(command)
                       and target.stat().st_mtime > max(since))
            if not current:
                subprocess.run(command, check=True)
                stamp.write_text(str(command))
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = ["m", "dl"] if sys.platform.startswith("linux") else ["m"]
        needed = ["-Wl,--as-needed"] if sys.platform.startswith("linux") else []
        self.compiler.link_shared_object(objects, str(target), libraries=libraries,
                                         extra_preargs=needed,
                                         extra_postargs=["-pthread", *instrument_flags()])


sources = sorted(str(p.relative_to(ROOT)) for folder in ("core", "cpu", "cuda", "python")
                 for p in ROOT.glob(f"csrc/{folder}/*.[cS]"))
setup(ext_modules=[Extension("sinkattn._core", sources)], cmdclass={"build_ext": BuildExt})
