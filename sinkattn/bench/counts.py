"""Pairs, flops, bytes and percentages: plain arithmetic."""

import numpy as np


def visible_pairs(length, window=None, sinks=0):
    """(query, key) pairs of causal self-attention over `length` tokens."""
    seen = np.arange(1, length + 1, dtype=np.int64)
    if window is None:
        return int(seen.sum())
    return int((np.minimum(seen, window) + np.clip(seen - window, 0, sinks)).sum())


def attention_flops(pairs, heads_q, depth):
    """A multiply and an add for each element of both products; softmax is not counted."""
    return 4 * pairs * heads_q * depth


def backward_flops(pairs, heads_q, depth):
    """Five products, as many as weights need that are computed again from lse."""
    return 10 * pairs * heads_q * depth


def array_bytes(item_size, *shapes):
    """Bytes of arrays that are read or written once."""
    return item_size * sum(int(np.prod(shape)) for shape in shapes)


def percent(rate, peak):
    """None where there is no peak to compare with."""
    return None if not rate or not peak else 100.0 * rate / peak


def times_as_long(seconds, ours):
    return None if not seconds or not ours else seconds / ours


def roof(intensity, flops_peak, read_peak):
    """FLOP/s that a machine allows at an arithmetic intensity in FLOP/byte."""
    return min(flops_peak, intensity * read_peak)
