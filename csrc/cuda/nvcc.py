"""Finds nvcc and compiles each csrc/cuda/*.cu to a fatbin; setup.py embeds them through image.S.

SINKATTN_CUDA=auto|1|0    auto: with nvcc if there is one; 1: an error without it; 0: never
SINKATTN_NVCC=path        else CUDA_HOME, CUDA_PATH, PATH, pip's nvidia packages, /usr/local/cuda
SINKATTN_CUDA_ARCHS=...   comma-separated; sm_* is machine code, compute_* is PTX
CUDAHOSTCXX=path          the host compiler that nvcc uses
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ARCHS = "sm_90a,sm_80,compute_80"
FLAGS = ["-fatbin", "-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr",
         "-Xfatbin=--compress-all"]
BYTES_A_WORKER = 4 << 30  # what a heavy kernel file takes to compile
HELP = ("install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl` first and "
        "build with --no-build-isolation, or name the compiler in SINKATTN_NVCC")


def _from_pip():
    """nvcc of the packages nvidia-cuda-nvcc and its like, which share one namespace."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else []:
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)


def find():
    """The path of nvcc, or None."""
    named = os.environ.get("SINKATTN_NVCC")
    if named and shutil.which(named) is None:
        sys.exit(f"SINKATTN_NVCC is {named}, which is no program that runs.")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [named, *(Path(home, "bin", "nvcc") for home in homes), shutil.which("nvcc"),
                  *_from_pip(), "/usr/local/cuda/bin/nvcc"]
    return next((str(path) for path in candidates if path and shutil.which(str(path))), None)


def archs():
    wish = os.environ.get("SINKATTN_CUDA_ARCHS") or ARCHS
    names = [name.strip() for name in wish.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"(sm|compute)_\d+[af]?", name):
            sys.exit(f"SINKATTN_CUDA_ARCHS holds {name!r}, expected names like {ARCHS}.")
    return names


def _text_of(source, seen):
    """A source and all that it includes by quotes, as one text."""
    seen.add(source)
    text = source.read_text()
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.M):
        header = (source.parent / name).resolve()
        if header.exists() and header not in seen:
            text += _text_of(header, seen)
    return text


def _fatbin(source, compiler, version, flags, folder):
    """Compiled only if no fatbin of the same text, flags and compiler is there."""
    key = "\n".join([version, *flags, _text_of(source, set())])
    target = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.fatbin"
    if not target.exists():
        for old in folder.glob(f"{source.stem}-*.fatbin"):
            old.unlink()
        half = target.with_suffix(".half")
        subprocess.run([compiler, *flags, str(source), "-o", str(half)], check=True)
        half.rename(target)
    return target


def _workers():
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        pages = BYTES_A_WORKER
    return max(1, min(os.cpu_count() or 1, pages // BYTES_A_WORKER))


def _compile(sources, compiler, names, folder):
    flags = [*FLAGS, *(f"-gencode=arch={n.replace('sm_', 'compute_')},code={n}" for n in names)]
    if host := os.environ.get("CUDAHOSTCXX"):
        flags += ["-ccbin", host]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    with ThreadPoolExecutor(_workers()) as pool:
        return list(pool.map(
            lambda s: _fatbin(s, compiler, version.stdout, flags, folder), sources))


def _write(path, text):
    """Leaves the file, and so its time, alone where it would not change."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def prepare(build_temp):
    """Compiles what is to be compiled and writes images.h, the list that image.S and driver.c read.

    Returns (folder of images.h, one line for the user)."""
    folder = Path(build_temp, "cuda")
    folder.mkdir(parents=True, exist_ok=True)
    wish = os.environ.get("SINKATTN_CUDA") or "auto"
    if wish not in ("auto", "1", "0"):
        sys.exit(f"SINKATTN_CUDA is {wish!r}, expected auto, 1 or 0.")
    compiler = find() if wish != "0" else None
    if wish == "1" and compiler is None:
        sys.exit(f"SINKATTN_CUDA=1, but no nvcc was found: {HELP}.")
    images, names = [], archs()
    sources = sorted(FOLDER.glob("*.cu"))
    if compiler:
        images = _compile(sources, compiler, names, folder)
        reason, line = "", f"sinkattn: CUDA kernels for {', '.join(names)} by {compiler}"
    elif wish == "0":
        reason = "SINKATTN_CUDA=0 at build time"
        line = "sinkattn: CPU only, as SINKATTN_CUDA=0 asks"
    else:
        reason = "no nvcc was found at build time"
        line = f"sinkattn: CPU only, no nvcc was found. For CUDA {HELP}."
    entries = [f'SA_IMAGE({image.name.rpartition("-")[0]}, "{image.resolve()}")\n'
               for image in images]
    _write(folder / "images.h", "".join(entries))
    built = ", ".join(names) if images else ""
    _write(folder / "images_built.h",
           f'#define SA_CUDA_ARCHS "{built}"\n#define SA_CUDA_NOT_BUILT "{reason}"\n')
    return folder, line
