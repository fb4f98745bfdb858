"""The processor: what it is, and what it can do at most, measured beside the works."""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from sinkattn import _core
from sinkattn._version import __version__

MIB = 1 << 20
ASSUMED_CACHE = 32 * MIB
PEAK_UNITS = {"fma": "FLOP/s", "bf16_dot": "FLOP/s", "read": "byte/s"}


def processor_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_cache_bytes():
    """Of the last cache that the first processor sees; None where the system does not tell."""
    sizes = []
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            text = (folder / "size").read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": MIB}.get(text[-1], 1))
        except (OSError, ValueError):
            continue
    return max(sizes, default=None)


def available_bytes():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 << 30


def describe(threads):
    config = _core.config()
    return {
        "processor": processor_name(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "processors": os.cpu_count(),
        "threads": threads,
        "last_cache_bytes": last_cache_bytes(),
        "cpu_features": config["cpu_features"],
        "cpu_table": config["cpu_table"],
    }


def versions(torch):
    return {
        "sinkattn": __version__,
        "compiler": _core.config()["compiler"],
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "torch": None if torch is None else torch.__version__,
    }


# bf16 work may take either road: its roof is the higher one.
KINDS_OF_LIMIT = {"fma": ("fma",), "bf16_dot": ("fma", "bf16_dot"), "read": ("read",), None: ()}


class Peaks:
    """Trials of what the machine can do at most. The buffer is far above the last cache, and is the
    very memory that works on cold memory read."""

    def __init__(self, buffer):
        self.buffer = buffer
        self.rates, self.tables = {kind: [] for kind in PEAK_UNITS}, {}

    def measure(self, kinds=tuple(PEAK_UNITS)):
        """One trial of each."""
        for kind in kinds:
            try:
                rate, table = _core.peak(kind, self.buffer if kind == "read" else None)
            except NotImplementedError:
                continue
            self.rates[kind].append(rate)
            self.tables[kind] = table

    def best_of_limit(self, limit, trials):
        """Over the last so many trials of its kinds; None where there are none."""
        rates = [rate for kind in KINDS_OF_LIMIT[limit] for rate in self.rates[kind][-trials:]]
        return max(rates, default=None)

    def summary(self):
        return {kind: {"rate": max(rates), "median": statistics.median(rates),
                       "trials": len(rates), "unit": PEAK_UNITS[kind], "table": self.tables[kind]}
                for kind, rates in self.rates.items() if rates}


class Neighbours:
    """How busy the processors were with what is not this process; None where the system does not
    tell."""

    def __init__(self):
        self.begun = self._read()

    @staticmethod
    def _read():
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = fields[3] + fields[4]
        own = time.process_time()
        return sum(fields) / os.sysconf("SC_CLK_TCK"), idle / os.sysconf("SC_CLK_TCK"), own

    def share(self):
        now = self._read()
        if now is None or self.begun is None:
            return None
        total, idle, own = (b - a for a, b in zip(self.begun, now))
        return None if total <= 0 else max(0.0, (total - idle - own) / total)
