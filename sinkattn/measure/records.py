"""What was measured, as plain records: dataclasses of numbers, lists and strings.

Every record has `to_json()` and the class method `from_json(text)`; those that are pictures have
`plot(path)`.
"""

import dataclasses
import json
import math
import types
import typing

import numpy as np

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
      2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
      2.052, 2.048, 2.045, 2.042)
_Z = 1.96


class _Record:
    def to_json(self, indent=1):
        """The record as JSON text; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=indent)

    @classmethod
    def from_json(cls, text):
        """The record that `to_json` wrote. ValueError names the field that does not fit."""
        return _from_plain(cls, json.loads(text), cls.__name__)

    def save(self, path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json() + "\n")


def _from_plain(kind, value, where):
    """A value that json read, as the annotated type `kind`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        return _from_plain(next(part for part in inner if part is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        names = {field.name for field in dataclasses.fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            got = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"from_json(): {where} is {got}, expected the fields {sorted(names)}")
        hints = typing.get_type_hints(kind)
        return kind(**{name: _from_plain(hints[name], value[name], f"{where}.{name}")
                       for name in names})
    if origin is list and isinstance(value, list):
        return [_from_plain(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _from_plain(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    expected = getattr(kind, "__name__", kind) if origin is None else origin.__name__
    raise ValueError(f"from_json(): {where} is {type(value).__name__}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class Estimate(_Record):
    """A mean with its 95 % interval over `count` independent rows."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values):
        """The mean of real numbers, with Student's interval; from one value alone it is that point,
        which says nothing."""
        values = np.asarray(values, np.float64).ravel()
        if values.size == 0:
            raise ValueError("Estimate.of(): values is empty, expected at least one")
        mean, half = float(values.mean()), 0.0
        if values.size > 1:
            times = _T[values.size - 2] if values.size - 2 < len(_T) else _Z + 2.5 / values.size
            half = times * float(values.std(ddof=1)) / math.sqrt(values.size)
        return cls(mean, mean - half, mean + half, int(values.size))

    @classmethod
    def of_shares(cls, values, each=1):
        """The mean of shares in 0 to 1, each of `each` trials, with Wilson's interval for the
        effective number of trials (as Korn and Graubard, 1998): what the spread of the shares
        says, from one trial a share (fully dependent) to `each`. Never of width zero."""
        values = np.asarray(values, np.float64).ravel()
        if values.size == 0 or not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("Estimate.of_shares(): values are expected to be in 0 to 1, "
                             "at least one")
        mean, n, z2 = float(values.mean()), float(values.size), _Z * _Z
        spread = float(values.var(ddof=1)) if values.size > 1 else 0.0
        if spread > 0:
            n *= min(max(mean * (1 - mean) / spread, 1.0), float(each))
        centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return cls(mean, min(mean, centre - half), max(mean, centre + half), values.size)

    def __format__(self, spec):
        """`f"{estimate:.2f}"` is the mean alone."""
        return format(self.mean, spec)


@dataclasses.dataclass(frozen=True)
class Attention(_Record):
    """What eviction took from attention, against full attention over the same keys.

    loss : weight on evicted keys; least : what the best set of the same size would have lost,
        chosen anew for each query; error : |out - full| / |full|; top : share of the `top_count`
        heaviest keys that were kept; sinks : weight of full attention on the first `sink_count`
        keys. Each a mean over layers, heads and the `queries` sampled queries of a row, with its
        interval over rows.
    *_by_head : [layers][heads], kv heads except for `error_by_head` (query heads).
    positions, loss_by_position : where the queries stood, and the loss there.
    """

    loss: Estimate
    least: Estimate
    error: Estimate
    top: Estimate
    sinks: Estimate
    loss_by_head: list[list[float]]
    error_by_head: list[list[float]]
    top_by_head: list[list[float]]
    sink_by_head: list[list[float]]
    positions: list[int]
    loss_by_position: list[float]
    queries: int
    top_count: int
    sink_count: int

    def plot(self, path=None):
        """Loss by position, and sink mass and loss by layer and head. Returns the figure, or writes
        it to `path`. ImportError without matplotlib."""
        from .plots import attention

        return attention(self, path)


@dataclasses.dataclass(frozen=True)
class RecallPoint(_Record):
    """Recall at one distance. accuracy : share of answer tokens that were the first choice; bits :
    -log2 of the probability of each, a mean. Both over rows."""

    distance: int
    accuracy: Estimate
    bits: Estimate


@dataclasses.dataclass(frozen=True)
class Recall(_Record):
    """Recall against distance.

    first : every plant asked as the first question after the text.
    second : another plant, asked after a first question was answered; distances count from there.
    alone : the same plants at the same distances with plain text in place of the first question.
    chance, chance_bits : of who knows the alphabet alone.
    """

    first: list[RecallPoint]
    second: list[RecallPoint]
    alone: list[RecallPoint]
    chance: float
    chance_bits: float

    def plot(self, path=None):
        """Accuracy against distance. Returns the figure, or writes it to `path`."""
        from .plots import recall

        return recall({"": self}, path)


@dataclasses.dataclass(frozen=True)
class TwoQuestions(_Record):
    """A cache that shrank with a question in sight, then met another one.

    first : the question it saw; second : another plant, asked afterwards; blind : that same plant
    at the same distance, where plain text stood in the question's place when the cache shrank.
    """

    first: Estimate
    second: Estimate
    blind: Estimate
    chance: float


@dataclasses.dataclass(frozen=True)
class Stream(_Record):
    """Prediction along a stream. bits : bits per token in each of `buckets` [first, end), over
    rows; tokens_per_second : all rows together; nbytes : of the reader after the last token."""

    buckets: list[list[int]]
    bits: list[Estimate]
    tokens_per_second: float
    nbytes: int

    @property
    def perplexity(self):
        """2 to the bits per token, a list over buckets."""
        return [2.0 ** bucket.mean for bucket in self.bits]

    def plot(self, path=None):
        """Bits per token by bucket. Returns the figure, or writes it to `path`."""
        from .plots import streams

        return streams({"": self}, path)


@dataclasses.dataclass(frozen=True)
class PolicyResult(_Record):
    """One policy of a `Comparison`; what was not measured is None.

    budget : tokens a kv head, None for all. nbytes : of the caches of one row, all layers, at the
    end of the trained length. near : streams of the trained length, before and after the budget is
    full; near_gap : bits after that, less those of sinks + window on the same rows. far : long
    streams, positions counted in slots; far_gap : the same in their last bucket.
    single_per_second : one row, one token at a time.
    """

    name: str
    budget: int | None
    nbytes: int
    near: Stream
    near_gap: Estimate | None
    attention: Attention
    recall: Recall
    questions: TwoQuestions | None
    far: Stream | None
    far_gap: Estimate | None
    single_per_second: float


@dataclasses.dataclass(frozen=True)
class Comparison(_Record):
    """Policies at equal bytes; what `python -m sinkattn measure` prints, plots and writes.
    left_out : those whose bookkeeping alone takes too much of the bytes."""

    settings: dict[str, int]
    text: str
    policies: list[PolicyResult]
    left_out: list[str]

    def plot(self, path=None):
        """Four panels: recall, second question, attention loss, bits. Returns the figure, or writes
        it to `path`."""
        from .plots import comparison

        return comparison(self, path)
