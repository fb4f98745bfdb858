"""Whole calls of KVCache(device="cuda") with the kernels run on the host, behind a driver of our own,
against the CPU's: outputs, kept sets, ledgers, states."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

import sinkattn

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None,
                       reason="needs g++ on x86-64, whose fibers stand for threads"),
    pytest.mark.skipif(sinkattn.show_config()["cuda"].startswith("not built"),
                       reason="built without nvcc")]

PRELUDE = """
import ctypes, sys, numpy as np
from sinkattn import KVCache, Rope
from sinkattn.policy import *
class Device:
    "A CUDA array of a library that has nothing but the interface."
    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "version": 3, "strides": array.strides,
            "data": (array.__array_interface__["data"][0], False)}
def host(x):
    i = x.__cuda_array_interface__
    size = int(np.prod(i["shape"])) * int(i["typestr"][2:])
    memory = (ctypes.c_char * size).from_address(i["data"][0]) if size else b""
    return np.frombuffer(memory, i["typestr"]).reshape(i["shape"]).copy()
random = np.random.default_rng(0)
CUTS = [3, 9, 1, 20, 1, 1, 0, 1, 7, 1, 24, 1, 1]
def pair(batch=2, heads=2, depth=16, depth_v=16, dtype="float32", **making):
    making = {"budget": 20, "sinks": 2, "recent": 6, "chunk": 9, **making}
    return [KVCache(batch, heads, depth, v_head_dim=depth_v, dtype=dtype, device=device, **making)
            for device in ("cpu", "cuda")]
def same(ours, theirs):
    for a, b in zip(ours.kept(), theirs.kept()):
        for x, y in zip(a, b):
            assert x.tolist() == y.tolist()
    assert (ours.length == theirs.length).all()
    for a, b in zip(ours.ledger.heads, theirs.ledger.heads):
        for x, y in zip(a, b):
            assert (x.evicted, x.forgotten) == (y.evicted, y.forgotten)
            assert [d[:2] for d in x.departures] == [d[:2] for d in y.departures]
            assert x.mass is y.mass is None or abs(x.mass - y.mass) < 1e-3
def step(ours, theirs, tokens, new=None, bound=2e-5, group=2, **keywords):
    n = ours._numbers
    q, k, v = (random.standard_normal((n["batch"], heads, tokens, depth)).astype(ours._dtype) for heads, depth in (
        (group * n["kv_heads"], n["head_dim"]), (n["kv_heads"], n["head_dim"]), (n["kv_heads"], n["v_head_dim"])))
    wanted = {"return_lse": True, "return_mass": bool(tokens % 2), "new_lengths": new, **keywords}
    here, there = ours.attend(q, k, v, **wanted), theirs.attend(Device(q), Device(k), Device(v), **wanted)
    for a, b in zip(here, there):
        b = host(b)
        fine = np.isfinite(a)
        assert a.shape == b.shape and (fine == np.isfinite(b)).all()
        assert np.abs(np.where(fine, a, 0) - np.where(fine, b, 0)).max(initial=0) < bound
    same(ours, theirs)
"""


def run(folder, code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FAKE_CUDA": "",
                   "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], env=environment, text=True,
                          capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("policy", [
    "SinkWindow()", "H2O()", "H2ONorm()", "H2OEMA(0.9)", "VLengthH2O()", "Scissorhands(5)", "TOVA()",
    "SnapKV(w=6, kernel=3)", "KNorm()", "KeyDiff()", "CUR(5)", "Random(7)"])
def test_a_stream_is_that_of_the_cpu(emulation, policy):
    """Parts, steps, rows of lengths of their own, padded rows."""
    run(emulation[0], f"""
for every in (1, 4) if {policy!r} in ("H2O()", "SnapKV(w=6, kernel=3)") else (1,):
    caches = pair(policy={policy}, every=every)
    for index, tokens in enumerate(CUTS):
        step(*caches, tokens, random.integers(0, tokens + 1, 2) if index % 3 == 1 else None)
""")


def test_everything_that_changes_a_score(emulation):
    """Rotation, sinks, learned rows, a head's own budget, half types, depths that nothing divides."""
    run(emulation[0], """
numbers = lambda *shape: random.standard_normal(shape).astype(np.float32)
kv = numbers(2, 3, 16), numbers(2, 3, 16)
for policy in H2O(), H2OEMA():
    caches = pair(policy=policy, budget=[20, 26], rope=Rope.from_theta(16, interleaved=True))
    for tokens in CUTS[:9]:
        step(*caches, tokens, sink_logits=numbers(4, 2), softcap=5.0, sink_bias=numbers(4, 2), scale=0.3)
    caches = pair(policy=policy, rope=Rope.from_theta(16, applied=True))
    for tokens in CUTS[:5]:
        step(*caches, tokens, **({"sink_kv": kv} if tokens == 0 else {}))
    caches = pair(policy=policy, dtype="float16", depth=32, depth_v=64, log=0)
    for tokens in CUTS[:6]:
        step(*caches, tokens, bound=4e-3)
caches = pair(depth=15, depth_v=7, policy=SinkWindow(), track_mass=False)
for tokens in CUTS:
    step(*caches, tokens)
""")


def test_a_step_in_one_launch(emulation):
    """By one CTA and by a cluster of them, from before the first eviction on; a row that gets no token, sinks, the token that leaves
    at once."""
    run(emulation[0], """
numbers = lambda *shape: random.standard_normal(shape).astype(np.float32)
launches = lambda: sinkattn.show_config()["cuda_launches"].get("decode_evict_f16_64", 0)
import sinkattn
def stepped(caches, count, before=None, **keywords):
    for index in range(count):
        step(*caches, 1, before if index % 4 == 1 else None, bound=4e-3, return_mass=False, **keywords)
for policy in H2O(), H2ONorm(), H2OEMA(0.9), SinkWindow():
    caches, begun = pair(policy=policy, dtype="float16", depth=64, depth_v=40, log=3), launches()
    step(*caches, 18, bound=4e-3)
    stepped(caches, 7, [1, 0], sink_logits=numbers(4, 2), sink_bias=numbers(4, 2))
    assert launches() == begun + 7, launches()
caches = pair(policy=H2O(), dtype="float16", depth=64, depth_v=64, recent=0, budget=[5, 9])
stepped(caches, 14, group=3)
many = {"batch": 1, "heads": 1, "depth": 64, "depth_v": 64, "budget": 1500, "recent": 9}
for policy in H2O(), H2OEMA(0.9):
    ours, theirs = pair(policy=policy, dtype="float16", **many)
    ours.attend(*(random.standard_normal((1, heads, 1499, 64)).astype(np.float16) for heads in (4, 1, 1)))
    theirs.load_state_dict(ours.state_dict())
    stepped((ours, theirs), 4, group=4)
""")


def test_everything_beside_a_call(emulation):
    """reset, reorder, crop, copy and states, in the middle of a stream that goes on."""
    run(emulation[0], """
for policy in H2O(), SnapKV(w=4, kernel=3):
    caches = pair(policy=policy, batch=3)
    for tokens in 30, 1, 1:
        step(*caches, tokens)
    twins = [c.copy() for c in caches]
    for c in caches:
        c.reorder([2, 0, 0])
    same(*caches)
    step(*caches, 5)
    for c in caches:
        c.reset([1])
    step(*caches, 1, [0, 1, 1])
    step(*twins, 2)
    ours, theirs = pair(policy=policy, batch=3)
    ours.load_state_dict(caches[1].state_dict())
    theirs.load_state_dict(caches[0].state_dict())
    step(ours, theirs, 3)
    step(*caches, 1)
    short = pair(policy=policy, batch=3)
    step(*short, 8)
    step(*short, 1)
    for c in short:
        c.crop(6)
        try:
            c.crop(7)
        except ValueError as error:
            assert "crop(): row 0 has seen 6 tokens" in str(error)
        else:
            raise AssertionError("not refused")
    same(*short)
    step(*short, 9)
""")
