"""Four ways to read a long text with a model that was trained on short ones.

dense                  every key since the start, in a buffer that grows with the text
window                 a ring of the last W tokens, nothing pinned
sinks + window         S pinned tokens and a ring of the last W - S
window, re-computed    no cache: each byte afresh from BOS and the W - 1 bytes before it

W counts slots, so the two caches hold the same number of tokens. Each of these classes is an
`attention` of `model.Model.forward` and takes its own path; none is a mask over dense attention.

Method of the third: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
arXiv 2309.17453, which also describes re-computation as the baseline to meet.
"""

import numpy as np

from sinkattn import Rope, SinkCache, attend

from .model import BOS, bits


def rotate(x, positions, inverse_frequencies):
    """x [rows, heads, length, depth] turned to `positions` ([length] or [rows, length]); angles in
    float64, halves paired."""
    angle = np.asarray(positions, dtype=np.float64)[..., None] * inverse_frequencies
    angle = angle[:, None] if angle.ndim == 3 else angle
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    half = x.shape[-1] // 2
    turned = np.empty(x.shape, dtype=np.float32)
    first, second = x[..., :half], x[..., half:]
    np.multiply(first, cosine, out=turned[..., :half])
    turned[..., :half] -= second * sine
    np.multiply(second, cosine, out=turned[..., half:])
    turned[..., half:] += first * sine
    return turned


class Dense:
    """Causal attention over all keys so far, held in a buffer for `length` tokens."""

    def __init__(self, config, rows, length):
        shape = (config.layers, rows, config.heads_kv, length, config.head_depth)
        self.keys = np.zeros(shape, dtype=np.float32)
        self.values = np.zeros(shape, dtype=np.float32)
        self.frequencies = config.inverse_frequencies()
        self.seen = [0] * config.layers

    @property
    def nbytes(self):
        return self.keys.nbytes + self.values.nbytes

    def __call__(self, layer, q, k, v, at=None, *, return_mass=False):
        begin, end = self.seen[layer], self.seen[layer] + q.shape[2]
        self.seen[layer] = end
        positions = np.arange(begin, end)
        self.keys[layer, :, :, begin:end] = rotate(k, positions, self.frequencies)
        self.values[layer, :, :, begin:end] = v
        return attend(
            rotate(q, positions, self.frequencies),
            self.keys[layer, :, :, :end], self.values[layer, :, :, :end],
            return_mass=return_mass,
        )

    def first_row(self, room):
        """The state of row 0 alone, with room for more tokens."""
        twin = object.__new__(Dense)
        twin.frequencies, twin.seen = self.frequencies, list(self.seen)
        spare = [(0, 0)] * 3 + [(0, room), (0, 0)]
        twin.keys, twin.values = (np.pad(a[:, :1], spare) for a in (self.keys, self.values))
        return twin


class Streaming:
    """One `SinkCache` per layer: `sinks` pinned tokens and a ring of `slots - sinks`."""

    def __init__(self, config, rows, sinks, slots):
        rope = Rope(config.inverse_frequencies(), applied=False)
        self.caches = [
            SinkCache(
                rows, config.heads_kv, config.head_depth, sinks=sinks, window=slots - sinks,
                rope=rope, positions="slot",
            )
            for _ in range(config.layers)
        ]

    @property
    def nbytes(self):
        return sum(cache.nbytes for cache in self.caches)

    def __call__(self, layer, q, k, v, at=None, *, return_mass=False):
        return self.caches[layer].attend(q, k, v, return_mass=return_mass)


class Recomputed:
    """No memory between calls: attention inside the sequences that are given, from position 0."""

    nbytes = 0

    def __init__(self, config):
        self.frequencies = config.inverse_frequencies()

    def __call__(self, layer, q, k, v, at=None):
        positions = np.arange(k.shape[2])
        keys = rotate(k, positions, self.frequencies)
        if at is None:
            return attend(rotate(q, positions, self.frequencies), keys, v)
        return attend(rotate(q, at[:, None], self.frequencies), keys, v, lengths=at + 1)


class FirstTokenMass:
    """Wraps `Dense` or `Streaming` and measures the share of attention that token 0 receives.

    shares : list per layer, a mean over rows, heads and queries of the latest call.
    """

    def __init__(self, attention, layers):
        self.attention, self.shares = attention, [0.0] * layers

    def __call__(self, layer, q, k, v, at=None):
        out, mass = self.attention(layer, q, k, v, at, return_mass=True)
        queries = mass.shape[0] * mass.shape[1] * q.shape[2]
        self.shares[layer] = float(mass[:, :, 0].sum(dtype=np.float64)) / queries
        return out


def with_bos(text):
    """Inputs that predict text [rows, length]: BOS, then all but the last byte."""
    begin = np.full((text.shape[0], 1), BOS, dtype=np.int16)
    return np.concatenate([begin, text[:, :-1]], axis=1, dtype=np.int16)


def stream(model, attention, text, chunk=None, progress=None):
    """Reads text uint8 [rows, length] chunk by chunk; -> bits per byte float32 [rows, length].

    Byte t is predicted at position t, from BOS and the t bytes before it, as far as they are held.
    """
    inputs = with_bos(text)
    cost = np.full(text.shape, np.nan, dtype=np.float32)
    chunk = chunk or max(1024 // text.shape[0], 1)
    for begin in range(0, text.shape[1], chunk):
        part = slice(begin, begin + chunk)
        targets = text[:, part].astype(np.int64)
        cost[:, part] = bits(model.forward(inputs[:, part], attention), targets)
        if progress:
            progress.advance(targets.size)
    return cost


def stream_rows(model, make_attention, text, workers, progress=None):
    """`stream` with the rows shared out; make_attention(rows) gives each part its own state.

    Returns (bits per byte float32 [rows, length], list of the attentions).
    """

    def read(part):
        attention = make_attention(part.stop - part.start)
        return stream(model, attention, text[part], progress=progress), attention

    costs, attentions = zip(*workers.map(read, workers.split(len(text))), strict=True)
    return np.concatenate(costs), list(attentions)


def recompute(model, text, rows, positions, slots, workers, batch=4, progress=None):
    """Bits of bytes text[rows, positions], each from a fresh pass over BOS and the slots - 1 bytes
    before it; -> float32 [number of positions]."""
    attention = Recomputed(model.config)

    def predict(first):
        row, position = rows[first : first + batch], positions[first : first + batch]
        at = np.minimum(position, slots - 1)
        before = (position - at)[:, None] + np.arange(slots - 1)
        inputs = np.empty((len(row), slots), dtype=np.int16)
        inputs[:, 0] = BOS
        inputs[:, 1:] = text[row[:, None], np.minimum(before, text.shape[1] - 1)]
        logits = model.forward(inputs, attention, at)
        if progress:
            progress.advance(inputs.size)
        return bits(logits[:, 0], text[row, position].astype(np.int64))

    return np.concatenate(workers.map(predict, range(0, len(positions), batch)))
