"""The cache that keeps everything: what the others are measured against."""

import numpy as np

from sinkattn.functional import attend
from sinkattn.reference import rotate

FIRST_ROOM = 64


class FullCache:
    """Causal attention over all tokens so far, in float32 buffers that grow with the stream.

    batch, kv_heads, head_dim, v_head_dim : int, as for `SinkCache`.
    rope : Rope or None; unless rope.applied, q and k arrive raw and are turned to their position in
        the text.

    >>> import numpy as np
    >>> cache = FullCache(1, 2, 16)
    >>> x = np.ones((1, 2, 20, 16), np.float32)
    >>> cache.attend(x, x, x).shape, len(cache.kept()[0])
    ((1, 2, 20, 16), 20)
    """

    def __init__(self, batch, kv_heads, head_dim, *, v_head_dim=None, rope=None):
        self._keys = np.zeros((batch, kv_heads, 0, head_dim), np.float32)
        self._values = np.zeros((batch, kv_heads, 0, v_head_dim or head_dim), np.float32)
        self._rope, self.seen = rope, 0

    @property
    def nbytes(self):
        """Bytes of the keys and values that are held; grows."""
        per_token = (self._keys.shape[-1] + self._values.shape[-1]) * 4
        return self.seen * per_token * self._keys.shape[0] * self._keys.shape[1]

    @property
    def length(self):
        """Tokens seen, int64 [batch]."""
        return np.full(self._keys.shape[0], self.seen)

    def kept(self):
        """All positions, per row."""
        return [np.arange(self.seen) for _ in range(self._keys.shape[0])]

    def append(self, k, v):
        """Holds further tokens: k [batch, kv_heads, tokens, head_dim], v [..., v_head_dim]."""
        begin, end = self.seen, self.seen + k.shape[2]
        if end > self._keys.shape[2]:
            room = max(2 * self._keys.shape[2], end, FIRST_ROOM) - self._keys.shape[2]
            spare = [(0, 0), (0, 0), (0, room), (0, 0)]
            self._keys, self._values = np.pad(self._keys, spare), np.pad(self._values, spare)
        self._keys[:, :, begin:end] = self._turned(k, begin)
        self._values[:, :, begin:end] = v
        self.seen = end

    def look(self, q, position, **options):
        """Attention of q [batch, heads_q, queries, head_dim], the first of them at `position`, over
        the keys up to each; options and results of `sinkattn.attend`."""
        end = position + q.shape[2]
        turned = np.asarray(self._turned(q, position), np.float32)
        return attend(turned, self._keys[:, :, :end], self._values[:, :, :end], **options)

    def attend(self, q, k, v, **options):
        """Appends a chunk and attends; q, k, v as for `SinkCache`; options those of
        `sinkattn.attend`. Mass, where asked for, is [batch, kv_heads, tokens so far]."""
        begin = self.seen
        self.append(k, v)
        return self.look(q, begin, **options)

    def copy(self):
        """A cache of its own with the same content."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._keys, twin._values = self._keys.copy(), self._values.copy()
        return twin

    def _turned(self, x, begin):
        if self._rope is None or self._rope.applied:
            return x
        return rotate(x, np.arange(begin, begin + x.shape[2]), self._rope)
