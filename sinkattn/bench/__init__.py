"""`python -m sinkattn bench`: how fast the kernels are on this machine, beside what they could be
and beside what else is there.

    suites.py     the works: sizes, useful flops and bytes, who does them and how
    peers.py      torch and NumPy as a user would write them
    clock.py      interleaved repeats
    statement.py  the same attention in float64, for a sample of rows
    counts.py     pairs, flops, bytes, percentages: plain arithmetic
    machine.py    the processor, and its peaks measured beside the works
    cpu.py        one run: works -> results
    report.py, plot.py   results -> table, roofline

A device is a module with `run(options, say) -> results` in the form that cpu.run describes; the
table, the JSON and the plot take it from there.
"""

from .cli import main

__all__ = ["main"]
