"""Interleaved repeats: every contestant once, then all again, so that a slow moment of the machine
falls on everybody."""

import math
import statistics
import time
from dataclasses import dataclass, field

# Seconds in which the threads of whoever ran before stop spinning; OpenBLAS takes a tenth of one.
SETTLE = {"NumPy": 0.15, "torch": 0.03, "sinkattn": 0.01}
REPEAT = 0.02       # seconds that a repeat should last at least
WARM_BELOW = 0.05   # calls shorter than this get an untimed one before each repeat
MOST_CALLS = 100_000


@dataclass
class Times:
    seconds: list = field(default_factory=list)  # per call, one entry a repeat
    calls: int = 1                               # in a repeat
    last: tuple = (0, None)                      # set of arguments and result of the last call

    @property
    def median(self):
        return statistics.median(self.seconds)

    @property
    def least(self):
        return min(self.seconds)


class Rotation:
    """Hands out sets of arguments one after the other, across contestants: with enough of them
    nothing that a call reads is still in a cache."""

    def __init__(self, count):
        self.count, self.turn = count, 0

    def take(self, calls):
        first, self.turn = self.turn, (self.turn + calls) % self.count
        return [(first + i) % self.count for i in range(calls)]


def run_calls(contestant, indices):
    """Seconds per call, and the last result."""
    call = contestant.call
    sets = contestant.sets
    batch = [sets[i] for i in indices]
    result = None
    begin = time.perf_counter()
    for arguments in batch:
        result = call(*arguments)
    return (time.perf_counter() - begin) / len(batch), result


def interleave(contestants, set_count, repeats, settle=True, repeat=REPEAT,
               between=None):
    """Times of each contestant, in order. between(): called once before each repeat."""
    rotation = Rotation(set_count)
    times = [Times() for _ in contestants]
    for one, timed in zip(contestants, times):
        run_calls(one, rotation.take(1))
        seconds, _ = run_calls(one, rotation.take(1))
        timed.calls = max(1, min(MOST_CALLS, math.ceil(repeat / max(seconds, 1e-9))))
    before = contestants[-1].who
    for _ in range(repeats):
        if between is not None:
            time.sleep(SETTLE[before] if settle else 0.0)
            between()
        for one, timed in zip(contestants, times):
            time.sleep(SETTLE[before] if settle else 0.0)
            before = one.who
            if not timed.seconds or timed.median < WARM_BELOW:
                run_calls(one, rotation.take(1))
            indices = rotation.take(timed.calls)
            seconds, result = run_calls(one, indices)
            timed.seconds.append(seconds)
            timed.last = (indices[-1], result)
    return times
