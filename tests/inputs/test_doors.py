"""What an array carries beside its elements is never dropped in silence."""

import numpy as np
import pytest
from oracle import dtype_of, normal

from sinkattn import Rope, SinkCache, attend, merge

F = np.float32
X = np.ones((1, 2, 5, 16), F)


class Foreign:
    """DLPack and nothing else; `versioned` False: as before DLPack 1.0."""

    def __init__(self, array, versioned=True):
        self.array, self.versioned = array, versioned

    def __dlpack__(self, **keywords):
        if keywords and not self.versioned:
            raise TypeError("no keywords in this old version")
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("name", ["out", "sink_q"])
def test_an_array_without_axes_is_not_an_absent_one(name):
    """Rank 0 means "not given" inside: `out` without axes was written far past its end."""
    with pytest.raises(ValueError, match=rf"attend\(\): {name} has 0 dimensions"):
        attend(X, X, X, sinks=1, **{name: np.zeros((), F)})
    with pytest.raises(ValueError, match=r"attend\(\): sink_kv\[1\] has 0 dimensions"):
        attend(X, X, X, sink_kv=(X[0], np.zeros((), F)))
    with pytest.raises(TypeError, match=r"attend\(\): sink_kv\[0\] is NoneType"):
        attend(X, X, X, sink_kv=(None, None))


def test_a_mask_is_refused():
    with pytest.raises(TypeError, match=r"attend\(\): k is a masked array"):
        attend(X, np.ma.masked_array(X, mask=True), X)


@pytest.mark.parametrize("name", ["causal", "return_lse", "return_mass"])
def test_a_switch_is_a_bool(name):
    with pytest.raises(TypeError, match=rf"attend\(\): {name} is str, expected a bool"):
        attend(X, X, X, **{name: "no"})


def test_a_ragged_list_is_named():
    with pytest.raises(ValueError, match=r"attend\(\): sink_logits has rows of different lengths"):
        attend(X, X, X, sink_logits=[[1.0], [1.0, 2.0]])


def test_every_real_dtype_serves_as_logits():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    expected = attend(X, X, X, sink_logits=[0.5, 2.0])
    for dtype in (np.longdouble, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2):
        got = attend(X, X, X, sink_logits=np.array([0.5, 2.0]).astype(dtype))
        np.testing.assert_array_equal(got, expected)


def test_old_capsules_are_not_written_to():
    """They cannot say that they are read-only; JAX arrays are."""
    with pytest.raises(ValueError, match=r"attend\(\): out is read-only"):
        attend(X, X, X, out=Foreign(np.zeros_like(X), versioned=False))


@pytest.mark.parametrize("count", [1, 13, 200])
def test_merge_rounds_once(count, device):
    """However many parts: joining half-precision parts by stages lost 2.5 bits."""
    pytest.importorskip("ml_dtypes")
    random = np.random.default_rng(0)
    q, k, v = (normal(random, 1, 1, n, 64, dtype="bfloat16") for n in (3, 400, 400))
    parts = [attend(q, x, y, causal=False, return_lse=True)
             for x, y in zip(np.array_split(k, count, 2), np.array_split(v, count, 2))]
    wide = attend(*(x.astype(F) for x in (q, k, v)), causal=False)
    out = merge(*zip(*parts))[0]
    assert np.linalg.norm(out.astype(F) - wide) <= 4e-3 * np.linalg.norm(wide)


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")
        self.x = self.torch.ones(1, 2, 5, 16)

    def test_a_negated_view_is_refused(self):
        """Its memory holds the other sign."""
        view = self.torch._neg_view(self.x)
        with pytest.raises(ValueError, match=r"attend\(\): v is a negated view"):
            attend(self.x, self.x, view)
        assert (attend(self.x, self.x, view.resolve_neg()) == -1).all()

    @pytest.mark.parametrize("name", ["scale", "softcap"])
    def test_a_number_may_require_grad_too(self, name):
        number = self.torch.tensor(0.5, requires_grad=True)
        with pytest.raises(NotImplementedError, match=rf"attend\(\): {name} requires grad"):
            attend(self.x, self.x, self.x, **{name: number})
        attend(self.x, self.x, self.x, **{name: number.detach()})

    def test_frequencies_may_not(self):
        with pytest.raises(NotImplementedError, match=r"Rope\(\): inv_freq requires grad"):
            Rope(self.torch.ones(4, requires_grad=True))

    def test_tensors_without_memory_are_refused(self):
        """Fake and zero tensors have a null pointer; meta, sparse and vmapped ones none at all. The
        operator takes the fake and the meta ones for attend, if all of them are."""
        torch = self.torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        with FakeTensorMode():
            fake = torch.ones(1, 2, 5, 16)
        zero, sparse = torch._efficientzerotensor((1, 2, 5, 16)), self.x.to_sparse()
        meta = torch.ones(1, 2, 5, 16, device="meta")
        cache = SinkCache(1, 2, 16)
        for x in (fake, zero, sparse, meta):
            with pytest.raises(ValueError, match=r"attend\(\): q (has no memory|cannot be read)"):
                cache.attend(x, self.x, self.x)
        for x, match in ((zero, "the last axis of q has stride 0"), (sparse, "q is sparse"),
                         (meta, r"k is on cpu, expected meta \(the device of q\)")):
            with pytest.raises(ValueError, match=r"attend\(\): " + match):
                attend(x, self.x, self.x)

    def test_an_unaligned_tensor_is_refused(self):
        x = self.torch.frombuffer(bytearray(4 * 160 + 1), dtype=self.torch.float32, offset=1,
                                  count=160).reshape(1, 2, 5, 16)
        with pytest.raises(ValueError, match=r"attend\(\): q is not aligned"):
            attend(x, x, x)

    def test_bfloat16_of_a_library_without_from_dlpack(self):
        pytest.importorskip("ml_dtypes")
        out = attend(Foreign(self.x.bfloat16()), Foreign(self.x.bfloat16()), self.x.bfloat16())
        assert out.dtype == dtype_of("bfloat16") and (out == 1).all()
