"""Arrays of any kind in, the same kind out."""

import subprocess
import sys

import numpy as np
import pytest
from oracle import check_attend, normal

from sinkattn import SinkCache, attend, merge


class Foreign:
    """An array library that offers nothing but DLPack."""

    def __init__(self, array, versioned=True):
        self.array, self.versioned = array, versioned

    def __dlpack__(self, **keywords):
        if keywords and not self.versioned:
            raise TypeError("no keywords in this old version")
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_bfloat16_of_ml_dtypes_comes_back():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = normal(np.random.default_rng(0), 1, 2, 9, 32, dtype="bfloat16")
    assert check_attend(x, x, x, window=3, sinks=1)[0].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("versioned", [True, False])
def test_anything_with_dlpack(versioned):
    """Without a from_dlpack of its own the result is NumPy."""
    x = normal(np.random.default_rng(1), 1, 2, 9, 32)
    out, lse = attend(*(Foreign(y, versioned) for y in (x, x, x)), return_lse=True)
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    np.testing.assert_array_equal(out, attend(x, x, x))


def test_the_library_of_an_array_makes_its_result():
    class Library:
        @staticmethod
        def from_dlpack(x):
            return ("made by the library", np.from_dlpack(x))

    class Array(Foreign):
        def __array_namespace__(self):
            return Library

    x = normal(np.random.default_rng(2), 1, 2, 9, 32)
    name, out = attend(Array(x), x, x)
    assert name == "made by the library"
    np.testing.assert_array_equal(out, attend(x, x, x))


@pytest.mark.parametrize(("device", "error", "match"), [
    ((2, 0), ValueError, r"k is on cuda:0, expected the CPU \(the device of q\)"),
    ((10, 0), NotImplementedError, r"k is on DLPack device type 10.*the backends are: cpu, cuda"),
])
def test_memory_of_another_device_is_refused_by_name(device, error, match):
    class OnDevice(Foreign):
        def __dlpack_device__(self):
            return device

    x = np.zeros((1, 1, 1, 8), np.float32)
    with pytest.raises(error, match=r"attend\(\): " + match):
        attend(x, OnDevice(x), x)
    with pytest.raises(error, match="sink_logits is on"):
        attend(x, x, x, sink_logits=OnDevice(x[0, 0, 0, :1]))


def test_import_needs_numpy_alone():
    code = ("import sys, sinkattn; bad = {'torch', 'transformers', 'matplotlib', 'ml_dtypes'} & "
            "set(sys.modules); assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True)


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_tensors_come_back_as_tensors(self, dtype):
        torch = self.torch
        x = torch.randn(2, 9, 4, 32).to(getattr(torch, dtype)).transpose(1, 2)
        logits = torch.arange(4, dtype=x.dtype)
        out, lse, mass = attend(x, x, x, window=5, sink_logits=logits, return_lse=True,
                                return_mass=True)
        assert out.dtype == x.dtype and lse.dtype == mass.dtype == torch.float32
        if dtype != "bfloat16":
            y = x.numpy()
            np.testing.assert_array_equal(out.numpy(), attend(y, y, y, window=5,
                                                              sink_logits=logits.numpy()))
        into = torch.full((2, 4, 9, 32), torch.nan, dtype=x.dtype)
        assert attend(x, x, x, window=5, sink_logits=logits, out=into) is into
        assert torch.equal(into, out)

    def test_a_cache_takes_tensors(self):
        x = self.torch.randn(1, 2, 30, 16, dtype=self.torch.bfloat16)
        out = SinkCache(1, 2, 16, window=8, dtype=self.torch.bfloat16).attend(x, x, x)
        assert out.dtype == x.dtype and out.shape == x.shape
        parts = merge([out, out], [self.torch.zeros(1, 2, 30)] * 2)
        assert isinstance(parts[0], self.torch.Tensor)

    def test_a_gradient_is_never_dropped_in_silence(self):
        """The DLPack exchange drops requires_grad without a word: attend goes to its operator (see
        test_torch_operator.py), the others refuse."""
        x = self.torch.randn(1, 2, 5, 16)
        y, lse = x.clone().requires_grad_(), self.torch.zeros(1, 2, 5)
        with pytest.raises(NotImplementedError, match=r"SinkCache.attend\(\): k requires grad"):
            SinkCache(1, 2, 16).attend(x, y, x)
        with pytest.raises(NotImplementedError, match=r"merge\(\): outs requires grad"):
            merge([x, y], [lse, lse])
        with self.torch.no_grad():
            SinkCache(1, 2, 16).attend(x, y, x)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_parity_with_sdpa(self, dtype):
        torch = self.torch
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, h, 70, 64, dtype=getattr(torch, dtype)) for h in (4, 2, 2))
        i, j = torch.arange(70)[:, None], torch.arange(70)[None]
        mask = (j <= i) & ((i - j < 20) | (j < 4))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        bound = 2e-6 if dtype == "float32" else 2e-2
        for theirs, ours in (({"is_causal": True}, {}), ({}, {"causal": False}),
                             ({"attn_mask": mask}, {"window": 20, "sinks": 4})):
            expected = sdpa(q, k, v, enable_gqa=True, **theirs)
            assert (attend(q, k, v, **ours) - expected).abs().max() <= bound
