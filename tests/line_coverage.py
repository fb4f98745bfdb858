"""Lines run, by folder: python tests/line_coverage.py BUILD, after a suite that ran with
SINKATTN_COVERAGE=1 under `coverage run`. Fails below the bounds."""

import collections
import json
import subprocess
import sys
from pathlib import Path

from on_device import has_cuda

ROOT = Path(__file__).resolve().parents[1]
C_BOUND, PYTHON_BOUND = 90.0, 95.0
NOT_SHIPPED = {"csrc/python/canary.c"}
NEEDS_GPU = ("csrc/cuda/", "csrc/python/bind_cuda_cache.c", "csrc/python/device.c", "csrc/python/run_cuda.c",
             "sinkattn/_libraries.py", "sinkattn/bench/cuda.py", "sinkattn/bench/cuda_works.py",
             "sinkattn/demo/train.py")


def counts_here(name):
    return not name.startswith(NEEDS_GPU) or has_cuda()


def lines_of_c(build):
    """file -> {line: was run}; a header counts once, however many kernels include it."""
    lines = collections.defaultdict(dict)
    for counts in Path(build).rglob("*.gcda"):
        report = subprocess.run(["gcov", "--json-format", "--stdout", str(counts)], check=True,
                                capture_output=True, text=True).stdout
        for file in (file for line in report.splitlines() for file in json.loads(line)["files"]):
            path = (ROOT / file["file"]).resolve()
            if path.is_relative_to(ROOT / "csrc"):
                name = str(path.relative_to(ROOT))
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[name][number] = lines[name].get(number, False) or line["count"] > 0
    return {name: each for name, each in lines.items() if name not in NOT_SHIPPED and counts_here(name)}


def lines_of_python():
    subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", "coverage.json"], check=True)
    files = json.loads(Path("coverage.json").read_text())["files"]
    return {name: {**dict.fromkeys(file["executed_lines"], True), **dict.fromkeys(file["missing_lines"], False)}
            for name, file in files.items() if counts_here(name)}


def tell(files, bound, verbose):
    """Prints the share of each folder and of all; returns whether all is enough."""
    folders = collections.defaultdict(list)
    for name, lines in files.items():
        folders[str(Path(name).parent)] += lines.values()
        if verbose and not all(lines.values()):
            print(f"    {name}: {sorted(n for n, run in lines.items() if not run)}")
    for folder, lines in sorted(folders.items()):
        print(f"  {folder:16} {100 * sum(lines) / len(lines):5.1f} %  of {len(lines)} lines")
    every = [run for lines in files.values() for run in lines.values()]
    share = 100 * sum(every) / len(every)
    print(f"  {'together':16} {share:5.1f} %  (bound {bound:g} %)")
    return share >= bound


def main(build, *options):
    verbose = "-v" in options
    print("lines of C that ran:")
    enough_c = tell(lines_of_c(build), C_BOUND, verbose)
    print("lines of Python that ran:")
    enough_python = tell(lines_of_python(), PYTHON_BOUND, verbose)
    return 0 if enough_c and enough_python else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
