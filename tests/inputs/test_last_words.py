"""Messages that nobody meets by accident: hostile producers, the private core, what cannot change."""

import numpy as np
import pytest
from dlpack import Producer, exchange_type

from sinkattn import Rope, SinkCache, _core, attend
from sinkattn.config import use_cpu_table

F = np.float32
X = np.ones((1, 2, 3, 8), F)
Y = np.arange(48, dtype=F).reshape(1, 2, 3, 8)


def test_a_producer_may_say_anything():
    with pytest.raises(ValueError, match=r"attend\(\): q has a negative extent: \[1, 2, -3, 8\]"):
        attend(Producer(X, shape=(1, 2, -3, 8)), X, X)
    with pytest.raises(ValueError, match=r"attend\(\): q has 9 dimensions"):
        attend(Producer(X, shape=(1,) * 9, strides=(0,) * 8), X, X)
    with pytest.raises(BufferError, match=r"attend\(\): k speaks DLPack 7, expected 1"):
        attend(X, Producer(X, major=7), X)
    with pytest.raises(TypeError, match=r"attend\(\): v.__dlpack__\(\) gave no DLPack capsule"):
        attend(X, X, Producer(X, answer=3))
    np.testing.assert_array_equal(attend(*[Producer(Y, strides=False)] * 3), attend(Y, Y, Y))


@pytest.mark.parametrize("view", [True, False])
def test_a_library_with_the_exchange_table(view):
    """With and without borrowed views; results are made by the library itself."""
    kind = exchange_type(view)
    out, lse = attend(kind(Y), kind(Y), Y, return_lse=True)
    expected = attend(Y, Y, Y, return_lse=True)
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


def test_a_library_that_fails_at_its_own_table():
    for allocates, error, match in (("no", MemoryError, "^$"),
                                    ("and keeps", RuntimeError, "did not take its own allocation back")):
        with pytest.raises(error, match=match):
            attend(exchange_type(True, allocates)(X), X, X)


def test_torch_says_why_it_has_no_memory():
    torch = pytest.importorskip("torch")
    one = torch.zeros(1, 1, 1, 1)
    with pytest.raises(MemoryError, match="allocate"):
        attend(one.expand(1, 1, 2**45, 1), one, one)


def test_a_table_of_another_version_is_no_table():
    with pytest.raises(TypeError, match=r"attend\(\): q is Exchanged, expected an array"):
        attend(exchange_type(major=2)(X), X, X)


def test_the_private_core_counts_its_arguments():
    core = _core.Cache(1, 2, 8, 8, 1, 4, 0, "float32", b"", 1.0, False, False, False)
    for call, error, match in [
        (lambda: _core.attend(X), TypeError, "_core.attend takes 23 arguments, got 1"),
        (lambda: _core.attend_backward(X), TypeError, "_core.attend_backward takes 23 arguments, got 1"),
        (lambda: core.attend(X), TypeError, "Cache.attend takes 13 arguments, got 1"),
        (lambda: core.reset(b"\0\0"), ValueError, r"reset\(\): expected one flag for each row"),
        (lambda: core.reset(3), ValueError, r"reset\(\): expected one flag for each row"),
        (lambda: core.load(b"", b"", b"", b""), ValueError, r"load_state_dict\(\): keys, values, length and low do not"),
        (lambda: use_cpu_table("sse9"), ValueError, r"use_cpu_table\(\): sse9 is not a table that is usable here"),
        (lambda: use_cpu_table(3), TypeError, r"use_cpu_table\(\): name is not a string"),
    ]:
        with pytest.raises(error, match=match):
            call()


def test_the_end_of_the_countable_positions():
    cache = SinkCache(1, 2, 8, window=4)
    state = cache.state_dict()
    state["length"][:] = 2**61 - 1
    state["low"][:] = 2**61 - 3
    cache.load_state_dict(state)
    with pytest.raises(ValueError, match=r"SinkCache.attend\(\): row 0 is at the end of the countable positions"):
        cache.attend(X, X, X)


def test_a_rope_is_checked_and_immutable():
    with pytest.raises(AttributeError, match="Rope is immutable"):
        Rope.from_theta(8).applied = True
    with pytest.raises(TypeError, match=r"Rope\(\): attention_scaling is bool"):
        Rope.from_theta(8, attention_scaling=True)
    with pytest.raises(ValueError, match=r"Rope\(\): attention_scaling is nan, expected a finite number"):
        Rope.from_theta(8, attention_scaling=np.nan)


class WithoutDevice:
    """Speaks DLPack, but does not say where its memory is."""

    def __dlpack__(self, **keywords):
        return X.__dlpack__()

    def __dlpack_device__(self):
        return "cpu"


def test_an_array_tells_its_device():
    with pytest.raises(TypeError, match=r"attend\(\): k does not tell its device: __dlpack_device__\(\) gave no pair"):
        attend(X, WithoutDevice(), X)


class SomeTracer:
    """What a function under jax.jit sees in place of an array."""

    aval = None


def test_a_tracer_has_no_memory():
    with pytest.raises(NotImplementedError, match=r"attend\(\): v is a JAX tracer, which has no memory: call outside jax.jit"):
        attend(X, X, SomeTracer())
