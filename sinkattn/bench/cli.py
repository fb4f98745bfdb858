"""The command line."""

import argparse
import importlib
import importlib.util
import json
import pathlib
import sys

from sinkattn._arguments import at_least

from .suites import BY_NAME_ONLY, SUITES

LEAST_REPEATS = 5


def suites_of(word):
    names = [name.strip() for name in word.split(",") if name.strip()]
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"no suite {', '.join(unknown) or repr(word)}; there are: {', '.join(SUITES)}")
    return names


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m sinkattn bench",
        description="Times the kernels against torch and NumPy and against this machine's own "
        "peaks, all in one run, and checks every timed result.")
    usual = [name for name in SUITES if name not in BY_NAME_ONLY]
    parser.add_argument("--suite", type=suites_of, default=usual, metavar="NAME[,NAME]",
                        help=f"some of: {', '.join(SUITES)} (default: all but "
                        f"{', '.join(BY_NAME_ONLY)})")
    parser.add_argument("--threads", type=at_least(1), metavar="N",
                        help="for all that are compared (default: what sinkattn uses)")
    parser.add_argument("--repeats", type=at_least(LEAST_REPEATS), default=9, metavar="N",
                        help="interleaved repeats (default: 9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help='write all figures; "-": to stdout alone')
    parser.add_argument("--plot", metavar="FILE", help="write a roofline as a picture")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.repeats = 2
    return options


def device_module(name):
    """The module that runs a device's works."""
    try:
        return importlib.import_module(f"sinkattn.bench.{name}")
    except ImportError as error:
        raise SystemExit(
            f"sinkattn bench: --device {name} is not in this build ({error}); there is: cpu"
        ) from None


def main(argv=None):
    options = parse(argv)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("sinkattn bench: --plot needs matplotlib: pip install 'sinkattn[bench]'")

    def say(text):
        if sys.stderr.isatty():
            print(f"\r{text[:78]:<78}", end="", file=sys.stderr, flush=True)
    results = device_module(options.device).run(options, say)
    say("")
    say("\r")
    if options.json == "-":
        json.dump(results, sys.stdout, indent=1)
        print()
    else:
        from .report import text_report
        print(text_report(results))
    if options.json and options.json != "-":
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        from .plot import plot
        plot(results, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 1 if results["failed"] else 0
