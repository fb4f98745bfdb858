"""Arrays of every kind on the device: the same kind back, in the order of its library's streams."""

import os
import subprocess
import sys

import numpy as np
import pytest

from sinkattn import SinkCache, attend

RANDOM = np.random.default_rng(0)
HOST = [RANDOM.standard_normal((2, h, 40, 32)).astype(np.float32) for h in (4, 2, 2)]
KEYWORDS = {"window": 9, "sinks": 2, "return_lse": True}


@pytest.fixture
def expected(torch):
    return [x.cpu().numpy() for x in attend(*(torch.from_numpy(x).cuda() for x in HOST), **KEYWORDS)]


def test_cupy_arrays_come_back_as_cupy_arrays(expected):
    cupy = pytest.importorskip("cupy")
    arrays = [cupy.asarray(x) for x in HOST]
    out, lse = attend(*arrays, **KEYWORDS)
    assert type(out) is cupy.ndarray and type(lse) is cupy.ndarray
    np.testing.assert_array_equal(out.get(), expected[0])
    np.testing.assert_array_equal(lse.get(), expected[1])
    half = [x.astype(cupy.float16) for x in arrays]
    assert attend(*half).dtype == np.float16
    into = cupy.zeros_like(out)
    assert attend(*arrays, window=9, sinks=2, out=into) is into
    np.testing.assert_array_equal(into.get(), expected[0])
    logits = attend(*arrays, sink_logits=cupy.arange(4), lengths=cupy.asarray([40, 3]))
    np.testing.assert_array_equal(
        logits.get(), attend(*arrays, sink_logits=[0.0, 1.0, 2.0, 3.0], lengths=[40, 3]).get())


def test_cupy_streams_are_followed(expected):
    cupy = pytest.importorskip("cupy")
    arrays = [cupy.asarray(x) for x in HOST]
    late = [cupy.zeros_like(x) for x in arrays]
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        big = cupy.ones((4096, 4096), cupy.float32)
        for _ in range(20):
            big = big @ big * 0
        for target, source in zip(late, arrays):
            target[...] = source
        out = attend(*late, **KEYWORDS)[0]
        stream.synchronize()
    np.testing.assert_array_equal(out.get(), expected[0])


def test_libraries_mix(expected, torch):
    """q of torch on a side stream, k of CuPy on another."""
    cupy = pytest.importorskip("cupy")
    side, other = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    source = cupy.asarray(HOST[1])
    v = torch.from_numpy(HOST[2]).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), other:
        k = cupy.zeros_like(source)
        big = cupy.ones((4096, 4096), cupy.float32)
        for _ in range(20):
            big = big @ big * 0
        k[...] = source
        q = torch.from_numpy(HOST[0]).cuda()
        out = attend(q, k, v, **KEYWORDS)[0]
        swapped = attend(cupy.asarray(HOST[0]), v, v, **KEYWORDS)[0]
    torch.cuda.synchronize()
    assert isinstance(out, torch.Tensor) and type(swapped) is cupy.ndarray
    np.testing.assert_array_equal(out.cpu().numpy(), expected[0])


def test_jax_arrays_come_back_as_new_jax_arrays(expected):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("jax has no GPU here")
    arrays = [jax.numpy.asarray(x) for x in HOST]
    for _ in range(3):
        out, lse = attend(*arrays, **KEYWORDS)
        assert isinstance(out, jax.Array) and out.devices() == arrays[0].devices()
        np.testing.assert_array_equal(np.asarray(out), expected[0])
        np.testing.assert_array_equal(np.asarray(lse), expected[1])
    half = [x.astype(jax.numpy.bfloat16) for x in arrays]
    assert attend(*half).dtype == jax.numpy.bfloat16
    with pytest.raises(ValueError, match=r"out is read-only"):
        attend(*arrays, out=out)
    with pytest.raises(NotImplementedError, match=r"attend\(\): q is a JAX tracer.*jax.jit"):
        jax.jit(lambda q, k, v: attend(q, k, v))(*arrays)


def test_the_interface_alone_is_enough(expected, torch):
    """__cuda_array_interface__ without DLPack; results come as buffers that torch imports."""
    class Interface:
        def __init__(self, tensor):
            self.tensor = tensor

        @property
        def __cuda_array_interface__(self):
            return self.tensor.__cuda_array_interface__

    tensors = [torch.from_numpy(x).cuda() for x in HOST]
    out, lse = attend(*map(Interface, tensors), **KEYWORDS)
    np.testing.assert_array_equal(torch.as_tensor(out, device="cuda").cpu().numpy(), expected[0])
    np.testing.assert_array_equal(torch.from_dlpack(lse).cpu().numpy(), expected[1])


def test_dlpack_without_the_exchange_table(expected, torch):
    """As torch before 2.10 comes."""
    class Old:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, *, stream=None):
            return self.tensor.__dlpack__(stream=stream)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    tensors = [torch.from_numpy(x).cuda() for x in HOST]
    out = attend(*map(Old, tensors), **KEYWORDS)[0]
    np.testing.assert_array_equal(torch.from_dlpack(out).cpu().numpy(), expected[0])


def test_a_cache_without_torch(expected):
    """Storage from the driver, arrays of CuPy."""
    pytest.importorskip("cupy")
    code = """
import sys, numpy as np, cupy
from sinkattn import SinkCache
x = np.random.default_rng(0).standard_normal((1, 2, 30, 16)).astype(np.float32)
there, here = (SinkCache(1, 2, 16, sinks=2, window=8, device=d) for d in ("cuda", "cpu"))
for a, b in ((0, 1), (1, 5), (5, 30)):
    y = np.ascontiguousarray(x[:, :, a:b])
    got = there.attend(*[cupy.asarray(y)] * 3)
    assert np.abs(got.get() - here.attend(y, y, y)).max() < 1e-5
twin = there.copy()
there.reset()
assert there.length.tolist() == [0] and twin.length.tolist() == [30]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120,
                   env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_cache_in_storage_that_is_given(torch):
    room = torch.empty(1 << 16, dtype=torch.uint8, device="cuda")
    cache = SinkCache(1, 1, 16, sinks=1, window=7, device="cuda", storage=room)
    x = torch.randn(1, 1, 1, 16, device="cuda")
    cache.attend(x, x, x)
    assert torch.equal(room[:64].view(torch.float32), x.flatten())
    before = torch.cuda.memory_allocated()
    SinkCache(1, 8, 128, dtype="bfloat16", device=torch.device("cuda"))
    assert SinkCache(1, 1, 8, device="cuda").copy().nbytes > 0
    assert torch.cuda.memory_allocated() == before  # from torch's allocator, and back


def test_a_state_goes_from_one_device_to_the_other(torch):
    making = {"sinks": 2, "window": 9, "rollback": 3, "dtype": "bfloat16"}
    x = torch.randn(2, 2, 25, 16).bfloat16()
    here, there = SinkCache(2, 2, 16, **making), SinkCache(2, 2, 16, device="cuda", **making)
    there.attend(*[x.cuda()] * 3, new_lengths=torch.tensor([25, 4], device="cuda"))
    here.load_state_dict(there.state_dict())
    for name, array in here.state_dict().items():
        np.testing.assert_array_equal(array, there.state_dict()[name])
    y = torch.randn(2, 2, 3, 16).bfloat16()
    a, b = here.attend(y, y, y), there.attend(*[y.cuda()] * 3).cpu()
    assert (a.float() - b.float()).abs().max() < 0.03
    there.reset(), there.load_state_dict(here.state_dict())
    np.testing.assert_array_equal(there.length, here.length)
