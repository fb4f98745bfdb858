"""What a cache has forgotten, as plain records."""

import json
from typing import NamedTuple

import numpy as np

_DEPARTURE = np.dtype([("position", "<i8"), ("length", "<i8"), ("mass", "<f8")])


class HeadLedger(NamedTuple):
    """One kv head of one row.

    `forgotten` are the positions that are gone, as intervals [begin, end) in ascending order:
    exact, always, since they are the gaps between those that are held. `departures` are the last
    evictions one by one, oldest first, as (position, tokens seen when it left, mass): as many as
    the cache's `log`; `evicted` says how many there were in all. Mass is the softmax weight that a
    token had received from all queries until it left; None where the cache did not track it.
    """

    seen: int
    kept: int
    evicted: int
    bytes: int                 # keys and values of the head's slots
    forgotten: list
    mass: float | None         # of all that left, together
    largest: float | None      # of one that left
    histogram: list            # 64 counts: bin i holds masses from 2**(i - 48) up to twice that
    departures: list


class Ledger(NamedTuple):
    """The ledger of a cache at one moment: heads[row][kv head], and the bytes of all of it."""

    nbytes: int
    heads: list

    def to_json(self):
        return json.dumps({"nbytes": self.nbytes,
                           "heads": [[head._asdict() for head in row] for row in self.heads]})

    @classmethod
    def from_json(cls, text):
        """What `to_json` wrote, equal to the original."""
        read = json.loads(text)
        return cls(read["nbytes"], [[_head(**head) for head in row] for row in read["heads"]])


def _head(*, forgotten, departures, **rest):
    return HeadLedger(forgotten=[tuple(pair) for pair in forgotten],
                      departures=[tuple(entry) for entry in departures], **rest)


def head_ledger(seen, positions, core, tracked):
    """From what the core keeps for a head: see _core.KVCache.ledger."""
    evicted, logged, mass, largest, histogram, log, size = core
    edges = np.concatenate([[-1], positions, [seen]])
    gaps = np.flatnonzero(np.diff(edges) > 1)
    entries = np.frombuffer(log, _DEPARTURE)
    if logged > len(entries) > 0:
        entries = np.roll(entries, -(logged % len(entries)))
    departures = [(position, length, mass if tracked else None)
                  for position, length, mass in entries[:logged].tolist()]
    return HeadLedger(seen, len(positions), evicted, size,
                      [(int(edges[i]) + 1, int(edges[i + 1])) for i in gaps],
                      mass if tracked else None, largest if tracked else None,
                      np.frombuffer(histogram, np.int64).tolist(), departures)
