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


def cuda_devices():
    """(number of CUDA devices that calls can use, a sentence that names them or says what is
    missing). Starts the driver."""
    return _core.probe_cuda()


def show_config():
    """A dict: version, compiler, kernel tables, the chosen one and why, threads, environment.

    rows_by_path counts the batch rows that each way through the CPU kernels has served since the
    process started, cuda_launches the launches of each CUDA kernel: a call that fell through to
    another kernel is visible there. `cuda` says what was built and whether a driver was found; it
    does not start the driver, after which a forked child could not use CUDA: `cuda_devices` does.
    """
    names = ("SINKATTN_CPU", "SINKATTN_NUM_THREADS", "SINKATTN_CHECK")
    return {
        "version": __version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        **_core.config(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }
