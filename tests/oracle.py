"""Expected values: sinkattn.reference, which is itself tested against torch and Hugging Face."""

import numpy as np
from tolerance import FP32_RELATIVE, HALF_RELATIVE, assert_close, assert_lse_close

from sinkattn import attend, reference

DTYPES = ("float32", "float16", "bfloat16")


def dtype_of(name):
    if name == "bfloat16":
        import ml_dtypes
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def normal(random, *shape, dtype="float32"):
    return random.standard_normal(shape).astype(dtype_of(dtype))


def check_attend(q, k, v, bound=None, **keywords):
    """attend against the reference: out, lse and mass. Returns what attend gave."""
    got = attend(q, k, v, return_lse=True, return_mass=True, **keywords)
    expected = reference.attend(q, k, v, return_lse=True, return_mass=True, **keywords)
    name = q.dtype.name
    bound = bound or HALF_RELATIVE.get(name, FP32_RELATIVE)
    assert got[0].dtype == q.dtype
    assert got[1].dtype == got[2].dtype == np.float32
    assert_close(got[0], expected[0], bound)
    assert_lse_close(got[1], expected[1], 1e-5 if name == "float32" else 1e-4)
    assert_close(got[2], expected[2], 1e-5 if name == "float32" else 1e-3)
    return got
