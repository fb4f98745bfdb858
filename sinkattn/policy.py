"""Eviction policies: what a KVCache lets go when it is full.

A policy is a rule and its numbers, nothing more: what it remembers of each token lies in the cache
and moves with the token. Every score is of one kv head; the lowest leave, ties go to the newer. In
the formulas a_ij is the softmax weight that key j received from query i, mean over the query heads
of the group; |k|, |v| are Euclidean lengths of the stored key and value; t is the number of tokens
seen. `KVCache` never lets go of its first `sinks` and its last `recent` tokens, whatever they
score. What each keeps and forgets, in words: docs/policies.md.
"""

import numbers

from sinkattn.cache import integer

__all__ = ["CUR", "H2O", "H2OEMA", "TOVA", "Custom", "ExpectedAttention", "H2ONorm", "KNorm",
           "KeyDiff", "Policy", "Random", "Scissorhands", "SinkWindow", "SnapKV", "VLengthH2O"]


def number(name, value, owner):
    """A real number as a float; bool is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}(): {name} is {type(value).__name__}, expected a number")
    return float(value)


class Policy:
    """What all policies are: immutable, compared by class and numbers."""

    __slots__ = ()
    _numbers = ()          # names of what __init__ took
    _needs_mass = True

    def _set(self, **values):
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name, value):
        raise AttributeError(f"{type(self).__name__} is immutable")

    def _values(self):
        return tuple(getattr(self, name) for name in self._numbers)

    def __eq__(self, other):
        return type(self) is type(other) and self._values() == other._values()

    def __hash__(self):
        return hash((type(self), self._values()))

    def __repr__(self):
        said = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._numbers)
        return f"{type(self).__name__}({said})"

    def __reduce__(self):
        return type(self), self._values()

    @property
    def protects(self):
        """Tokens at the end that the rule itself never lets go."""
        return 0

    def _described(self):
        """(name, window, kernel, maximum, decay, seed), as the core wants it."""
        return type(self).__name__, 0, 0, False, 0.0, 0


class SinkWindow(Policy):
    """The first `sinks` tokens and the newest: no score at all.

    What StreamingLLM keeps; `SinkCache` does the same faster, with the exact window of every query.
    Needs nothing of the attention pass. Source: Xiao et al., arXiv 2309.17453.
    """

    _needs_mass = False


class H2O(Policy):
    """s_j = sum over all queries so far of a_ij: the heavy hitters.

    Old tokens had more queries to collect from, so the rule favours them. Source: Zhang et al.,
    "H2O: Heavy-Hitter Oracle", arXiv 2306.14048.
    """


class H2ONorm(Policy):
    """s_j = (sum over all queries so far of a_ij) / (queries that could see j, its own included).

    H2O without its favour for the old. Source: the mean that NVIDIA kvpress (ObservedAttention) and
    OpenVINO (NORM_SUM) take of H2O's sum.
    """


class H2OEMA(Policy):
    """s_j <- lam * s_j + a_ij for each query i: a sum that forgets.

    lam : float, 0 to 1. The weight of a query is halved every log(2) / -log(lam) queries: 69 for
    0.99. lam=1 is H2O, lam=0 the newest query alone. Source: H2O, arXiv 2306.14048, decayed.
    """

    __slots__ = _numbers = ("lam",)

    def __init__(self, lam=0.99):
        self._set(lam=number("lam", lam, "H2OEMA"))

    def _described(self):
        return "H2OEMA", 0, 0, False, self.lam, 0


class VLengthH2O(Policy):
    """s_j = sum over all queries so far of a_ij |v_j| / (the sum of a_ij' |v_j'| over all j').

    H2O by how much of each output came from a key, not by weight alone: a sink with a large weight
    and a short value counts for little. Source: awslabs keys_values, "v-length" H2O.
    """


class Scissorhands(Policy):
    """s_j = how many of the last `w` queries i gave it more than its share: a_ij >= 1 / n_i.

    n_i is the number of tokens that query i saw. w : int, 1 to 4096. Source: Liu et al.,
    "Scissorhands", arXiv 2305.17118.
    """

    __slots__ = _numbers = ("w",)

    def __init__(self, w=256):
        self._set(w=integer("w", w, "Scissorhands"))

    def _described(self):
        return "Scissorhands", self.w, 0, False, 0.0, 0


class TOVA(Policy):
    """s_j = a_tj of the newest query, mean over all heads: one set for all heads of a layer.

    Source: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104 (which protects no
    recent tokens: recent=0).
    """


class SnapKV(Policy):
    """s_j = pool over `kernel` neighbours of (mean of a_ij over the last `w` queries).

    w : int, queries of the window; the last w tokens stay. kernel : odd int. pool : "avg", in which
    neighbours that are not there count 0, or "max". Neighbours are those held, in order of
    position. Every query counts with the weights that it gave when it came; a key that came later
    has none of it. Source: Li et al., arXiv 2404.14469, where it runs once, at the end of a prompt.
    """

    __slots__ = _numbers = ("w", "kernel", "pool")

    def __init__(self, w=32, kernel=5, pool="avg"):
        if pool not in ("avg", "max"):
            raise ValueError(f"SnapKV(): pool is {pool!r}, expected 'avg' or 'max'")
        self._set(w=integer("w", w, "SnapKV"), kernel=integer("kernel", kernel, "SnapKV"),
                  pool=pool)

    @property
    def protects(self):
        return self.w

    def _described(self):
        return "SnapKV", self.w, self.kernel, self.pool == "max", 0.0, 0


class KeyDiff(Policy):
    """s_j = -cos(k_j, mean over the tokens held of k / |k|): keys unlike the others stay.

    Judged by keys alone, as they are stored (turned, with a rope). Reads all keys at each eviction:
    `every` spreads the cost. Source: Park et al., "KeyDiff", arXiv 2504.15364.
    """

    _needs_mass = False


class KNorm(Policy):
    """s_j = -|k_j|: short keys stay.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arXiv 2406.11430.
    """

    _needs_mass = False


class CUR(Policy):
    """s_j = |k_j|^2 / (sum over its window of |k|^2) * |v_j|^2 / (sum over its window of |v|^2).

    Windows are `win` neighbours among the tokens held, in order of position, counted from the
    first. Source: CurDKV, in the form of NVIDIA kvpress (CURPress).
    """

    __slots__ = _numbers = ("win",)
    _needs_mass = False

    def __init__(self, win=16):
        self._set(win=integer("win", win, "CUR"))

    def _described(self):
        return "CUR", self.win, 0, False, 0.0, 0


class ExpectedAttention(Policy):
    """s_j = softmax_j(mu.k_j / sqrt(d) + k_j' S k_j / 2d) |v_j|: what queries to come will give.

    If they are drawn like those that came, and normal: the bracket is then the log of a mean
    weight. mu and S are mean and covariance of all queries so far of the group's heads together,
    each as if it stood at position 0 (those of the pinned tokens are left out), turned by the mean
    turn over the next `n_future` positions. With `scale`, that in place of 1 / sqrt(d); a softcap
    is not in it. Costs n d^2 at each eviction: use `every`. A rope needs positions="original".
    Source: Devoto et al., "Expected Attention", arXiv 2510.00636, where every query head has a mean
    of its own.
    """

    __slots__ = _numbers = ("n_future",)
    _needs_mass = False

    def __init__(self, n_future=512):
        self._set(n_future=integer("n_future", n_future, "ExpectedAttention"))

    def _described(self):
        return "ExpectedAttention", self.n_future, 0, False, 0.0, 0


class Random(Policy):
    """s_j drawn once for each seed, row, kv head and position (splitmix64): the control.

    A rule that does not beat it has learned nothing from its signal.
    """

    __slots__ = _numbers = ("seed",)
    _needs_mass = False

    def __init__(self, seed=0):
        self._set(seed=integer("seed", seed, "Random"))

    def _described(self):
        return "Random", 0, 0, False, 0.0, self.seed % 2**64


class Custom(Policy):
    """s_j from a function of yours: for research, and as a control.

    fn(row, head, positions, mass, keys, values) -> scores [n], called for each row and kv head
    after the attention of each part of a call, on the calling thread, with NumPy arrays of its own:

    positions : int64 [n], ascending: the tokens held and the new ones.
    mass : float32 [new, n], a_ij of each new query; keys, values : float32 [n, head_dim] and
        [n, v_head_dim] as they are stored.

    What it wants to remember of a token it keeps by position. NaN is refused; an exception ends the
    call and leaves the cache as it was. It must not use the cache that calls it.
    """

    __slots__ = _numbers = ("fn",)

    def __init__(self, fn):
        if not callable(fn):
            raise TypeError(f"Custom(): fn is {type(fn).__name__}, expected a function")
        self._set(fn=fn)

    def __repr__(self):
        return f"Custom({getattr(self.fn, '__name__', type(self.fn).__name__)})"
