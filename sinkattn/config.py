"""What was built, what was chosen, and how many threads."""

import os
import sys

import numpy as np

from sinkattn import _core
from sinkattn._version import __version__

get_num_threads = _core.get_num_threads


def set_num_threads(count):
    """Threads that the CPU kernels use; results do not depend on it. Default:
    SINKATTN_NUM_THREADS, else the processors this process may run on."""
    _core.set_num_threads(count)


def cpu_tables():
    """Names of the kernel tables that this build has and this processor can run."""
    return tuple(n for n, state in _core.config()["cpu_tables"].items() if state == "usable")


def use_cpu_table(name):
    """Switches to a kernel table by name and returns the name of the one before (for tests)."""
    return _core.use_cpu_table(name)


def show_config():
    """A dict: version, compiler, kernel tables, the chosen one and why, threads, environment.

    rows_by_path counts the batch rows that each way through the kernels has served since the
    process started: a call that fell through to the scalar reference is visible there.
    """
    names = ("SINKATTN_CPU", "SINKATTN_NUM_THREADS")
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        **_core.config(),
        "cuda": "not built: this version runs on the CPU only",
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }
