"""What needs no GPU: the driver's absence in all its forms, and the host's half of every call, with
a libcuda.so.1 of our own whose device memory is the host's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sinkattn

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ELF"),
]
ROOT = Path(__file__).resolve().parents[2]
BUILT = pytest.mark.skipif(sinkattn.show_config()["cuda"].startswith("not built"),
                           reason="built without nvcc")

PRELUDE = """
import ctypes, os, numpy as np, sinkattn
from sinkattn import SinkCache, attend
class Device:
    "A CUDA array of a library that has nothing but the interface."
    def __init__(self, array, **facts):
        self.array = array
        address = array.__array_interface__["data"][0]
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (address, False),
            "strides": array.strides, "version": 3, **facts}
def refused(call, error, *words):
    try:
        call()
    except error as text:
        assert all(word in str(text) for word in words), text
        return str(text)
    raise AssertionError(f"not refused: {words}")
X = np.ones((1, 2, 3, 8), np.float32)
D = Device(X)
"""


@pytest.fixture(scope="session")
def fake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake")
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{ROOT}/csrc/cuda", "-o",
                    folder / "libcuda.so.1", source], check=True)
    return folder


def run(code, folder=None, wrong="", **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAKE_CUDA": wrong,
                   **environment}
    environment["LD_LIBRARY_PATH"] = str(folder or "")
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], env=environment, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@BUILT
@pytest.mark.parametrize(("wrong", "words"), [
    ("old", ["driver is for CUDA 11.8", "CUDA 12.0 or later"]),
    ("nodevice", ["no device", "CUDA_VISIBLE_DEVICES"]),
    ("broken", ["does not start", "error 999"]),
])
def test_a_driver_that_cannot_serve_is_described(wrong, words, fake):
    """RuntimeError from a call, the same sentence from the tools, and the CPU goes on."""
    run(f"""
words = {words!r}
refused(lambda: attend(D, D, D), RuntimeError, "attend(): CUDA is built", *words)
refused(lambda: SinkCache(1, 1, 8, device="cuda"), RuntimeError, "SinkCache(): ", *words)
count, sentence = sinkattn.config.cuda_devices()
assert count == 0 and all(w in sentence for w in words)
assert (attend(X, X, X) == 1).all()
""", fake, wrong)


@BUILT
def test_import_and_config_do_not_touch_the_driver(fake):
    """A child forked afterwards must still be able to use CUDA."""
    run("""
assert "looked for when the first CUDA array comes" in sinkattn.show_config()["cuda"]
assert not any("libcuda" in line for line in open("/proc/self/maps"))
SinkCache(1, 1, 8).attend(X[:, :1], X[:, :1], X[:, :1])
assert not any("libcuda" in line for line in open("/proc/self/maps"))
assert sinkattn.config.cuda_devices()[0] == 2
assert "driver for CUDA 13.0" in sinkattn.show_config()["cuda"]
""", fake)


@BUILT
def test_a_call_launches_and_leaves_no_context_behind(fake):
    """Results of a library without an allocator are buffers that any library can import."""
    run("""
fake = ctypes.CDLL("libcuda.so.1")
fake.fake_launches.restype = ctypes.c_longlong
out, lse = attend(D, D, D, sink_logits=[0.5, 1.0], window=2, sinks=1, return_lse=True)
assert fake.fake_launches() >= 2 and fake.fake_context_depth() == 0
assert out.__dlpack_device__() == (2, 0)
assert out.__cuda_array_interface__["shape"] == X.shape
assert lse.__cuda_array_interface__["shape"] == X.shape[:3]
assert attend(out, D, D).__cuda_array_interface__["typestr"] == "<f4"
ran = sinkattn.show_config()["cuda_launches"]
assert ran["stage"] == 1 and any(name.startswith("attend_f32") for name in ran)
into = Device(np.zeros_like(X))
assert attend(D, D, D, out=into) is into
""", fake)


@BUILT
def test_a_decode_step_asks_the_driver_for_little(fake):
    """Which context is current, and one launch: each more costs a direct call. Pushed and popped as
    nobody made one current; asked for addresses and waited for as the library tells no stream."""
    run("""
fake = ctypes.CDLL("libcuda.so.1")
names = ["cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxGetDevice", "cuLaunchKernelEx",
         "cuMemAlloc", "cuMemFree", "cuMemsetD8Async", "cuStreamIsCapturing", "cuStreamGetId", "cuKernelGetAttribute",
         "cuPointerGetAttribute", "cuStreamSynchronize", "cuEventCreate", "cuThreadExchangeStreamCaptureMode"]
take = lambda: {name: count for name in names if (count := fake.fake_calls(name.encode()))}
device = lambda *shape: Device(np.ones(shape, np.float16))
q, k, v, out = (device(1, n, m, 128) for n, m in ((32, 1), (8, 4096), (8, 4096), (32, 1)))
cache, new = SinkCache(1, 8, 128, device="cuda", dtype="float16"), device(1, 8, 1, 128)
for call in lambda: attend(q, k, v, out=out), lambda: cache.attend(q, new, new, out=out):
    call()
    take()
    call()
    assert take() == {"cuCtxGetCurrent": 1, "cuCtxPushCurrent": 1, "cuCtxPopCurrent": 1, "cuLaunchKernelEx": 1,
                      "cuPointerGetAttribute": 4, "cuStreamSynchronize": 1}
""", fake)


@BUILT
def test_long_calls_describe_their_tensors_to_the_copy_engine(fake):
    """Five maps, six with a second query, where the build has kernels of Hopper; none otherwise."""
    run("""
make = lambda heads: Device(np.ones((2, heads, 300, 64), np.float16))
q, k = make(4), make(2)
attend(q, k, k)
attend(q, k, k, window=600, sinks=3, sink_q=q)
attend(q, k, k, window=100)
fake = ctypes.CDLL("libcuda.so.1")
fake.fake_calls.restype = ctypes.c_longlong
maps = fake.fake_calls(b"cuTensorMapEncodeTiled")
launches = sinkattn.show_config()["cuda_launches"]
hopper = launches.get("prefill_hopper_f16_64", 0)
assert hopper == launches.get("prefill_hopper_f16_featured_64", 0), launches
assert maps == 11 * hopper and (hopper == 1) == ("sm_90a" in sinkattn.show_config()["cuda"])
""", fake)


@BUILT
def test_merge_launches_once_and_tables_of_many_parts_go_first(fake):
    """More parts than a call holds references for are kept all the same."""
    run("""
lse = Device(np.zeros(X.shape[:3], np.float32))
for count, stages in (1, 0), (48, 0), (49, 2), (200, 5):
    before = dict(sinkattn.show_config()["cuda_launches"])
    out, joined = sinkattn.merge([Device(X) for _ in range(count)], [lse] * count)
    assert out.__cuda_array_interface__["shape"] == X.shape and joined.__cuda_array_interface__["shape"] == X.shape[:3]
    after = sinkattn.show_config()["cuda_launches"]
    assert after["merge"] == before.get("merge", 0) + 1
    assert after.get("stage", 0) == before.get("stage", 0) + stages
sinkattn.merge([Device(X[:0])], [Device(np.zeros((0, 2, 3), np.float32))])
assert sinkattn.show_config()["cuda_launches"] == after
""", fake)


@BUILT
def test_mass_alone_is_one_launch(fake):
    """Beside the copies of what the host gave."""
    run("""
lse = Device(np.zeros(X.shape[:3], np.float32))
def launched(*arguments, **keywords):
    before = dict(sinkattn.show_config()["cuda_launches"])
    got = sinkattn.mass(*arguments, **keywords)
    assert got.__cuda_array_interface__["shape"] == X.shape[:3]
    after = sinkattn.show_config()["cuda_launches"]
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
assert launched(D, D, lse) == {"mass": 1}
assert launched(D, D, np.zeros(X.shape[:3]), row_weights=X[..., 0].tolist(), reduce="max") == {"mass": 1, "stage": 2}
none = Device(np.ones((1, 2, 0, 8), np.float32))
assert launched(none, D, X[:, :, :0, 0]) == {}
""", fake)


@BUILT
def test_gradients_launch_what_they_need(fake):
    """Two large kernels, one before and one behind; nothing where there are no queries."""
    run("""
lse = Device(np.zeros(X.shape[:3], np.float32))
def launched(call):
    before = dict(sinkattn.show_config()["cuda_launches"])
    call()
    after = sinkattn.show_config()["cuda_launches"]
    return {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
backward = lambda x, rows, **keywords: sinkattn.attend_backward(x, x, x, x, x, rows, **keywords)
plain = {"backward_rows": 1, "backward_keys_f32_64": 1, "backward_queries_f32_64": 1}
assert launched(lambda: backward(D, lse, dlse=lse)) == plain
assert launched(lambda: backward(D, lse, sink_logits=0.5, window=2, sinks=1, sink_q=D, deterministic=False)) == {
    **plain, "backward_numbers": 1}
got = backward(D, lse, sinks=1, sink_bias=[[0.0], [1.0]], sink_kv=(Device(X[0]), Device(X[0])), lengths=[2])
assert list(got) == ["q", "k", "v", "sink_bias", "sink_kv"]
assert got["sink_bias"].__cuda_array_interface__["shape"] == (2, 1)
none = Device(np.ones((1, 2, 0, 8), np.float32)), Device(np.ones((1, 2, 0), np.float32))
some = lambda: sinkattn.attend_backward(none[0], none[0], D, D, none[0], none[1], sink_logits=[0.0, 1.0])
assert launched(lambda: globals().update(zero=some())) == {"stage": 1}
refused(lambda: backward(D, X[..., 0]), ValueError, "lse is on the CPU, expected cuda:0")
refused(lambda: backward(D, Device(X.astype(np.float16)[..., 0].copy())), TypeError, "lse is float16")
""", fake)


@BUILT
def test_host_arrays_arrive_and_device_arrays_are_not_read(fake):
    """Lengths at address 8: a host that looks dies."""
    run("""
class Nowhere:
    __cuda_array_interface__ = {"shape": (1,), "typestr": "<i4", "data": (8, False),
                                "strides": None, "version": 3}
attend(D, D, D, lengths=Nowhere())
refused(lambda: attend(D, D, D, lengths=[4]), ValueError, "lengths[0] is 4, expected 0 to 3")
bad = Device(np.array([7], np.int32))
attend(D, D, D, lengths=bad)
os.environ["SINKATTN_CHECK"] = "1"
refused(lambda: attend(D, D, D, lengths=bad), ValueError, "lengths[0] is 7, expected 0 to 3")
refused(lambda: attend(D, D, D, q_lengths=Device(np.array([1, 2]))), ValueError, "q_lengths has shape")
""", fake)


@BUILT
def test_arrays_of_other_places_are_refused_by_name(fake):
    run("""
refused(lambda: attend(D, X, D), ValueError, "k is on the CPU, expected cuda:0 (the device of q)")
refused(lambda: attend(X, X, D), ValueError, "v is on cuda:0, expected the CPU")
refused(lambda: attend(X, X, X, sink_logits=Device(np.ones(2))), ValueError, "sink_logits is on cuda:0")
refused(lambda: attend(D, D, D, out=np.zeros_like(X)), ValueError, "out is on the CPU")
refused(lambda: SinkCache(1, 2, 8).attend(D, D, D), ValueError, "q is on cuda:0, expected the CPU (the device of the cache)")
refused(lambda: SinkCache(1, 2, 8, device="cuda:1").attend(D, D, D), ValueError, "q is on cuda:0, expected cuda:1")
refused(lambda: SinkCache(1, 2, 8, device="cuda:2"), ValueError, "device is cuda:2, expected cuda:0 to cuda:1")
refused(lambda: sinkattn.merge([D], [X[..., 0]]), ValueError, "merge(): lses is on the CPU, expected cuda:0 (the device of outs[0])")
refused(lambda: attend(Device(X, mask=D), D, D), ValueError, "q cannot be read", "mask")
refused(lambda: attend(Device(X.astype(complex)), D, D), ValueError, "q cannot be read", "<c16")
refused(lambda: attend(Device(X.astype(">f4")), D, D), ValueError, "q cannot be read", ">f4")
refused(lambda: attend(Device(X.astype(float)), D, D), TypeError, "q has dtype float64")
refused(lambda: attend(Device(X, data=(X.ctypes.data, True)), D, D, out=Device(X, data=(X.ctypes.data, True))),
        ValueError, "out is read-only")
class Tracer:
    aval = None
refused(lambda: attend(Tracer(), D, D), NotImplementedError, "q is a JAX tracer", "jax.jit")
""", fake)


@BUILT
def test_a_failed_launch_tells_the_drivers_text(fake):
    run("""
refused(lambda: attend(D, D, D), RuntimeError, "attend(): CUDA error 700", "illegal memory access", "attend_f32")
""", fake, "launch")


@BUILT
def test_no_memory_is_a_memory_error(fake):
    run("""
refused(lambda: attend(D, D, D), MemoryError, "attend(): out of CUDA memory", "a result")
refused(lambda: SinkCache(1, 2, 8, device="cuda"), MemoryError, "SinkCache(): out of CUDA memory")
assert (attend(X, X, X) == 1).all()
""", fake, "memory")


@BUILT
def test_a_driver_from_before_function_loading_serves(fake):
    run("attend(D, D, D)", fake, "young")


@BUILT
def test_a_forked_child_is_told_to_spawn(fake):
    run("""
attend(D, D, D)
child = os.fork()
if child == 0:
    refused(lambda: attend(D, D, D), RuntimeError, "attend(): ", "'spawn'")
    refused(lambda: SinkCache(1, 1, 8, device="cuda"), RuntimeError, "'spawn'")
    assert sinkattn.config.cuda_devices()[0] == 0
    assert (attend(X, X, X) == 1).all()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
attend(D, D, D)
""", fake)


@BUILT
def test_a_cache_keeps_the_state_of_a_cache_of_the_cpu(fake):
    """All but attend: state, lengths, kept, reorder, reset, copy, crop, refusals."""
    run("""
making = dict(sinks=2, window=5, rollback=2, rope=sinkattn.Rope.from_theta(8))
theirs = SinkCache(3, 2, 8, **making)
ours = SinkCache(3, 2, 8, device="cuda", **making)
x = np.random.default_rng(0).standard_normal((3, 2, 20, 8)).astype(np.float32)
theirs.attend(x, x, x, new_lengths=[20, 3, 0])
def same():
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        np.testing.assert_array_equal(a, b, err_msg=name)
    for a, b in zip(ours.kept(), theirs.kept()):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(ours.length, theirs.length)
theirs.load_state_dict(theirs.state_dict())
ours.load_state_dict(theirs.state_dict())
same()
assert ours.nbytes == theirs.nbytes
for cache in (ours, theirs):
    cache.reorder([2, 0, 0])
same()
ours.reorder(Device(np.array([1, 1, 0], np.int32))), theirs.reorder([1, 1, 0])
same()
twin = ours.copy()
for cache in (ours, theirs):
    cache.reset([1])
same()
for cache in (ours, theirs):
    cache.reset()
    cache.crop(0)
same()
assert twin.length.tolist() == [20, 20, 0]
state = twin.state_dict()
state["low"][:] = 99
refused(lambda: twin.load_state_dict(state), ValueError, "low[0] is 99")
refused(lambda: twin.crop(9), ValueError, "crop(): row 0")
refused(lambda: twin.reorder([0, 1]), ValueError, "index has 2 entries")
refused(lambda: twin.attend(*[Device(x.astype(np.float16))] * 3), TypeError, "the dtype of the cache")
""", fake)


@BUILT
def test_storage_that_the_caller_gives(fake):
    run("""
room = np.zeros(4096 + 2048, np.uint8)
room = room[-room.ctypes.data % 16:][:5000]
cache = SinkCache(1, 1, 8, sinks=1, window=3, device="cuda", storage=Device(room))
state = cache.state_dict()
state["length"][:], state["keys"][:] = 2, 7.0
cache.load_state_dict(state)
assert (room.view(np.uint8)[:4 * 8 * 4].view(np.float32)[:8] == 7).all()
refused(lambda: SinkCache(1, 1, 8, device="cuda", storage=Device(room[:64])), ValueError,
        "storage has 64 bytes, expected at least")
refused(lambda: SinkCache(1, 1, 8, device="cuda", storage=room), ValueError, "storage is on the CPU")
refused(lambda: SinkCache(1, 1, 8, device="cuda", storage=3), TypeError, "storage is int")
refused(lambda: SinkCache(1, 1, 8, device="cuda", storage=Device(room[::2])), ValueError, "not contiguous")
""", fake)


def test_a_build_without_nvcc_says_so():
    sentence = sinkattn.show_config()["cuda"]
    assert sentence.startswith(("not built: ", "built for ", "built, but "))
    if sentence.startswith("not built"):
        with pytest.raises(NotImplementedError, match="backends of this build are: cpu"):
            sinkattn.SinkCache(1, 1, 8, device="cuda")


class TestFindingTheCompiler:
    """csrc/cuda/nvcc.py, as the build runs it."""

    @pytest.fixture(autouse=True)
    def nvcc(self, monkeypatch):
        folder = Path(__file__).parents[2] / "csrc/cuda"
        if not folder.exists():
            pytest.skip("needs the sources")
        monkeypatch.syspath_prepend(str(folder))
        import nvcc
        self.nvcc = nvcc
        for name in ("SINKATTN_NVCC", "SINKATTN_CUDA", "SINKATTN_CUDA_ARCHS", "CUDA_HOME",
                     "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)

    def program(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\necho compiler\n")
        path.chmod(0o755)
        return str(path)

    def test_order(self, tmp_path, monkeypatch):
        """The named one, CUDA_HOME, CUDA_PATH, PATH."""
        named = self.program(tmp_path / "named/nvcc")
        home, path, search = (self.program(tmp_path / n / "bin/nvcc") for n in "abc")
        monkeypatch.setenv("PATH", str(Path(search).parent), prepend=os.pathsep)
        assert self.nvcc.find() == search
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "b"))
        assert self.nvcc.find() == path
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "a"))
        assert self.nvcc.find() == home
        monkeypatch.setenv("SINKATTN_NVCC", named)
        assert self.nvcc.find() == named

    def test_a_wrong_name_ends_the_build(self, monkeypatch):
        monkeypatch.setenv("SINKATTN_NVCC", "/nowhere/nvcc")
        with pytest.raises(SystemExit, match="/nowhere/nvcc, which is no program"):
            self.nvcc.find()

    def test_without_a_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setattr(self.nvcc, "find", lambda: None)
        folder, line = self.nvcc.prepare(tmp_path)
        assert "CPU only, no nvcc was found" in line and "SINKATTN_NVCC" in line
        assert (folder / "images.h").read_text() == ""
        monkeypatch.setenv("SINKATTN_CUDA", "1")
        with pytest.raises(SystemExit, match="no nvcc was found: install"):
            self.nvcc.prepare(tmp_path)
        monkeypatch.setenv("SINKATTN_CUDA", "yes")
        with pytest.raises(SystemExit, match="expected auto, 1 or 0"):
            self.nvcc.prepare(tmp_path)

    def test_architectures(self, monkeypatch):
        assert self.nvcc.archs() == ["sm_90a", "sm_80", "compute_80"]
        monkeypatch.setenv("SINKATTN_CUDA_ARCHS", "sm_86, compute_90")
        assert self.nvcc.archs() == ["sm_86", "compute_90"]
        monkeypatch.setenv("SINKATTN_CUDA_ARCHS", "hopper")
        with pytest.raises(SystemExit, match="'hopper'"):
            self.nvcc.archs()

    def test_a_kernel_is_compiled_again_only_for_a_reason(self, tmp_path, monkeypatch):
        """Its own text, a header it includes, the flags or the compiler."""
        log = tmp_path / "log"
        compiler = tmp_path / "nvcc"
        compiler.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit; fi\n'
                            f'echo "$@" >> {log}\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
        compiler.chmod(0o755)
        sources = tmp_path / "sources"
        sources.mkdir()
        (sources / "common.cuh").write_text("int common;")
        (sources / "a.cu").write_text('#include "common.cuh"\n')
        (sources / "b.cu").write_text("int b;")
        monkeypatch.setattr(self.nvcc, "FOLDER", sources)
        monkeypatch.setenv("SINKATTN_NVCC", str(compiler))

        def compiled():
            log.write_text("")
            self.nvcc.prepare(tmp_path / "build")
            return sorted(Path(line.split()[-3]).name for line in log.read_text().splitlines())

        assert compiled() == ["a.cu", "b.cu"]
        assert compiled() == []
        (sources / "common.cuh").write_text("int changed;")
        assert compiled() == ["a.cu"]
        monkeypatch.setenv("SINKATTN_CUDA_ARCHS", "sm_80")
        assert compiled() == ["a.cu", "b.cu"]
        images = (tmp_path / "build/cuda/images.h").read_text()
        assert images.count("SA_IMAGE(") == 2 and "SA_IMAGE(a, " in images
