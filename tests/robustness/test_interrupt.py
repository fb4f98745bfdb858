"""Ctrl-C stops a long call within 50 ms, and leaves everything usable."""

import subprocess
import sys

import native
import pytest

pytestmark = [pytest.mark.skipif(native.INSTRUMENTED, reason="measures time"), pytest.mark.native]
PROGRAM = """
import os, signal, statistics, sys, threading, time
import numpy as np
from sinkattn import KVCache, Rope, SinkCache, attend, attend_backward
from sinkattn.config import use_cpu_table

use_cpu_table({table!r})
x = np.ones((1, 1, 200000, 128), np.float32)
y = np.ones((1, 8, 40000, 128), np.float32)
z = x[:, :, :100]
w = x[:, :, :60000]
lse = w[..., 0].copy()
cache = SinkCache(1, 1, 128, window=200000)
kv = KVCache(1, 8, 128, budget=9000)
raw = SinkCache(1, 8, 128, window=1, rope=Rope.from_theta(128))

def shoot(after):
    "Seconds from the signal to the exception."
    sent = []
    def send():
        time.sleep(after)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=send)
    try:
        thread.start()
        {call}
    except KeyboardInterrupt:
        caught = time.perf_counter()
        thread.join()
        return caught - sent[0]
    raise SystemExit("the call was over before it was interrupted")

waits = [shoot(0.03 + 0.02 * i) for i in range(9)]
assert cache.length[0] == raw.length[0] == kv.length[0] == 0
assert np.allclose(attend(z, z, z), 1) and np.allclose(cache.attend(z, z, z), 1)
assert cache.length[0] == 100
print(statistics.median(waits))
"""


@pytest.mark.parametrize(("table", "call"), [
    ("reference", "attend(x[:, :, :50], x, x)"), ("reference", "cache.attend(x, x, x)"),
    ("best", "attend(x, x, x)"), ("best", "attend(x, x, x, return_mass=True, causal=False)"),
    ("reference", "attend_backward(z, z, w, w, z, lse[:, :, :100])"), ("best", "attend_backward(w, w, w, w, w, lse)"),
    ("best", "cache.attend(x, x, x)"), ("best", "kv.attend(y, y, y)"), ("best", "raw.attend(y, y, y)"),
])
def test_ctrl_c_stops_a_long_call_and_all_stays_usable(table, call):
    """Half of nine signals reach Python within 50 ms. A machine that runs other things too gets three
    tries. Turning the keys of a long chunk was once outside of what can be stopped."""
    from sinkattn.config import cpu_tables
    table = cpu_tables()[-1] if table == "best" else table
    medians = []
    while len(medians) < 3 and min(medians, default=1.0) >= 0.05:
        done = subprocess.run([sys.executable, "-c", PROGRAM.format(table=table, call=call)],
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        medians.append(float(done.stdout))
    assert min(medians) < 0.05, medians
