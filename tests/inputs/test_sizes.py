"""Extents and strides whose products overflow are refused before anything is computed from them."""

import numpy as np
import pytest

from sinkattn import SinkCache, attend, merge

F = np.float32
X = np.ones((1, 1, 3, 8), F)


def broadcast(*shape, dtype=F):
    """Any extents on a few bytes."""
    return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, (0,) * len(shape))


def strided(shape, strides):
    return np.lib.stride_tricks.as_strided(np.zeros(8, F), shape, strides)


@pytest.mark.parametrize("batch", [2**64 // 616 + 1, 2**51, 2**57])
def test_a_batch_without_queries_is_bounded_too(batch):
    """616 bytes of plan for each row: 2^64 / 616 rows came to 8 bytes, which were then written past."""
    x = np.empty((batch, 1, 0, 1), F)
    with pytest.raises(ValueError, match=r"attend\(\): q has shape \[\d+, 1, 0, 1\], whose size does not fit 52 bits"):
        attend(x, x, x)


@pytest.mark.parametrize("shape", [(1, 1, 2**50, 1), (1, 2**31, 2**29, 1), (2**17, 2**17, 2**17, 1),
                                   (1, 1, 2**60, 1), (2**20, 2**20, 2**19, 1), (1, 1, 2**52, 256)])
def test_extents_whose_product_overflows(shape):
    x = broadcast(*shape)
    with pytest.raises(ValueError, match=r"attend\(\): q has shape \[.*\], whose size does not fit 52 bits"):
        attend(x, x, x)


def test_a_product_at_the_limit_is_refused_by_the_allocator():
    """2^46 queries fit the rule and no machine: the result cannot be made."""
    q = broadcast(1, 1, 2**46, 1)
    with pytest.raises(MemoryError):
        attend(q, X[..., :1], X[..., :1])


@pytest.mark.parametrize("stride", [2**62, -(2**62), -(2**63)])
@pytest.mark.parametrize("shape", [(3, 1, 1, 8), (3, 1, 0, 8)])
def test_strides_that_reach_too_far(stride, shape):
    """An empty array is never read, but offsets into it are computed."""
    x = strided(shape, (stride, 32, 32, 4))
    with pytest.raises(ValueError, match=r"attend\(\): the strides of q do not fit 56 bits"):
        attend(x, x, x)


@pytest.mark.parametrize("numbers", [(2**51, 1, 1), (2**20, 2**20, 2**20), (2**62, 2**62, 2**62)])
def test_a_cache_of_impossible_size(numbers):
    batch, heads, depth = numbers
    with pytest.raises((ValueError, MemoryError), match=r"does not fit 52 bits|head_dim is|out of memory"):
        SinkCache(batch, heads, depth, window=1)
    with pytest.raises(ValueError, match="does not fit 52 bits"):
        SinkCache(batch, heads, 8, window=2**48)


def test_merge_of_more_than_there_is():
    with pytest.raises(MemoryError):
        merge([broadcast(2**40, 2**8, 2)], [broadcast(2**40, 2**8)])


def test_auxiliary_arrays_of_impossible_size():
    with pytest.raises(MemoryError):
        attend(X, X, X, sink_logits=broadcast(2**40, 2**20))
