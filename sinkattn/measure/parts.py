"""What the measurements share: rows in parts, reading in pieces, bits."""

import numpy as np


def in_parts(workers, rows, function):
    """[function(slice)] over slices that share `rows` out; workers : None, or an object with map
    and split, as the demo's `Workers`."""
    if workers is None:
        return [function(slice(0, rows))]
    return workers.map(function, workers.split(rows))


def read(reader, tokens, chunk, progress=None):
    """Tokens [rows, n] in pieces of `chunk` (None: in one) -> logits [rows, n, vocabulary]."""
    pieces = []
    for begin in range(0, tokens.shape[1], chunk or max(tokens.shape[1], 1)):
        piece = tokens[:, begin:begin + chunk] if chunk else tokens
        pieces.append(np.asarray(reader.read(piece)))
        if pieces[-1].shape[:2] != piece.shape:
            raise ValueError(f"read(): the model returned logits of shape "
                             f"{list(pieces[-1].shape)}, expected {list(piece.shape)} and a "
                             "vocabulary")
        if progress is not None:
            progress.advance(piece.size)
    return np.concatenate(pieces, axis=1)


def bits_of(logits, targets):
    """-log2 of the probability of each target: [..., vocabulary], int [...] -> float64 [...]."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, np.asarray(targets, np.int64)[..., None], axis=-1)[..., 0]
    return (total - chosen) / np.log(2)


def token_rows(name, tokens, least):
    """tokens as int64 [rows, n]; TypeError or ValueError that names the argument."""
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"{name}: tokens have dtype {tokens.dtype}, expected integers")
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < least:
        raise ValueError(f"{name}: tokens have shape {list(tokens.shape)}, expected [rows, "
                         f"{least} or more]")
    return tokens.astype(np.int64)


def at_least(name, value, least):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {type(value).__name__}, expected an int")
    if value < least:
        raise ValueError(f"{name} is {value}, expected {least} or more")
    return int(value)
