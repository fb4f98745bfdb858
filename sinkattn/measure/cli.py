"""python -m sinkattn measure: policies at equal bytes, on the shipped model."""

import argparse
import dataclasses
import functools
import pathlib
import re
import sys

import numpy as np

from sinkattn._arguments import at_least

from .compare import compare
from .methods import FULL, SINKS, WINDOW, names, read_policy
from .report import text_report

QUICK = {"rows": 4, "plants": 4, "tokens": 0}
DEFAULT = {"rows": 16, "plants": 32, "tokens": 2048}


def _words(text):
    """What stands between commas, those inside brackets left alone."""
    return [word.strip() for word in re.split(r",(?![^(]*\))", text) if word.strip()]


def _distances(text):
    return [at_least(1)(word) for word in _words(text)]


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m sinkattn measure",
        description="Compares what bounded caches keep, at equal bytes: bits per byte, attention "
        "loss, recall inside and beyond the window, and of a second question. The model and the "
        "text are those of the demo.",
    )
    parser.add_argument("--policies", type=_words, metavar="A,B",
                        help=f"some of: {', '.join(names())}; a policy may have numbers with "
                        "it, as SnapKV(w=16, kernel=33) (default: all)")
    parser.add_argument("--budget", type=at_least(8), default=128, metavar="N",
                        help="tokens a kv head that sinks + window holds; the others get the same "
                        "bytes (default: 128)")
    parser.add_argument("--sinks", type=at_least(0), default=4, metavar="S",
                        help="first tokens that every policy keeps (default: 4)")
    parser.add_argument("--recent", type=at_least(1), metavar="R",
                        help="last tokens that every policy keeps (default: a quarter of --budget)")
    parser.add_argument("--tokens", type=at_least(0), metavar="N",
                        help="bytes of each long stream; 0: none (default: 2048)")
    parser.add_argument("--streams", type=at_least(1), default=4, metavar="R",
                        help="long streams side by side (default: 4)")
    parser.add_argument("--distances", type=_distances, metavar="D,D",
                        help="how far back the planted lines lie (default: by the budget)")
    parser.add_argument("--rows", type=at_least(2), metavar="R",
                        help="texts of the trained length (default: 16)")
    parser.add_argument("--plants", type=at_least(2), metavar="R",
                        help="texts with planted lines (default: 32)")
    parser.add_argument("--chunk", type=at_least(1), default=16, metavar="N",
                        help="bytes that enter at a time (default: 16)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the planted lines")
    parser.add_argument("--text", metavar="FILE", help="read this file, not the shipped text")
    parser.add_argument("--quick", action="store_true",
                        help="few rows and no long streams: a look in seconds, wide intervals")
    parser.add_argument("--json", metavar="FILE", help='write the record; "-": to stdout alone')
    parser.add_argument("--plot", metavar="FILE", help="write the picture")
    options = parser.parse_args(argv)
    for name, value in (QUICK if options.quick else DEFAULT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.recent is None:
        options.recent = max(options.budget // 4, 1)
    if options.sinks + options.recent >= options.budget:
        parser.error(f"--sinks {options.sinks} and --recent {options.recent} leave no room in "
                     f"--budget {options.budget}")
    try:
        for name in set(options.policies or []) - {FULL, WINDOW, SINKS}:
            read_policy(name)
    except ValueError as error:
        parser.error(f"--{error}")
    return options


def main(argv=None):
    """Runs the command; returns the exit status."""
    from sinkattn.demo.progress import Progress
    from sinkattn.demo.text import held_out_text
    from sinkattn.demo.workers import Workers

    options = parse(argv)
    try:
        if options.plot:
            from .plots import pyplot

            pyplot()
        content, name = held_out_text(options.text)
        settings = {key: getattr(options, key) for key in (
            "policies", "budget", "sinks", "recent", "rows", "plants", "distances", "tokens",
            "streams", "chunk", "seed")}
        with Workers() as workers:
            found = compare(np.frombuffer(content, np.uint8), **settings, workers=workers,
                            make_progress=functools.partial(Progress, stopped=workers.stopped))
    except (ImportError, OSError, ValueError) as error:
        print(f"sinkattn measure: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nsinkattn measure: stopped", file=sys.stderr)
        return 130
    found = dataclasses.replace(found, text=name)
    if options.json == "-":
        print(found.to_json())
    else:
        print(text_report(found))
    if options.json and options.json != "-":
        pathlib.Path(options.json).write_text(found.to_json() + "\n")
    if options.plot:
        found.plot(options.plot)
        print(f"plot: {options.plot}", file=sys.stderr)
    return 0
