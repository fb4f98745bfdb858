"""How close is close. Bounds come from the contract, never from what the code happens to give."""

import numpy as np

FP32_RELATIVE = 2e-6       # up to 4096 keys
FP32_RELATIVE_LONG = 5e-6  # up to 32768
LSE_ABSOLUTE = 1e-5
HALF_RELATIVE = {"float16": 1e-3, "bfloat16": 8e-3}  # one rounding of P and one of the output


def relative_error(got, expected):
    """Relative L2 over the finite entries; infinite and NaN entries must be the same."""
    got, expected = np.asarray(got).astype(np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    assert np.isfinite(got[finite]).all()
    norm = np.linalg.norm(expected[finite])
    return np.linalg.norm(got[finite] - expected[finite]) / max(norm, 1e-30)  # float32 underflows below


def assert_close(got, expected, bound=FP32_RELATIVE):
    assert relative_error(got, expected) <= bound


def assert_lse_close(got, expected, bound=LSE_ABSOLUTE):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    scale = np.maximum(1.0, np.abs(expected[finite]))
    assert (np.abs(got[finite] - expected[finite]) <= bound * scale).all()
