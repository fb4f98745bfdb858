"""Sixteen threads at once, forks while others compute, interpreters beside the first."""

import os
import subprocess
import sys
import threading

import native
import numpy as np
import pytest
from oracle import normal

from sinkattn import Rope, SinkCache, attend


def test_sixteen_threads_get_what_one_gets():
    """1000 calls each, bit for bit; every thread also has a cache of its own."""
    random = np.random.default_rng(0)
    q, k = normal(random, 1, 4, 3, 32), normal(random, 1, 2, 70, 32)
    keywords = {"window": 50, "sinks": 4, "return_lse": True, "return_mass": True}
    rope = Rope.from_theta(32)

    def stream():
        cache = SinkCache(1, 2, 32, sinks=2, window=9, rope=rope)
        return [cache.attend(q[:, :, :1], k[:, :, i:i + 1], k[:, :, i:i + 1]).tobytes() for i in range(40)]

    expected, steps = [x.tobytes() for x in attend(q, k, k, **keywords)], stream()
    calls, wrong = 1000, []

    def work():
        for i in range(calls):
            if [x.tobytes() for x in attend(q, k, k, **keywords)] != expected or (i % 100 == 0 and stream() != steps):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_while_another_thread_computes():
    """The child has neither the other thread nor the workers, and locks that they held."""
    code = """
import os, threading, numpy as np
from sinkattn import SinkCache, attend
x = np.ones((1, 4, 600, 64), np.float32)
done = threading.Event()
def work():
    while not done.is_set():
        attend(x, x, x)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        import signal
        signal.alarm(20)
        right = np.allclose(attend(x, x, x), 1) and np.allclose(SinkCache(1, 4, 64).attend(x, x, x), 1)
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
done.set()
for thread in threads:
    thread.join()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def run_with_interpreters(code):
    """`code` in a process of its own, which has `interpreters` and `make()`: one more."""
    before = '''
try:
    import _interpreters as interpreters
    make = lambda: interpreters.create("legacy")
except ImportError:
    import _xxsubinterpreters as interpreters
    make = lambda: interpreters.create(isolated=False)
'''
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", before + code], timeout=300, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.version_info < (3, 12) or native.INSTRUMENTED, reason="interpreters share one GIL switch from 3.12 on")
def test_an_interpreter_beside_the_first():
    """NumPy decides whether it can be imported there; where it can, so can we, and the first goes on."""
    code = """
import numpy as np
from sinkattn import attend
x = np.ones((1, 1, 3, 8), np.float32)
program = '''
try:
    import numpy as np
except ImportError:
    np = None
if np is not None:
    from sinkattn import attend
    x = np.ones((1, 1, 3, 8), np.float32)
    assert (attend(x, x, x) == 1).all()
'''
for _ in range(20):
    other = make()
    error = interpreters.run_string(other, program)
    assert error is None, error
    interpreters.destroy(other)
    assert (attend(x, x, x) == 1).all()
"""
    run_with_interpreters(code)


@pytest.mark.skipif(sys.version_info < (3, 12) or native.INSTRUMENTED, reason="interpreters share one GIL switch from 3.12 on")
def test_an_interpreter_that_alone_has_numpy():
    """NumPy 2 lets one interpreter of a process import it: here it is not the first one."""
    code = """
import sys
program = '''
import numpy as np
from sinkattn import SinkCache, attend
x = np.ones((1, 2, 700, 64), np.float32)
assert np.allclose(attend(x, x, x), 1) and np.allclose(SinkCache(1, 2, 64).attend(x, x, x), 1)
try:
    attend(x, x, x[0])
except ValueError as error:
    assert "v has 3 dimensions" in str(error), error
else:
    raise AssertionError("three dimensions were accepted")
'''
other = make()
for _ in range(3):
    error = interpreters.run_string(other, program)
    assert error is None, error
interpreters.destroy(other)
assert "numpy" not in sys.modules
"""
    run_with_interpreters(code)


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="needs an interpreter without a GIL")
def test_without_a_gil_the_module_does_not_bring_it_back():
    assert not sys._is_gil_enabled()
