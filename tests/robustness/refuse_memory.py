"""Run under tests/c/faults.c: the n-th allocation of each call is refused, for n = 1, 2, 3 ... until
the call succeeds. Prints a line of JSON: refusals in all, and the messages seen.

Each n has a forked child, so that what the first call leaves behind for the next ones (scratch of
the pool) is asked for anew.
"""

import contextlib
import ctypes
import json
import os
import sys
import traceback

import numpy as np

from sinkattn import KVCache, Rope, SinkCache, _core, attend, attend_backward, mass, merge
from sinkattn.config import cpu_tables, set_num_threads, use_cpu_table
from sinkattn.policy import Custom

try:
    import _testcapi
except ImportError:
    _testcapi = None

FAULTS = ctypes.CDLL(None)
SUCCEEDED, REFUSED = 10, 11
MESSAGES = os.pipe()


class Foreign:
    """DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def bits(result):
    return [np.asarray(x).tobytes() for x in (result if isinstance(result, tuple) else (result,))]


def scenarios():
    """name -> (call, state): `state` is what a refused call must leave as it was."""
    q, k = normal(1, 8, 130, 64), normal(1, 2, 300, 64)
    one, long = normal(1, 8, 1, 64), normal(1, 2, 2100, 64)
    small, chunk = normal(1, 2, 5, 16), normal(2, 2, 3, 32)
    foreign, rope = Foreign(small), Rope.from_theta(32)
    lse, bias = small[..., 0].copy(), np.zeros((2, 2), np.float32)

    def stream():
        cache = SinkCache(2, 2, 32, sinks=2, window=9, rollback=1, rope=rope)
        cache.attend(chunk, chunk, chunk)
        return cache

    cache = stream()
    state = lambda: [x.tobytes() for x in cache.state_dict().values()]  # noqa: E731
    nothing = lambda: None  # noqa: E731
    yield "prefill", lambda: attend(q, k, k), nothing
    yield "mass", lambda: attend(q, k, k, window=20, sinks=2, return_mass=True), nothing
    yield "mass alone", lambda: mass(q, k, q[..., 0], window=20, row_weights=q[..., 1]), nothing
    yield "decode with mass", lambda: attend(one, long, long, return_mass=True), nothing
    yield "decode", lambda: attend(one, long, long), nothing
    yield "dlpack", lambda: attend(foreign, foreign, foreign), nothing
    yield "sinks", lambda: attend(small, small, small, window=[1, 0], sinks=2, sink_logits=[0.0, 1.0],
                                  sink_bias=bias, sink_kv=(small[0], small[0]), return_lse=True), nothing
    sinks = {"sinks": 2, "sink_logits": [0.0, 1.0], "sink_bias": bias, "sink_q": small, "sink_kv": (small[0], small[0])}
    yield "backward", lambda: attend_backward(small, small, small, small, small, lse, **sinks) and None, nothing
    yield "merge", lambda: merge([small, foreign], [lse, lse]), nothing
    yield "new cache", lambda: stream() and None, nothing
    yield "step", lambda: cache.attend(chunk, chunk, chunk, return_mass=True), state
    yield "copy", lambda: cache.copy() and None, state
    yield "reorder", lambda: cache.reorder([1, 1]), state
    yield "save", lambda: cache._core.save(), state
    yield "counters", lambda: (cache.length, cache.kept(), cache.crop(cache.length[0])), state
    yield "config", lambda: _core.config(), nothing


def kv_scenarios():
    """The same for KVCache, which does not depend on the table."""
    parts, chunk, rope = normal(2, 2, 9, 32), normal(2, 2, 3, 32), Rope.from_theta(32)

    def stream(policy=None, budget=7):
        cache = KVCache(2, 2, 32, policy=policy, budget=budget, sinks=1, recent=2, chunk=4, rope=rope)
        cache.attend(parts, parts, parts)
        return cache

    scored, custom = stream(), stream(Custom(lambda row, head, p, m, k, v: -p))
    bits_of = lambda cache: lambda: cache._core.save()  # noqa: E731
    blocks = scored._core.slots, *scored._core.save()
    yield "kv custom", lambda: custom.attend(chunk, chunk, chunk), bits_of(custom)
    yield "kv step", lambda: scored.attend(chunk, chunk, chunk, return_mass=True, alibi_slopes=[0.5, 1.0]), bits_of(scored)
    yield "kv parts", lambda: scored.attend(parts, parts, parts), bits_of(scored)
    yield "new kv cache", lambda: stream(budget=0.5) and None, lambda: None
    yield "kv copy", lambda: scored.copy() and None, bits_of(scored)
    yield "kv reorder", lambda: scored.reorder([1, 1]), bits_of(scored)
    yield "kv load", lambda: scored._core.load(*blocks), bits_of(scored)
    yield "kv ledger", lambda: scored._core.ledger(0, 1) and None, bits_of(scored)


def attempt(call, state, n):
    """In the child: the n-th request is refused; afterwards all is as before, and works."""
    before = state()
    FAULTS.faults_refuse(n)
    try:
        call()
        FAULTS.faults_refuse(0)
        os._exit(SUCCEEDED)
    except MemoryError as error:
        FAULTS.faults_refuse(0)
        message = str(error)
    assert state() == before
    call()
    for _ in range(2):  # the scratch that stays is there by now: nothing is added
        live = FAULTS.faults_live()
        FAULTS.faults_refuse(n)
        with contextlib.suppress(MemoryError):
            call()
        FAULTS.faults_refuse(0)
        assert FAULTS.faults_live() == live, f"{FAULTS.faults_live() - live} blocks leak"
    os.write(MESSAGES[1], message.encode() + b"\n")
    os._exit(REFUSED)


def attempt_of_python(call, state, n, stop):
    """The same for the interpreter's own requests: the n-th alone (stop = n + 1), or all from it on."""
    before = state()
    _testcapi.set_nomemory(n, stop)
    try:
        call()
        _testcapi.remove_mem_hooks()
        os._exit(SUCCEEDED)
    except MemoryError:
        _testcapi.remove_mem_hooks()
    assert state() == before
    call()
    os._exit(REFUSED)


def in_child(name, function, *arguments):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        finally:
            if _testcapi is not None:
                _testcapi.remove_mem_hooks()
            traceback.print_exc()
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (SUCCEEDED, REFUSED), f"{name}, {arguments[2:]}: exit status {code}"
    return code == REFUSED


def sweep(name, call, state):
    """Refuses one request after the other; returns how many were."""
    n = 1
    while in_child(name, attempt, call, state, n):
        n += 1
    return n - 1


def sweep_of_python(name, call, state):
    n = 1
    call()  # what the interpreter keeps for later calls
    while in_child(name, attempt_of_python, call, state, n, 0):
        in_child(name, attempt_of_python, call, state, n, n + 1)
        n += 1
    return n - 1


def without_threads():
    """Where the system gives no threads the caller works alone, with the same result."""
    q = normal(1, 8, 300, 64)
    expected = bits(attend(q, q, q))
    child = os.fork()  # the workers stay behind
    if child == 0:
        FAULTS.faults_refuse_threads(True)
        os._exit(0 if bits(attend(q, q, q)) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def main():
    assert FAULTS.faults_watch(os.path.basename(_core.__file__).encode())
    set_num_threads(2)
    refusals = {}
    for table in cpu_tables():
        use_cpu_table(table)
        for name, call, state in scenarios():
            refusals[f"{table} {name}"] = sweep(name, call, state)
    for name, call, state in kv_scenarios():
        refusals[name] = sweep(name, call, state)
    of_python = {name: sweep_of_python(name, call, state)
                 for name, call, state in (*scenarios(), next(kv_scenarios())) if _testcapi is not None}
    without_threads()
    os.close(MESSAGES[1])
    with os.fdopen(MESSAGES[0]) as lines:
        messages = sorted({line.rstrip() for line in lines})
    print(json.dumps({"refusals": refusals, "of_python": of_python, "messages": messages}))


if __name__ == "__main__":
    main()
