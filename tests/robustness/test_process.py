"""Threads, fork, leaks, and a long stream."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import errors
import native
import numpy as np
import pytest
from oracle import normal
from tolerance import assert_close

from sinkattn import Rope, SinkCache, attend, reference


def test_concurrent_callers_get_what_a_lone_one_gets():
    random = np.random.default_rng(0)
    q, k = normal(random, 1, 4, 100, 64), normal(random, 1, 2, 300, 64)
    expected = attend(q, k, k, window=50, sinks=4)

    def call(_):
        return all(np.array_equal(attend(q, k, k, window=50, sinks=4), expected) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(8)))


def test_a_cache_in_use_is_refused_to_a_second_thread():
    tokens = 5000 if native.INSTRUMENTED else 30000
    cache = SinkCache(1, 1, 128, window=60000)
    x = np.ones((1, 1, tokens, 128), np.float32)
    refused, done = [], threading.Event()

    def knock():
        while not done.is_set():
            try:
                cache.crop(10**9)
            except RuntimeError as error:
                refused.append(str(error))
                return
            except ValueError:
                time.sleep(0.001)

    thread = threading.Thread(target=knock)
    thread.start()
    cache.attend(x, x, x)
    done.set()
    thread.join()
    assert refused and refused[0].startswith("SinkCache is in use by another call")
    errors.record(refused[0])


def test_a_forked_child_computes():
    """A pool that the child inherits without its threads must not hang it."""
    code = """
import os, numpy as np
from sinkattn import attend
x = np.ones((1, 8, 512, 64), np.float32)
attend(x, x, x)
child = os.fork()
if child == 0:
    os._exit(0 if np.allclose(attend(x, x, x), 1) else 1)
assert os.waitpid(child, 0)[1] == 0
attend(x, x, x)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux") or native.INSTRUMENTED, reason="reads /proc")
def test_a_long_stream_stays_small_and_right():
    """SINKATTN_SOAK=1: a million tokens. Memory flat after 10 000; the last window is right."""
    tokens = 1_000_000 if os.environ.get("SINKATTN_SOAK") == "1" else 30_000
    random = np.random.default_rng(1)
    rope = Rope.from_theta(16)
    cache = SinkCache(1, 1, 16, sinks=2, window=62, rope=rope)
    first, tail = None, []
    for t in range(tokens):
        step = tuple(normal(random, 1, h, 1, 16) for h in (2, 1, 1))
        out = cache.attend(*step)
        if t < 2:
            first = [*(first or []), step]
        tail = [*tail[-63:], step]
        if t == 10_000:
            before = resident()
    assert resident() - before <= 1 << 20
    # The window's queries as the definition has them: pinned keys seen from slot 63, window keys
    # by relative distance.
    q, k, v = (np.concatenate([s[i] for s in tail], axis=2) for i in range(3))
    k0, v0 = (np.concatenate([s[i] for s in first], axis=2) for i in (1, 2))
    position = np.arange(tokens - 64, tokens)
    keys = np.concatenate([reference.rotate(k0, np.arange(2), rope),
                           reference.rotate(k[:, :, 2:], position[2:], rope)], axis=2)
    values = np.concatenate([v0, v[:, :, 2:]], axis=2)
    expected = reference.attend(reference.rotate(q[:, :, -1:], position[-1:], rope), keys, values,
                                sinks=2, window=62,
                                sink_q=reference.rotate(q[:, :, -1:], np.array([63]), rope))
    assert_close(out, expected, 5e-6)
