"""One thread for each core, each with its own rows.

The model is many small matrix products with element-wise work between them. Threads inside every
product wait for each other more than they work, so the BLAS is held to one thread where that is
possible (OpenBLAS, as in NumPy's wheels) and independent rows are shared out instead.
"""

import concurrent.futures
import contextlib
import ctypes
import os
import pathlib
import threading

import numpy as np

from sinkattn import get_num_threads, set_num_threads


class Workers:
    """Use as a context.

    count : how many rows or batches are worked on at a time.
    stopped : an Event that is set once something failed or Ctrl-C came; what the threads run looks
        at it (by way of `Progress`) and gives up.
    """

    def __init__(self):
        self.count, self._pool, self._undo = 1, None, contextlib.ExitStack()
        self.stopped = threading.Event()

    def __enter__(self):
        blas = _openblas()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        if blas and cores > 1:
            set_blas, get_blas = blas
            self._undo.callback(set_blas, get_blas())
            self._undo.callback(set_num_threads, get_num_threads())
            self.count = cores
            self._pool = self._undo.enter_context(concurrent.futures.ThreadPoolExecutor(cores))
            set_blas(1)
            set_num_threads(1)
        return self

    def __exit__(self, *error):
        self.count, self._pool = 1, None
        return self._undo.__exit__(*error)

    def map(self, function, items):
        """[function(item) for item in items], in this order."""
        try:
            return list((self._pool.map if self._pool else map)(function, items))
        except BaseException:
            self.stopped.set()
            raise

    def split(self, rows):
        """Slices that share `rows` rows out evenly."""
        parts = np.array_split(np.arange(rows), min(self.count, rows))
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


def _openblas():
    """(set, get) of the number of threads of NumPy's own OpenBLAS, or None."""
    package = pathlib.Path(np.__file__).parent
    beside = package.parent.glob("numpy.libs/*openblas*")
    inside = package.glob(".dylibs/*openblas*")
    for path in [*beside, *inside]:
        library = ctypes.CDLL(str(path))
        for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("scipy_", ""), ("", "")):
            with contextlib.suppress(AttributeError):
                return (
                    getattr(library, f"{prefix}openblas_set_num_threads{suffix}"),
                    getattr(library, f"{prefix}openblas_get_num_threads{suffix}"),
                )
    return None
