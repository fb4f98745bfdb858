"""Error bounds against float64, and results that do not depend on who computes them."""

import numpy as np
import pytest
from oracle import normal
from tolerance import FP32_RELATIVE, FP32_RELATIVE_LONG, assert_close, assert_lse_close

from sinkattn import attend, get_num_threads, reference, set_num_threads


@pytest.mark.parametrize("depth", [64, 128, 256])
@pytest.mark.parametrize(("keys", "bound"), [(64, FP32_RELATIVE), (4096, FP32_RELATIVE),
                                             (32768, FP32_RELATIVE_LONG)])
@pytest.mark.parametrize("queries", [1, 20])
def test_fp32_stays_within_its_bound(queries, keys, bound, depth, table):
    if table == "reference" and keys > 4096:
        pytest.skip("the scalar kernel accumulates in float64 and is slow")
    random = np.random.default_rng(keys)
    q, k, v = (normal(random, 1, 2, n, depth) for n in (queries, keys, keys))
    out, lse = attend(q, k, v, return_lse=True)
    expected, expected_lse = reference.attend(q, k, v, return_lse=True)
    assert_close(out, expected, bound)
    assert_lse_close(lse, expected_lse)


@pytest.fixture
def threads():
    before = get_num_threads()
    yield set_num_threads
    set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 2, 2, 400, 400), (1, 2, 4, 1, 5000), (3, 1, 8, 7, 900)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_do_not_depend_on_threads(shape, dtype, threads, table):
    batch, kv_heads, group, queries, keys = shape
    random = np.random.default_rng(1)
    q = normal(random, batch, kv_heads * group, queries, 64, dtype=dtype)
    k, v = (normal(random, batch, kv_heads, keys, 64, dtype=dtype) for _ in range(2))
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(attend(q, k, v, window=300, sinks=4, sink_logits=0.3, return_lse=True,
                              return_mass=True))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("queries", [1, 30])
def test_results_do_not_depend_on_the_batch(queries, table):
    """A row alone, with companions, or padded: the same bits."""
    random = np.random.default_rng(2)
    q, k, v = (normal(random, 3, h, n, 64) for h, n in ((4, queries), (2, 600), (2, 600)))
    lengths = [600, 333, 70]
    out = attend(q, k, v, lengths=lengths, window=200, sinks=3)
    for b, n in enumerate(lengths):
        alone = attend(q[b:b + 1], k[b:b + 1, :, :n], v[b:b + 1, :, :n], window=200, sinks=3)
        np.testing.assert_array_equal(out[b:b + 1], alone)


def test_time_follows_what_is_visible():
    """Only visible blocks are touched: keys outside every window may not even be mapped memory.
    Here they are a stride-0 view of 2^40 rows, which nobody could read."""
    k = np.broadcast_to(np.ones((1, 1, 1, 64), np.float32), (1, 1, 2**40, 64))
    q = np.ones((1, 2, 8, 64), np.float32)
    np.testing.assert_allclose(attend(q, k, k, window=100, sinks=4), 1.0, rtol=1e-6)
