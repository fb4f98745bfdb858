"""Fuzzing by hand. Needs clang with libFuzzer.

python tests/fuzz/libfuzzer.py build                 harnesses into build/fuzz
python tests/fuzz/libfuzzer.py fuzz attend 60        one harness for so many seconds
python tests/fuzz/libfuzzer.py keep                  what covers something new joins tests/fuzz/corpus
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import native

BUILD = native.ROOT / "build" / "fuzz"
HARNESSES = ("attend", "backward", "cache", "check", "half", "kv", "mass", "merge", "ring")
CLANG = "clang-14"
MOST = {"kv": 80}  # inputs kept of a harness, else 160: valgrind runs them all in some seconds


def build():
    common = [*native.SANITIZE, "-O2"]
    objects = native.compile_core(BUILD / "objects", CLANG, common, ["-fsanitize=fuzzer-no-link"])
    for name in HARNESSES:
        native.link(BUILD / name, [HERE / f"{name}.c"], objects, CLANG, [*common, "-fsanitize=fuzzer"])


def unpack(name):
    """The corpus as the folder of files that libFuzzer wants."""
    folder = BUILD / "corpus" / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = HERE / "corpus" / f"{name}.txt"
    for i, line in enumerate(kept.read_text().splitlines() if kept.exists() else ()):
        (folder / f"kept{i}").write_bytes(bytes.fromhex(line))
    return folder


def fuzz(name, seconds):
    """Returns how many inputs ran; raises where one of them found something."""
    folder = unpack(name)
    command = [str(BUILD / name), str(folder), f"-max_total_time={seconds}", "-max_len=400", "-len_control=10",
               "-print_final_stats=1", "-timeout=300", "-malloc_limit_mb=1000000000", "-verbosity=0", f"-artifact_prefix={BUILD}/{name}-"]
    done = subprocess.run(command, capture_output=True, text=True)
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    if done.returncode != 0:
        print(done.stderr[-6000:], file=sys.stderr)
        raise SystemExit(f"{name}: a finding")
    return int(runs.group(1))


def keep():
    """Small inputs first; libFuzzer's merge drops those that add no coverage."""
    for name in HARNESSES:
        small = BUILD / "small" / name
        small.mkdir(parents=True, exist_ok=True)
        for old in small.iterdir():
            old.unlink()
        subprocess.run([str(BUILD / name), "-merge=1", "-verbosity=0", str(small), str(unpack(name))],
                       check=True, capture_output=True)
        inputs = sorted({p.read_bytes() for p in small.iterdir()}, key=lambda x: (len(x), x))
        chosen = inputs[::max(1, -(-len(inputs) // MOST.get(name, 160)))]
        (HERE / "corpus" / f"{name}.txt").write_text("".join(x.hex() + "\n" for x in chosen))
        print(f"{name}: {len(chosen)} of {len(inputs)} inputs")


def main(arguments):
    if arguments == ["build"]:
        build()
    elif arguments == ["keep"]:
        keep()
    elif len(arguments) == 3 and arguments[0] == "fuzz" and arguments[1] in HARNESSES:
        print(f"{arguments[1]}: {fuzz(arguments[1], int(arguments[2]))} runs, no finding")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
