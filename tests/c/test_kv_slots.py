"""The kernels that append to and evict from a KVCache's slots, run on the host against the plain
statement of each policy, fed the same mass: kept sets, guards, ledger."""

import ctypes
import platform
import shutil

import numpy as np
import pytest
from emulated import F64, I32, I64, POINTER, Numbers, Tensor, _fields, _numbers, _tensor
from statement import held_at, leaving, rule_of

from sinkattn.policy import (
    CUR,
    H2O,
    H2OEMA,
    TOVA,
    H2ONorm,
    KeyDiff,
    KNorm,
    Random,
    Scissorhands,
    SinkWindow,
    SnapKV,
    VLengthH2O,
)

pytestmark = [pytest.mark.native, pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="needs g++ on x86-64, whose fibers stand for threads")]
KINDS = ("SinkWindow", "H2O", "H2ONorm", "H2OEMA", "VLengthH2O", "Scissorhands", "TOVA", "SnapKV",
         "KeyDiff", "KNorm", "CUR", "ExpectedAttention", "Random")
POLICIES = [SinkWindow(), H2O(), H2ONorm(), H2OEMA(0.9), VLengthH2O(), Scissorhands(5),
            Scissorhands(70), TOVA(), SnapKV(w=6, kernel=3),
            SnapKV(w=4, kernel=5, pool="max"), KNorm(), KeyDiff(), CUR(win=5), Random(7)]
LEDGER = np.dtype([("evicted", "i8"), ("logged", "i8"), ("mass", "f8"), ("largest", "f8"),
                   ("histogram", "i8", 64)])
DEPARTURE = np.dtype([("position", "i8"), ("length", "i8"), ("mass", "f8")])


class Slots(ctypes.Structure):
    """sa_cuda_slots of csrc/cuda/kv_slots.h."""

    _fields_ = [*_fields(Tensor, "key value query"), ("new_lengths", Numbers), *_fields(I64, "first tokens"),
                *_fields(POINTER, "keys values positions mass call own rings held lengths evicted_at "
                                  "counts fresh ledgers log budgets inv_freq weights scratch turned lse "
                                  "lse_out mass_out"),
                *_fields(I64, "batch heads_kv group stride slots depth depth_v weight_rows ring_bytes "
                              "log_size lse_length pinned recent every window kernel pairs"),
                *_fields(F64, "decay scaling"), ("seed", ctypes.c_uint64),
                *_fields(I32, "kind dtype first_part keep_call waits maximum interleaved")]


class Cache:
    """The device's slots in host memory; memory that nobody has written holds NaN."""

    def __init__(self, batch, heads, depth, policy, *, budget, sinks, recent, every, chunk, log=64):
        streams, self.batch, self.heads = batch * heads, batch, heads
        stride = self.stride = budget + every - 1 + chunk
        _, window, kernel, maximum, decay, seed = policy._described()
        recent = max(recent, policy.protects)
        ring = 4 * window if isinstance(policy, SnapKV) else -(-window // 64) * 8
        self.arrays = {
            "keys": np.full((streams, stride, depth), np.nan, np.float32),
            "values": np.full((streams, stride, depth), np.nan, np.float32),
            "positions": np.full((streams, stride), -7), "mass": np.full((streams, stride), np.nan),
            "call": np.full((streams, stride), np.nan), "own": np.full((2, streams, stride), np.nan),
            "rings": np.full((streams, stride, ring), 255, np.uint8),
            "held": np.zeros(streams, int), "lengths": np.zeros(streams, int),
            "evicted_at": np.zeros(streams, int), "counts": np.zeros(streams, int),
            "fresh": np.zeros(batch, int),
            "ledgers": np.zeros(streams, LEDGER), "log": np.zeros((streams, log), DEPARTURE),
            "budgets": np.full(heads, budget), "scratch": np.zeros((streams, 4, stride), np.uint64)}
        self.slots = Slots(batch=batch, heads_kv=heads, stride=stride, depth=depth, depth_v=depth,
                           slots=budget + every - 1, ring_bytes=ring, log_size=log, pinned=sinks, recent=recent, every=every,
                           window=window, kernel=kernel, maximum=maximum, decay=decay, seed=seed,
                           kind=KINDS.index(type(policy).__name__), dtype=0, first_part=1,
                           keep_call=1)
        if every == 5:
            del self.arrays["scratch"]  # there is room in shared memory
        for name, array in self.arrays.items():
            setattr(self.slots, name, array.ctypes.data)

    def append(self, library, k, v, new):
        self.keep = k, v, new
        self.slots.key, self.slots.value = _tensor(k, (0, 1, 2)), _tensor(v, (0, 1, 2))
        self.slots.new_lengths, self.slots.tokens = _numbers(new), k.shape[2]
        library.run_kv_append(ctypes.byref(self.slots))

    def evict(self, library, weights):
        """weights: [streams, tokens, stride] by slot."""
        self.slots.weights, self.slots.weight_rows = weights.ctypes.data, weights.shape[1]
        library.run_kv_evict(ctypes.byref(self.slots))

    def positions(self, stream):
        return self.arrays["positions"][stream, :self.arrays["held"][stream]]


def few_bits(random, *shape):
    return random.integers(-2, 3, shape).astype(np.float32) / 2


def normal(random, *shape):
    return random.standard_normal(shape, np.float32)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("every", [1, 5])
def test_slots_keep_what_the_statement_keeps(library, policy, every):
    assert library.size_of_kv_slots() == ctypes.sizeof(Slots)
    random = np.random.default_rng([11, every])
    batch, heads, depth, chunk, bounds = 2, 2, 4, 9, {
        "budget": 24, "sinks": 2, "recent": max(5, policy.protects)}
    cache = Cache(batch, heads, depth, policy, every=every, chunk=chunk, **bounds)
    rules = [rule_of(policy, *divmod(stream, heads)) for stream in range(batch * heads)]
    held = [{} for _ in rules]  # position -> (key, value)
    gone, seen = [{} for _ in rules], np.zeros(len(rules), int)
    total = [{} for _ in rules]
    for step in range(24):
        tokens = int(random.choice([1, 1, 1, 2, 9]))
        draw = few_bits if step % 2 and not isinstance(policy, (KeyDiff, CUR)) else normal
        k, v = (draw(random, batch, heads, tokens, depth) for _ in range(2))
        new = random.integers(0, tokens + 1, batch) if step % 3 == 0 else np.full(batch, tokens)
        cache.append(library, k, v, new)
        # A mean of three that are a tie as fractions is none once rounded, in the core as here.
        own = normal if getattr(policy, "pool", None) == "avg" else draw
        weights = abs(own(random, len(rules), tokens, cache.stride)) / 8
        parts = []
        for stream, mine in enumerate(held):
            row, head = divmod(stream, heads)
            for i in range(new[row]):
                mine[int(seen[stream]) + i] = k[row, head, i], v[row, head, i]
            seen[stream] += new[row]
            where = cache.arrays["positions"][stream, :cache.arrays["counts"][stream]]
            order = np.argsort(where)
            assert where[order].tolist() == sorted(mine)
            assert all((cache.arrays["keys"][stream, slot] == mine[p][0]).all() for slot, p in zip(order, sorted(mine)))
            for i in range(new[row]):  # nobody gives weight to what came later
                weights[stream, i, :len(where)][where > seen[stream] - new[row] + i] = 0
            parts.append((where[order], order))
        for stream, (positions, order) in enumerate(parts):
            row, fresh, mine = stream // heads, int(new[stream // heads]), held[stream]
            mass = weights[stream, :fresh][:, order]
            for p, w in zip(positions.tolist(), mass.astype(np.float64).sum(axis=0)):
                total[stream][p] = total[stream].get(p, 0.0) + w
            if fresh == 0:
                continue
            judged = mass.astype(np.float64)
            if isinstance(policy, TOVA):
                judged = np.mean([weights[s, :fresh][:, order].astype(float)
                                  for s in range(row * heads, (row + 1) * heads)], axis=0)
            keys, values = (np.array([mine[p][n] for p in positions.tolist()]) for n in (0, 1))
            scores = rules[stream].scores(positions, judged, keys, values)
            for p in leaving(positions, scores, seen[stream], every=every, **bounds):
                del mine[int(p)]
                gone[stream][int(p)] = total[stream][int(p)]
        cache.evict(library, weights)
        for stream, mine in enumerate(held):
            where = cache.positions(stream)
            assert sorted(where.tolist()) == sorted(mine), (step, stream)
            assert len(where) == held_at(bounds["budget"], every, int(seen[stream]))
            for name, n in (("keys", 0), ("values", 1)):
                assert all((x == mine[p][n]).all() for x, p in zip(cache.arrays[name][stream], where.tolist()))
            assert where[:2].tolist() == [0, 1][:seen[stream]]  # pinned tokens stay where they came
            ledger = cache.arrays["ledgers"][stream]
            assert ledger["evicted"] == len(gone[stream]) == ledger["histogram"].sum() == ledger["logged"]
            np.testing.assert_allclose(ledger["mass"], sum(gone[stream].values()), rtol=1e-12)
        np.testing.assert_array_equal(cache.arrays["lengths"], seen)
    log = cache.arrays["log"][0][:min(64, len(gone[0]))]
    assert all(np.isclose(gone[0][int(p)], m, rtol=1e-12) for p, _, m in log) and len(log) > 9
