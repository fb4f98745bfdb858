"""Nothing leaks: a thousand calls of each public function, and of each refusal.

Two counts must stay: the interpreter's blocks (at most 20 more) and the bytes that the C library has
handed out (at most 8 a call, less than its smallest block)."""

import contextlib
import ctypes
import gc
import sys

import native
import numpy as np
import pytest
from test_refusals import CASES, K, Q, V

from sinkattn import (
    KVCache,
    Rope,
    SinkCache,
    _core,
    attend,
    attend_backward,
    get_num_threads,
    mass,
    merge,
    set_num_threads,
    show_config,
)
from sinkattn.policy import Custom

F = np.float32
X = np.ones((1, 2, 3, 16), F)
LSE = X[..., 0].copy()
ROPE = Rope.from_theta(16)
CACHE = SinkCache(1, 2, 16, sinks=1, window=4, rollback=1, rope=ROPE)
KV = KVCache(1, 2, 16, budget=5, sinks=1, recent=2, chunk=2, rope=ROPE)
CUSTOM = KVCache(1, 2, 16, budget=5, sinks=1, recent=2, policy=Custom(lambda row, head, p, m, k, v: -p))
FAILS = KVCache(1, 2, 16, budget=5, sinks=1, recent=2, policy=Custom(lambda row, head, p, m, k, v: "x"))
STATE = SinkCache(1, 2, 16, sinks=1, window=4, rollback=1, rope=ROPE).state_dict()


class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]


def handed_out():
    """Bytes in use of the C library, 0 where it cannot say (or a sanitizer has the allocator)."""
    try:
        info = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    info.restype = Mallinfo
    now = info()
    return now.uordblks + now.hblkhd


def growth(call):
    """Blocks and bytes that a thousand calls leave."""
    gc.collect()
    blocks, bytes_ = sys.getallocatedblocks(), handed_out()
    for _ in range(1000):
        call()
    gc.collect()
    return sys.getallocatedblocks() - blocks, handed_out() - bytes_


@pytest.fixture(scope="module", autouse=True)
def only_what_comes_is_searched():
    """Collections pass over what was there before (torch and all that other tests imported: most of the time of this module); every
    object made from here on is searched, and the counts are of all."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def assert_no_growth(call):
    """What leaks does so in every round; what the interpreter keeps once, only in the first ones (up to
    86 blocks in the second, seen in a new process)."""
    rounds = []
    while len(rounds) < 8:
        rounds.append(growth(call))
        if rounds[-1][0] <= 20 and rounds[-1][1] <= 8000:
            return
    raise AssertionError(f"blocks and bytes left by each thousand calls: {rounds}")


def refused(call):
    def run():
        with contextlib.suppress(ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError):
            call()
            raise AssertionError("it was not refused")
    return run


CALLS = {
    "attend": lambda: attend(X, X, X),
    "attend, all results": lambda: attend(X, X, X, sink_logits=[0.0, 1.0], window=[1, 0], return_lse=True, return_mass=True),
    "attend, sinks": lambda: attend(X, X, X, sinks=2, sink_bias=np.zeros((2, 2)), sink_q=X, sink_kv=(X[0], X[0])),
    "attend, lengths": lambda: attend(X, X, X, lengths=[2], q_lengths=[1], out=np.empty_like(X)),
    "attend, packed": lambda: attend(X, X, X, cu_seqlens_q=[0, 1, 3], cu_seqlens_k=[0, 2, 3]),
    "attend_backward": lambda: attend_backward(X, X, X, X, X, LSE, dlse=LSE, sinks=2, sink_logits=0.0, sink_bias=np.zeros((2, 2)),
                                               sink_q=X, sink_kv=(X[0], X[0])),
    "attend_backward, refused": refused(lambda: attend_backward(X, X, X, X, X, X)),
    "merge": lambda: merge([X, X], [LSE, LSE]),
    "mass": lambda: mass(X, X, LSE, row_weights=LSE, sinks=1, sink_q=X),
    "mass, refused": refused(lambda: mass(X, X, LSE, reduce="mean")),
    "SinkCache": lambda: SinkCache(1, 1, 8, window=2, rope=Rope.from_theta(8)),
    "SinkCache.attend": lambda: CACHE.attend(X, X, X, return_lse=True, return_mass=True, alibi_slopes=[0.0, 1.0]),
    "copy": lambda: CACHE.copy(),
    "kept, length, nbytes": lambda: (CACHE.kept(), CACHE.length, CACHE.nbytes, repr(CACHE)),
    "reset": lambda: (CACHE.reset(), CACHE.reset([0]), CACHE.reset([True])),
    "reorder": lambda: CACHE.reorder([0]),
    "crop": lambda: CACHE.crop(CACHE.length[0]),
    "state": lambda: CACHE.load_state_dict(CACHE.state_dict()),
    "Rope": lambda: (Rope([1.0, 0.5]), repr(ROPE)),
    "config": lambda: (show_config(), set_num_threads(get_num_threads())),
    "no memory": refused(lambda: attend(np.empty((2**46, 1, 0, 1), F), *[np.empty((2**46, 1, 0, 1), F)] * 2)),
    "KVCache": lambda: KVCache(1, 1, 8, budget=4, recent=0, rope=Rope.from_theta(8)),
    "KVCache.attend": lambda: KV.attend(X, X, X, return_lse=True, return_mass=True, alibi_slopes=[0.0, 1.0]),
    "KVCache, Custom": lambda: CUSTOM.attend(X, X, X),
    "KVCache beside a call": lambda: (KV.copy(), KV.kept(), KV.ledger, KV.length, KV.nbytes, repr(KV), KV.reset([0]),
                                      KV.reorder([0]), KV.load_state_dict(KV.state_dict()), KV.crop(KV.length[0])),
    **{f"kv refusal {i}": refused(call) for i, call in enumerate([
        lambda: KV.attend(X, X, X[..., :3]), lambda: FAILS.attend(X, X, X), lambda: KV.crop(10**9), lambda: KV.reorder([1]),
        lambda: KVCache(1, 1, 8, budget=2), lambda: KV._core.load(*[b""] * 11), lambda: KV._core.load(b""),
        lambda: KV.load_state_dict({**KV.state_dict(), "held": np.zeros(8, np.uint8)})])},
    "core.reset": refused(lambda: CACHE._core.reset(b"")),
    "core.load": refused(lambda: CACHE._core.load(b"", b"", b"", b"")),
    "core.attend": refused(lambda: _core.attend(X)),
    **{f"merge refusal {i}": refused(lambda a=arguments: merge(*a)) for i, arguments in enumerate([
        ([], []), ([X], [LSE, LSE]), ([X, X[:, :1]], [LSE, LSE]), ([X], [X]), ([X, 3], [LSE, LSE]),
        ([X], [LSE.astype(np.float16)]), ([X, X.astype(np.float16)], [LSE, LSE]), ([np.zeros((2, 300), F)], [np.zeros(2, F)])])},
    **{f"cache refusal {i}": refused(call) for i, call in enumerate([
        lambda: CACHE.attend(X, X, X[..., :3]), lambda: CACHE.attend(X, X, X, new_lengths=[9]),
        lambda: CACHE.attend(X, None, X), lambda: CACHE.attend(X, X, X, out=X), lambda: CACHE.crop(10**9),
        lambda: CACHE.crop(None), lambda: CACHE.crop(1.5), lambda: CACHE.reorder([1]), lambda: CACHE.reorder([[0]]),
        lambda: CACHE.reorder(["a"]), lambda: CACHE.reset([3]), lambda: SinkCache(1, 1, 8, window=0),
        lambda: SinkCache(1, 1, 8, window=2**60), lambda: SinkCache(1, 1, 8, dtype="int8"),
        lambda: set_num_threads(0), lambda: Rope([np.nan])])},
    **{f"state without {name}": refused(lambda n=name: CACHE.load_state_dict({k: v for k, v in STATE.items() if k != n}))
       for name in STATE},
    **{f"state with a bad {name}": refused(lambda n=name: CACHE.load_state_dict({**STATE, n: np.array([-1])}))
       for name in STATE},
    **{f"attend refusal {i}": refused(lambda k=keywords: attend(**{"q": Q, "k": K, "v": V, **k}))
       for i, (keywords, _, _) in enumerate(CASES)},
}


@pytest.mark.skipif(native.INSTRUMENTED, reason="counts the allocator's bytes")
@pytest.mark.parametrize("name", CALLS)
def test_a_thousand_calls_leave_nothing_behind(name):
    assert_no_growth(CALLS[name])
