"""SinkCache: a stream in bounded memory."""

import operator
import sys

import numpy as np

from sinkattn import _core
from sinkattn.rope import Rope

_STATE_VERSION = 1
_DTYPES = ("float32", "float16", "bfloat16")


def dtype_name(dtype, owner):
    """"float32", "float16" or "bfloat16" for the name or the dtype object of a library."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    name = name.removeprefix("torch.")
    if name not in _DTYPES:
        raise TypeError(f"{owner}(): dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    return name


def integer(name, value, owner):
    """An int of 64 bits; bool is none."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{owner}(): {name} is bool, expected an int")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}(): {name} is {type(value).__name__}, expected an int") from None
    if not -2**63 <= number < 2**63:
        raise ValueError(f"{owner}(): {name} does not fit 64 bits")
    return number


def cuda_ordinal(device, owner):
    """The number of a CUDA device, None for the CPU."""
    kind, _, number = str(device).partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda" or not (number.isdecimal() or str(device) == "cuda"):
        raise NotImplementedError(
            f"{owner}(): device is {device!s}; the backends are: cpu, cuda (cuda:0, ...)")
    if number:
        return int(number)
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch and torch.cuda.is_available() else 0


def cuda_memory(size, ordinal):
    """From torch's allocator; None, which asks the driver, where there is no torch."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.empty(size, dtype=torch.uint8, device=f"cuda:{ordinal}")


def core_of(config, ordinal, storage, keep=False):
    """The cache of the core, on a CUDA device or (None) the CPU, in `storage` or in memory of its
    own. keep: what another cache of the same configuration left in the storage counts."""
    if ordinal is None:
        return _core.Cache(*config, storage, keep)
    return _core.CudaCache(
        *config, ordinal, lambda size, first: storage if first and storage is not None
        else cuda_memory(size, ordinal), keep)


class CoreCache:
    """What the caches share: rows, copies, and that none is pickled. `_core` does the work."""

    _name = ""  # in messages

    def reset(self, rows=None):
        """Empties rows (indices or a bool mask [batch]); all of them by default. Their ledgers
        too, where a cache has them.
        """
        self._core.reset(row_mask(rows, self._numbers["batch"]))

    def reorder(self, index):
        """Row i becomes what row index[i] was: int [batch], repeats allowed (beams)."""
        self._core.reorder(index)

    def copy(self):
        """A cache of its own with the same content."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _core=self._core.copy())
        return twin

    __copy__ = copy

    def __deepcopy__(self, memo):
        return self.copy()

    def __reduce__(self):
        raise TypeError(f"{self._name} is not pickled: save state_dict(), which is NumPy arrays, "
                        "and load_state_dict() it into a new cache")


class SinkCache(CoreCache):
    """Pinned sink tokens and a ring of the last `window` tokens, attended in place.

    batch, kv_heads, head_dim, v_head_dim : int. v_head_dim defaults to head_dim.
    sinks : int >= 0, tokens at the start of the stream that stay for ever.
    window : int >= 1, the token itself included: position t sees {j < sinks} and
        {t - window < j <= t}.
    dtype : "float32", "float16" or "bfloat16" (or the dtype object), of all that is passed in.
    device : "cpu", "cuda" or "cuda:1". On CUDA the lengths live on the device, so that a captured
        call replays; reading `length` or `kept()`, `crop` and `state_dict` wait for the stream.
    storage : array that the cache shall live in: `nbytes`, 8 for each frequency of the rope, 68 for
        each row and kv head, and 2 KiB. It is emptied. Default: memory of its own; on CUDA from
        torch's allocator if torch is imported, else from the driver.
    rope : Rope or None. applied=False: q and k arrive raw and the cache turns them, with angles
        in float64; applied=True: they arrive turned to their absolute position.
    positions : "slot" counts distances to the pinned tokens in slots of the cache, as StreamingLLM
        does, so that no distance grows past sinks + window - 1; "original" keeps distances in the
        text. The pinned keys are then scored with a second, turned query; no key is ever re-turned.
    rollback : int >= 0, spare slots: the last so many tokens can be undone with `crop`.

    Memory is constant from construction (`nbytes`). Each row has a length and a phase of its own.
    A failed call leaves the cache as it was. Use one cache from one thread at a time.

    Method: Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
    (arXiv 2309.17453). What has left the window is forgotten.

    >>> import numpy as np
    >>> cache = SinkCache(1, 2, 16, sinks=2, window=6)
    >>> x = np.ones((1, 2, 20, 16), np.float32)
    >>> cache.attend(x, x, x).shape, cache.kept()[0].tolist()
    ((1, 2, 20, 16), [0, 1, 14, 15, 16, 17, 18, 19])
    """

    _name = "SinkCache"

    def __init__(self, batch, kv_heads, head_dim, *, v_head_dim=None, sinks=4, window=1020,
                 dtype="float32", device="cpu", rope=None, positions="slot", rollback=0,
                 storage=None):
        self._ordinal = cuda_ordinal(device, "SinkCache")
        if positions not in ("slot", "original"):
            raise ValueError(
                f"SinkCache(): positions is {positions!r}, expected 'slot' or 'original'")
        if rope is not None and not isinstance(rope, Rope):
            raise TypeError(
                f"SinkCache(): rope is {type(rope).__name__}, expected a Rope or None")
        numbers = {"batch": batch, "kv_heads": kv_heads, "head_dim": head_dim,
                   "v_head_dim": head_dim if v_head_dim is None else v_head_dim,
                   "sinks": sinks, "window": window, "rollback": rollback}
        self._numbers = {name: integer(name, value, "SinkCache")
                         for name, value in numbers.items()}
        self._dtype, self._rope, self._positions = dtype_name(dtype, "SinkCache"), rope, positions
        self._core = core_of(self._config(), self._ordinal, storage)

    def _config(self):
        """As the core takes it."""
        rope = self._rope
        inv_freq = b"" if rope is None else rope.inv_freq.tobytes()
        return (*self._numbers.values(), self._dtype, inv_freq,
                1.0 if rope is None else rope.attention_scaling,
                rope is not None and rope.interleaved, rope is not None and rope.applied,
                self._positions == "slot")

    def _storage_bytes(self, batch):
        """What `storage` must hold for so many rows."""
        n = self._numbers
        slots = n["sinks"] + n["window"] + n["rollback"]
        row = slots * (n["head_dim"] + n["v_head_dim"]) * (4 if self._dtype == "float32" else 2)
        pairs = 0 if self._rope is None else len(self._rope.inv_freq)
        return batch * (n["kv_heads"] * (row + 68) + 16) + 8 * pairs + 2048

    def attend(self, q, k, v, *, new_lengths=None, sink_logits=None, sink_bias=None, sink_kv=None,
               scale=None, softcap=None, alibi_slopes=None, out=None, return_lse=False,
               return_mass=False):
        """Appends a chunk, evicts what leaves the window, attends: one call.

        q : [batch, heads_q, tokens, head_dim]; k, v : [batch, kv_heads, tokens, head_dim] and
            [..., v_head_dim], dtype of the cache. Causal inside the chunk; any number of tokens,
            and the result does not depend (beyond rounding) on how the stream is cut.
        new_lengths : int [batch], the first so many tokens of a row are real; the rest of its
            output is 0.
        The other arguments are those of `sinkattn.attend`.

        Returns out [batch, heads_q, tokens, v_head_dim], of the kind and dtype of q; with
        return_lse also lse; with return_mass also mass [batch, kv_heads, sinks + window +
        rollback] float32 for the tokens held after the call, in the order of `kept()`, zero beyond.
        """
        return self._core.attend(q, k, v, new_lengths, sink_logits, sink_bias, sink_kv, scale,
                                 softcap, alibi_slopes, out, return_lse, return_mass)

    @property
    def length(self):
        """Tokens seen, int64 [batch]."""
        return np.frombuffer(self._core.lengths, np.int64).copy()

    @property
    def nbytes(self):
        """Bytes of keys, values and counters; constant."""
        return self._core.nbytes

    def kept(self):
        """The positions held, per row, ascending: a list of int64 arrays."""
        lows = np.frombuffer(self._core.lows, np.int64)
        pinned = np.minimum(self.length, self._numbers["sinks"])
        return [np.concatenate([np.arange(p), np.arange(low, max(low, t))])
                for p, low, t in zip(pinned, lows, self.length)]

    def crop(self, n):
        """Forgets all but the first n tokens of every row.

        ValueError unless everything that token n would see is still held; `rollback` at
        construction keeps the last so many tokens undoable.
        """
        self._core.crop(n)

    def _described(self):
        """The construction as NumPy scalars: what a state must have in common with a cache."""
        return {
            "version": np.int64(_STATE_VERSION),
            **{name: np.int64(value) for name, value in self._numbers.items()},
            "dtype": np.str_(self._dtype),
            "positions": np.str_(self._positions),
            **describe_rope(self._rope),
        }

    def _stored(self):
        """Shape and dtype of each stored array."""
        n = self._numbers
        slots = n["sinks"] + n["window"] + n["rollback"]
        bits = np.float32 if self._dtype == "float32" else np.uint16
        return {"keys": ((n["batch"], n["kv_heads"], slots, n["head_dim"]), bits),
                "values": ((n["batch"], n["kv_heads"], slots, n["v_head_dim"]), bits),
                "length": ((n["batch"],), np.int64),
                "low": ((n["batch"],), np.int64)}

    def state_dict(self):
        """NumPy arrays and a version: fit for np.savez, no pickle. Half types are kept as their
        bits (uint16). `low` is the oldest position that the ring of a row holds."""
        state = self._described()
        for data, (name, (shape, dtype)) in zip(self._core.save(), self._stored().items()):
            state[name] = np.frombuffer(data, dtype).reshape(shape).copy()
        return state

    def load_state_dict(self, state):
        """Resumes what `state_dict` saved, in a cache constructed alike. Every field is checked;
        a refused state leaves the cache as it was."""
        check_described(state, self._described())
        stored = [field(state, name, shape, np.dtype(dtype))
                  for name, (shape, dtype) in self._stored().items()]
        self._core.load(*[np.ascontiguousarray(array).tobytes() for array in stored])

    def __repr__(self):
        n = self._numbers
        return (f"SinkCache(batch={n['batch']}, kv_heads={n['kv_heads']}, "
                f"head_dim={n['head_dim']}, sinks={n['sinks']}, window={n['window']}, "
                f"dtype={self._dtype}, positions={self._positions}, "
                f"device={'cpu' if self._ordinal is None else f'cuda:{self._ordinal}'}, "
                f"{self.nbytes} bytes)")


def row_mask(rows, batch):
    """Rows, as indices or a bool mask [batch], as the bytes of a mask; None for None."""
    if rows is None:
        return None
    rows = np.asarray(rows)
    mask = np.zeros(batch, bool)
    if rows.dtype == bool:
        if rows.shape != (batch,):
            raise ValueError(f"reset(): rows has shape {list(rows.shape)}, expected [{batch}]")
        mask[:] = rows
    elif rows.size == 0:
        pass
    elif rows.dtype.kind not in "iu":
        raise TypeError(f"reset(): rows has dtype {rows.dtype}, expected indices or a mask")
    elif ((rows < 0) | (rows >= batch)).any():
        raise ValueError(f"reset(): rows holds an index outside 0 to {batch - 1}")
    else:
        mask[rows] = True
    return mask.tobytes()


def describe_rope(rope):
    """The fields of a state that say how a cache turns."""
    return {
        "rope_inv_freq": np.empty(0) if rope is None else np.array(rope.inv_freq),
        "rope_interleaved": np.bool_(rope is not None and rope.interleaved),
        "rope_applied": np.bool_(rope is not None and rope.applied),
        "rope_attention_scaling": np.float64(1.0 if rope is None else rope.attention_scaling),
    }


def check_described(state, mine):
    """Does a state come from a cache that was constructed alike?"""
    arrays = {name: field(state, name, np.shape(value), np.asarray(value).dtype)
              for name, value in mine.items()}
    for name, value in mine.items():
        if not np.array_equal(arrays[name], value):
            raise ValueError(f"load_state_dict(): {name} is {arrays[name]}, expected {value}")


def field(state, name, shape, dtype):
    """An array of a state, of the shape and dtype that it must have."""
    try:
        array = state[name]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"load_state_dict(): {name} is missing") from None
    if not isinstance(array, (np.ndarray, np.generic)):
        raise TypeError(f"load_state_dict(): {name} is {type(array).__name__}, expected an array")
    array = np.asarray(array)
    same_dtype = array.dtype == dtype or (dtype.kind == "U" and array.dtype.kind == "U")
    if not same_dtype:
        raise TypeError(f"load_state_dict(): {name} has dtype {array.dtype}, expected {dtype}")
    if array.shape != shape:
        raise ValueError(
            f"load_state_dict(): {name} has shape {list(array.shape)}, expected {list(shape)}")
    return array
