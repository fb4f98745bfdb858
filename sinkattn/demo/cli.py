"""The demo's command line."""

import argparse
import functools
import json
import pathlib
import sys

import numpy as np

from sinkattn._arguments import at_least

from .measure import run
from .model import Model
from .progress import Progress
from .report import plot, text_report
from .text import DATA, held_out_text
from .workers import Workers

MODEL = DATA / "model.npz"
SHORT_STREAMS, STREAMS = 16384, 4


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m sinkattn demo",
        description="A small byte-level language model reads held-out text far past its trained "
        "length in five ways: dense attention, a window, a window with 1 pinned token, a window "
        "with S pinned tokens, and re-computation. Then: what does it recall, at which distance?",
    )
    parser.add_argument("--tokens", type=at_least(64), default=8192, metavar="N",
                        help="bytes in each stream (default: 8192)")
    parser.add_argument("--window", type=at_least(64), default=256, metavar="W",
                        help="cache slots a layer, the pinned tokens included (default: 256)")
    parser.add_argument("--sinks", type=at_least(0), default=4, metavar="S",
                        help="slots of the window that hold the first tokens (default: 4)")
    parser.add_argument("--text", metavar="FILE", help="read this file, not the shipped text")
    parser.add_argument("--seed", type=at_least(0), default=0,
                        help="of the sampled positions and of the planted letters (default: 0)")
    parser.add_argument("--streams", type=at_least(1), metavar="R",
                        help="streams side by side, from places evenly spaced in the text "
                        f"(default: {STREAMS}, or 1 from {SHORT_STREAMS + 1} tokens on)")
    parser.add_argument("--samples", type=at_least(2), default=2000, metavar="N",
                        help="positions at which the window is re-computed (default: 2000)")
    parser.add_argument("--plants", type=at_least(2), default=64, metavar="N",
                        help="planted lines at each distance (default: 64)")
    parser.add_argument("--dense-tokens", type=at_least(64), default=8192, metavar="N",
                        help="where dense attention stops (default: 8192)")
    parser.add_argument("--plot", metavar="FILE", help="write both halves as a picture")
    parser.add_argument("--json", metavar="FILE", help='write all figures; "-": to stdout alone')
    options = parser.parse_args(argv)
    if options.sinks >= options.window:
        parser.error(f"--sinks {options.sinks} leaves no room in --window {options.window}")
    if options.streams is None:
        options.streams = STREAMS if options.tokens <= SHORT_STREAMS else 1
    return options


def main(argv=None):
    options = parse(argv)
    if options.plot:
        _need_matplotlib()
    try:
        content, name = held_out_text(options.text)
    except (OSError, ValueError) as error:
        print(f"sinkattn demo: --text: {error}", file=sys.stderr)
        return 2
    text = np.frombuffer(content, dtype=np.uint8)
    try:
        with Workers() as workers:
            bar = functools.partial(Progress, stopped=workers.stopped)
            results = run(Model.load(MODEL), text, options, bar, workers)
    except KeyboardInterrupt:
        print("\nsinkattn demo: stopped", file=sys.stderr)
        return 130
    results["text"]["name"] = name
    if options.json == "-":
        json.dump(results, sys.stdout, indent=1)
        print()
    else:
        print(text_report(results))
    if options.json and options.json != "-":
        pathlib.Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0


def _need_matplotlib():
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("sinkattn demo: --plot needs matplotlib: pip install 'sinkattn[demo]'")
