"""Bits per token along a stream."""

import time

import numpy as np

from .parts import at_least, bits_of, in_parts, read, token_rows
from .records import Estimate, Stream


def doublings(length, first):
    """[0, first), then doublings, up to `length`: a list of [begin, end]."""
    found, begin, end = [], 0, first
    while begin < length:
        found.append([begin, min(end, length)])
        begin, end = end, 2 * end
    return found


def bits(model, tokens, *, chunk=16, buckets=None, workers=None, progress=None):
    """How well a model predicts `tokens`, by position: bits per token, and perplexity.

    model : called with a number of rows, returns a `Reader`.
    tokens : int [rows, n + 1], the first of each row (a start token, say) is not predicted.
        Prediction i is of tokens[:, i + 1]. The rows are the independent samples of the intervals.
    chunk : int, tokens in one call of the reader; caches that evict between calls hold so many
        more within one. buckets : list of [begin, end) over the n predictions; default [0, 512) and
        doublings.
    workers, progress : as the demo's, optional.
    Returns a `Stream`.
    """
    tokens = token_rows("bits()", tokens, 2)
    chunk, length = at_least("bits(): chunk", chunk, 1), tokens.shape[1] - 1
    buckets = doublings(length, 512) if buckets is None else [list(pair) for pair in buckets]
    for begin, end in buckets:
        if not 0 <= begin < end <= length:
            raise ValueError(
                f"bits(): buckets has [{begin}, {end}], expected a part of 0 to {length}")
    cost, seconds, readers = stream_costs(model, tokens, chunk, workers, progress)
    return summarise(cost, buckets, seconds, readers)


def stream_costs(model, tokens, chunk, workers=None, progress=None):
    """(bits float64 [rows, n], seconds, the readers of the parts)."""

    def run(part):
        reader = model(part.stop - part.start)
        costs = []
        for begin in range(0, tokens.shape[1] - 1, chunk):
            piece = tokens[part, begin:begin + chunk + 1]
            logits = read(reader, piece[:, :-1], None, progress)
            costs.append(bits_of(logits, piece[:, 1:]))
        return np.concatenate(costs, axis=1), reader

    begun = time.perf_counter()
    costs, readers = zip(*in_parts(workers, len(tokens), run))
    return np.concatenate(costs), time.perf_counter() - begun, list(readers)


def summarise(cost, buckets, seconds, readers):
    """`Stream` of costs [rows, n]."""
    return Stream(
        buckets=buckets,
        bits=[Estimate.of(cost[:, begin:end].mean(axis=1)) for begin, end in buckets],
        tokens_per_second=cost.size / seconds,
        nbytes=int(sum(getattr(reader, "nbytes", 0) for reader in readers)),
    )
