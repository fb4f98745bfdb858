"""The C core without Python, compiled for a test: fuzzed, raced, sanitized."""

import ast
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

INSTRUMENTED = os.environ.get("SINKATTN_INSTRUMENTED") == "1"  # memory and time are not the shipped ones
ROOT = Path(__file__).resolve().parents[1]
COMMON = ("-std=gnu11", "-pthread", "-fno-math-errno", "-ffp-contract=off", "-UNDEBUG")
WARN = ("-Wall", "-Wextra", "-Werror")  # of the tests' own sources: setup.py watches over the core
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer")


def kernel_flags():
    """ISA_FLAGS of setup.py, their one home: its plain assignments, evaluated without the build."""
    names = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and all(isinstance(x, (ast.List, ast.Dict, ast.Tuple, ast.Constant,
                                                               ast.Name, ast.Starred, ast.Load, ast.Store))
                                                for x in ast.walk(node.value)):
            exec(compile(ast.Module([node], []), "setup.py", "exec"), names)
    return names["ISA_FLAGS"]


def accepts(compiler, flags, macro):
    source = f"#ifndef {macro}\n#error\n#endif\nint probe(void) {{ return 0; }}\n"
    done = subprocess.run([compiler, *flags, "-x", "c", "-c", "-", "-o", os.devnull], text=True,
                          input=source, capture_output=True)
    return done.returncode == 0


def compile_core(folder, compiler="gcc", flags=SANITIZE, watched=(), without=()):
    """Objects of csrc/core and csrc/cpu; `watched` are flags for all but the slow reference, `without`
    names kernel sources that are left out."""
    known = kernel_flags()
    kernels = {name: isa for name, (isa, macro) in known.items()
               if name not in without and accepts(compiler, isa, macro)}
    have = [f"-DSA_HAVE_{name[len('attend_'):-2].upper()}" for name in kernels]
    sources = [p for part in ("core", "cpu") for p in sorted((ROOT / "csrc" / part).glob("*.c"))
               if p.name not in known or p.name in kernels]

    def one(source):
        target = Path(folder, f"{source.parent.name}_{source.stem}.o")  # a stem may be in both
        more = () if source.name.startswith("reference") else watched
        subprocess.run([compiler, *COMMON, *flags, *more, *have, *kernels.get(source.name, ()), "-c",
                        str(source), "-o", str(target)], check=True)
        return target

    Path(folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, sources))


def link(target, sources, objects, compiler="gcc", flags=SANITIZE):
    subprocess.run([compiler, *COMMON, *WARN, *flags, *map(str, sources), *map(str, objects), "-lm", "-o",
                    str(target)], check=True)
    return target


def require(compiler, flags=()):
    """Skips where the compiler, or the runtime of a sanitizer, is missing."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    source = "int main(void) { return 0; }\n"
    done = subprocess.run([compiler, *flags, "-x", "c", "-", "-o", os.devnull], text=True,
                          input=source, capture_output=True)
    if done.returncode != 0:
        pytest.skip(f"{compiler} does not link with {' '.join(flags)}")
