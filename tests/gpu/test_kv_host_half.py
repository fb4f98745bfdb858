"""The host's half of KVCache(device="cuda"), with the libcuda.so.1 whose kernels do nothing: states,
launches, refusals. What the kernels do is asked in tests/c/test_kv_calls.py."""

from gpu.test_host_half import BUILT, fake, run  # noqa: F401

pytestmark = BUILT

MAKE = """
from sinkattn import KVCache, Rope
from sinkattn.policy import *
def launched(call):
    before = dict(sinkattn.show_config()["cuda_launches"])
    call()
    after = sinkattn.show_config()["cuda_launches"]
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
device = lambda *shape, dtype=np.float16: Device(np.ones(shape, dtype))
"""


def test_a_cache_keeps_the_state_of_a_cache_of_the_cpu(fake):  # noqa: F811
    """All but attend: state, lengths, kept, ledger, reorder, reset, copy, crop, refusals."""
    run(MAKE + """
x = np.random.default_rng(0).standard_normal((3, 2, 40, 8)).astype(np.float32)
for policy in H2O(), SnapKV(w=3, kernel=3), Scissorhands(5), SinkWindow():
    making = dict(policy=policy, budget=12, sinks=2, recent=4, chunk=5, log=6)
    theirs, ours = KVCache(3, 2, 8, **making), KVCache(3, 2, 8, device="cuda", **making)
    theirs.attend(x, x, x, new_lengths=[40, 3, 0])
    def same():
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
            if name not in ("keys", "values", "token_positions", "token_states"):
                np.testing.assert_array_equal(a, b, err_msg=name)
        for a, b in zip(ours.kept(), theirs.kept()):
            assert [p.tolist() for p in a] == [p.tolist() for p in b]
        np.testing.assert_array_equal(ours.length, theirs.length)
        for a, b in zip(ours.ledger.heads, theirs.ledger.heads):
            assert [head._replace(bytes=0) for head in a] == [head._replace(bytes=0) for head in b]
    ours.load_state_dict(theirs.state_dict())
    same()
    back, again = KVCache(3, 2, 8, **making), theirs.copy()
    back.load_state_dict(ours.state_dict())
    for _ in range(2):
        for a, b in zip(*(cache.attend(x, x, x, return_mass=True) for cache in (back, again))):
            np.testing.assert_array_equal(a, b)
    for cache in (ours, theirs):
        cache.reorder([2, 0, 0])
    same()
    ours.reorder(Device(np.array([1, 1, 0], np.int32))), theirs.reorder([1, 1, 0])
    same()
    twin = ours.copy()
    for cache in (ours, theirs):
        cache.reset([1])
    same()
    assert twin.length.tolist() == [40, 40, 0] and ours.length.tolist() == [40, 0, 0]
    twin.load_state_dict(theirs.state_dict())
    refused(lambda: ours.crop(7), ValueError, "crop(): row 0 has seen 40 tokens")
    refused(lambda: ours.reorder([0, 1]), ValueError, "index has 2 entries")
    refused(lambda: ours.reorder([0, 1, 3]), ValueError, "index[2] is 3")
    refused(lambda: ours.reorder([[0, 1, 2]]), ValueError, "index has another rank")
    refused(lambda: ours.crop(None), TypeError, "n is None")
    state = theirs.state_dict()
    state["held"] = state["held"][:-8]
    refused(lambda: ours.load_state_dict(state), ValueError, "block 4 has 40 bytes, expected 48")
    state["held"] = state["held"].view(np.int8)
    refused(lambda: ours.load_state_dict(state), TypeError, "held has dtype int8")
    same()
    ours.reset()
    assert ours.length.tolist() == [0, 0, 0]
    for cache in (ours, theirs):
        cache.load_state_dict({**KVCache(3, 2, 8, **making).state_dict()})
    theirs.attend(x[:, :, :4], x[:, :, :4], x[:, :, :4])
    ours.load_state_dict(theirs.state_dict())
    for cache in (ours, theirs):
        cache.crop(3)
    same()
    assert "device=cuda:0" in repr(ours) and ours.ledger.heads[0][0].bytes == ours._core.head_bytes
""", fake)


def test_what_a_call_launches(fake):  # noqa: F811
    """A step is attention, which appends and weighs, and has the rest where it can; a longer call goes part by part."""
    run(MAKE + """
fake = ctypes.CDLL("libcuda.so.1")
q, new, out = device(1, 32, 1, 128), device(1, 8, 1, 128), device(1, 32, 1, 128)
make = lambda policy=H2O(), **making: KVCache(1, 8, 128, policy=policy, budget=1024, dtype="float16", device="cuda", **making)
cache = make()
step = lambda: cache.attend(q, new, new, out=out)
assert launched(step) == {"decode_evict_f16_128": 1}
fake.fake_calls(b"cuMemAlloc"), fake.fake_calls(b"cuMemsetD8Async"), fake.fake_calls(b"cuStreamIsCapturing")
step()
assert [fake.fake_calls(name) for name in (b"cuMemAlloc", b"cuMemsetD8Async", b"cuStreamIsCapturing")] == [1, 0, 0]
assert fake.fake_context_depth() == 0
long = device(1, 32, 300, 128), device(1, 8, 300, 128), device(1, 8, 300, 128)
got = launched(lambda: cache.attend(*long, return_lse=True))
assert got == {"kv_append": 3, "prefill_hopper_f16_128": 3, "mass_hopper_f16_128": 2, "mass_f16_128": 1, "kv_evict": 3}, got
cache = make(TOVA(), rope=Rope.from_theta(128))
got = launched(lambda: cache.attend(*long, return_mass=True, sink_logits=[0.5] * 32, new_lengths=[200]))
assert got == {"kv_append": 3, "prefill_hopper_f16_128": 3, "kv_weights": 3, "kv_evict": 3, "kv_mass": 1, "stage": 4}, got
assert launched(step) == {"kv_append": 1, "decode_mass_f16_128": 1, "kv_step_tova": 1}  # keys and queries are turned
cache = make(Scissorhands())
assert launched(step) == {"decode_mass_f16_128": 1, "kv_step_scissorhands": 1}
cache = make(SinkWindow(), track_mass=False)
assert launched(step) == {"decode_f16_128": 1, "kv_step_sink_window": 1}
cache = make(SinkWindow(), track_mass=False, every=2)
assert launched(step) == {"kv_append": 1, "decode_f16_128": 1, "kv_evict": 1}
cache = make(SnapKV())
assert launched(step) == {"kv_append": 1, "decode_mass_f16_128": 1, "kv_evict": 1}
none = device(1, 32, 0, 128), device(1, 8, 0, 128), device(1, 8, 0, 128)
assert launched(lambda: cache.attend(*none)) == {"kv_append": 1, "kv_evict": 1}
""", fake)


def test_what_is_refused(fake):  # noqa: F811
    run(MAKE + """
D = Device(np.ones((1, 2, 3, 8), np.float32))
making = dict(budget=8, sinks=1, recent=2)
cache = KVCache(1, 2, 8, device="cuda", **making)
refused(lambda: cache.attend(D, D, D, alibi_slopes=[0.5, 0.5]), NotImplementedError, "KVCache.attend(): alibi_slopes",
        "the backends that have it: cpu")
refused(lambda: cache.attend(X, X, X), ValueError, "q is on the CPU, expected cuda:0 (the device of the cache)")
refused(lambda: KVCache(1, 2, 8, device="cuda:1", **making).attend(D, D, D), ValueError, "q is on cuda:0, expected cuda:1")
refused(lambda: KVCache(1, 2, 8, device="cuda:2", **making), ValueError, "KVCache(): device is cuda:2, expected cuda:0 to cuda:1")
refused(lambda: KVCache(1, 2, 8, **making).attend(D, D, D), ValueError, "q is on cuda:0, expected the CPU")
refused(lambda: cache.attend(D, D, Device(np.ones((1, 2, 3, 9), np.float32))), ValueError, "v has head_dim 9, expected 8")
refused(lambda: cache.attend(D, D, D, return_lse="yes"), TypeError, "return_lse is str")
refused(lambda: KVCache(1, 2, 8, device="cuda", budget=2, sinks=1, recent=2), ValueError, "budget is 2 for kv head 0")
refused(lambda: KVCache(1, 2, 300, device="cuda", **making), ValueError, "head_dim is 300")
refused(lambda: cache._core.attend(D), TypeError, "takes 14 arguments, got 1")
refused(lambda: cache.reset([3]), ValueError, "rows holds an index outside 0 to 0")
refused(lambda: cache._core.reset(b"12"), ValueError, "expected one flag for each row")
""", fake)


def test_failures_of_the_driver(fake):  # noqa: F811
    """No memory, and kernels that do not run."""
    code = MAKE + """
cache = lambda: KVCache(1, 2, 8, device="cuda", budget=8, sinks=1, recent=2)
"""
    run(code + 'refused(cache, MemoryError, "KVCache(): out of CUDA memory")', fake, "memory")
    run(code + 'refused(cache, RuntimeError, "KVCache(): CUDA error 700", "stage")', fake, "launch")
    run(code + """
made = cache()
os.environ["FAKE_CUDA"] = "launch"
libc = ctypes.CDLL(None)
libc.setenv(b"FAKE_CUDA", b"launch", 1)
D = Device(np.ones((1, 2, 3, 8), np.float32))
refused(lambda: made.attend(D, D, D), RuntimeError, "KVCache.attend(): CUDA error 700", "kv_append")
libc.setenv(b"FAKE_CUDA", b"memory", 1)
refused(lambda: made.attend(D, D, D), MemoryError, "KVCache.attend(): out of CUDA memory")
refused(lambda: made.copy(), MemoryError, "copy(): out of CUDA memory")
refused(lambda: made.reorder([0]), MemoryError, "reorder(): out of CUDA memory")
libc.setenv(b"FAKE_CUDA", b"", 1)
made.attend(D, D, D)
""", fake)
