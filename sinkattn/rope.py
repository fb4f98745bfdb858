"""Rotary positions."""

import math
import operator

import numpy as np


class Rope:
    """How a cache turns queries and keys to their positions.

    inv_freq : [rotated / 2] real numbers, used in float64: angle = position * inv_freq. The first
        `rotated` columns of a head are turned, the rest pass (partial rotation).
    interleaved : pairs are columns (0, 1), (2, 3), ...; else (i, rotated/2 + i).
    attention_scaling : multiplies cos and sin (YaRN).
    applied : q and k arrive already turned to their absolute position, as Hugging Face models
        pass them; attention_scaling is then in them.

    Method: Su et al., "RoFormer" (arXiv 2104.09864).
    """

    __slots__ = ("applied", "attention_scaling", "interleaved", "inv_freq")

    def __init__(self, inv_freq, *, interleaved=False, attention_scaling=1.0, applied=False):
        if hasattr(inv_freq, "detach"):
            if inv_freq.requires_grad:
                raise NotImplementedError("Rope(): inv_freq requires grad, and this version has no "
                                          "gradients: pass inv_freq.detach()")
            inv_freq = inv_freq.detach().cpu().double()
        freq = np.asarray(inv_freq)
        if freq.dtype == bool or freq.dtype.kind not in "fiuV":
            raise TypeError(f"Rope(): inv_freq has dtype {freq.dtype}, expected real numbers")
        freq = np.array(freq, dtype=np.float64)
        if freq.ndim != 1 or not 1 <= len(freq) <= 128:
            raise ValueError(f"Rope(): inv_freq has shape {list(freq.shape)}, expected [1 to 128]")
        if not np.isfinite(freq).all():
            raise ValueError("Rope(): inv_freq holds a number that is not finite")
        if isinstance(attention_scaling, bool):
            raise TypeError("Rope(): attention_scaling is bool, expected a number")
        scaling = float(attention_scaling)
        if not math.isfinite(scaling):
            raise ValueError(f"Rope(): attention_scaling is {scaling}, expected a finite number")
        freq.flags.writeable = False
        for name, value in (("inv_freq", freq), ("interleaved", bool(interleaved)),
                            ("attention_scaling", scaling), ("applied", bool(applied))):
            object.__setattr__(self, name, value)

    @classmethod
    def from_theta(cls, head_dim, theta=10000.0, **options):
        """The usual frequencies, theta ** (-2 i / head_dim) for head_dim / 2 pairs."""
        pairs = operator.index(head_dim) // 2
        return cls(float(theta) ** (-np.arange(pairs) / pairs), **options)

    def __setattr__(self, name, value):
        raise AttributeError("Rope is immutable")

    def __repr__(self):
        return (f"Rope(inv_freq=[{self.inv_freq[0]:g} .. {self.inv_freq[-1]:g}; "
                f"{len(self.inv_freq)}], interleaved={self.interleaved}, "
                f"attention_scaling={self.attention_scaling:g}, applied={self.applied})")

    def __reduce__(self):
        return _rebuild, (self.inv_freq, self.interleaved, self.attention_scaling, self.applied)


def _rebuild(inv_freq, interleaved, attention_scaling, applied):
    return Rope(inv_freq, interleaved=interleaved, attention_scaling=attention_scaling,
                applied=applied)
