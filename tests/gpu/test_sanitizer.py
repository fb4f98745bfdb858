"""compute-sanitizer over one call of every kernel; each tool must also find what is planted for it,
in the same process, after the clean part."""

import os
import re
import shutil
import subprocess
import sys

import pytest

CLEAN = """
import cupy, numpy as np, sys
from sinkattn import KVCache, Rope, SinkCache, attend, attend_backward, mass, merge, show_config
from sinkattn.policy import CUR, H2O, H2OEMA, TOVA, H2ONorm, KeyDiff, KNorm, Random, Scissorhands, SinkWindow, SnapKV, VLengthH2O

random = np.random.default_rng(0)
def normal(dtype, *shape):
    return cupy.asarray(random.standard_normal(shape).astype(np.float32)).astype(dtype)

for dtype in (np.float32, np.float16):
    for depth in (64, 80, 128, 256):
        q, k, v = (normal(dtype, 2, h, n, depth) for h, n in ((4, 3), (2, 130), (2, 130)))
        attend(q, k, v, window=40, sinks=3, sink_logits=[0.0, 1.0, -np.inf, 2.0], return_lse=True,
               return_mass=True, lengths=cupy.asarray([130, 7]))
        more = dict(window=40, sinks=3, sink_logits=[0.0, 1.0, -np.inf, 2.0], sink_bias=np.ones((4, 3)),
                    sink_q=q, sink_kv=(k[0, :, :5], v[0, :, :5]), lengths=cupy.asarray([130, 7]))
        out, lse = attend(q, k, v, return_lse=True, **more)
        attend_backward(out, q, k, v, out, lse, dlse=lse, **more)
        mass(q, k, lse, row_weights=cupy.asarray(np.ones(lse.shape)), window=40, sinks=3)
        merge([out, out[:, ::-1]] * 25, [lse, lse] * 25)
    q, k, v = (normal(dtype, 1, h, n, 64) for h, n in ((4, 1), (2, 5000), (2, 5000)))
    attend(q, k, v)
    q, k, v = (normal(dtype, 1, h, n, 64) for h, n in ((4, 150), (2, 150), (2, 150)))
    attend(q, k, v, cu_seqlens_q=[0, 40, 40, 150], cu_seqlens_k=[0, 40, 40, 150], window=9, sinks=2,
           sink_kv=(k[0, :, :3], v[0, :, :3]), alibi_slopes=[0.1] * 4, softcap=3.0)
    packed = dict(cu_seqlens_q=[0, 40, 40, 150], cu_seqlens_k=[0, 40, 40, 150], softcap=3.0)
    out, lse = attend(q, k, v, return_lse=True, **packed)
    attend_backward(out, q, k, v, out, lse, **packed)
    for rope in (None, Rope.from_theta(64), Rope.from_theta(64, applied=True)):
        cache = SinkCache(2, 2, 64, sinks=2, window=20, rollback=2, dtype=np.dtype(dtype).name,
                          device="cuda", rope=rope)
        for tokens in (1, 1, 30, 1, 7, 1):
            chunk = [normal(dtype, 2, h, tokens, 64) for h in (4, 2, 2)]
            cache.attend(*chunk, new_lengths=[tokens, tokens // 2], return_mass=True)
        cache.reorder([1, 0]), cache.crop(0), cache.reset([0])
"""

# every policy, one token at a time and many, keys and queries as they are and turned
POLICIES = """
for rule in (SinkWindow(), H2O(), H2ONorm(), H2OEMA(0.9), VLengthH2O(), Scissorhands(5), TOVA(), SnapKV(w=4, kernel=3), KeyDiff(),
             KNorm(), CUR(5), Random(7)):
    for dtype, rope in ((np.float16, None), (np.float32, Rope.from_theta(64))):
        cache = KVCache(1, 2, 64, policy=rule, budget=20, sinks=2, recent=6, chunk=16, rope=rope, dtype=np.dtype(dtype).name, device="cuda")
        for tokens in (1, 30, 1, 1, 7):
            cache.attend(*[normal(dtype, 1, h, tokens, 64) for h in (4, 2, 2)], return_mass=tokens == 7)
        cache.reset([0])
"""

END = """
cupy.cuda.Device().synchronize()
print("RAN", *show_config()["cuda_launches"], flush=True)
print("CLEAN PART ENDS", flush=True)
"""

PLANTED = {
    # an array that claims more keys than its memory has
    "memcheck": """
class Liar:
    def __init__(self, array, shape):
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "shape": shape,
                                         "strides": None}
k = cupy.zeros((1, 1, 4, 64), np.float32)
liar = Liar(k, (1, 1, 1 << 22, 64))
attend(cupy.zeros((1, 1, 1, 64), np.float32), liar, liar)
""",
    # keys that nobody wrote
    "initcheck": """
k = cupy.ndarray((1, 1, 64, 64), np.float32, cupy.cuda.alloc(1 << 20))
attend(cupy.zeros((1, 1, 1, 64), np.float32), k, k)
""",
    "racecheck": """
cupy.RawKernel(r'''extern "C" __global__ void planted(int *out) {
    __shared__ volatile int cells[128];  // without volatile the compiler drops the race
    cells[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = cells[127 - threadIdx.x];
}''', "planted")((1,), (128,), (cupy.zeros(128, np.int32),))
""",
    "synccheck": """
cupy.RawKernel(r'''extern "C" __global__ void planted(int *out) {
    unsigned half = __ballot_sync(0xffffffffu, threadIdx.x < 16);
    __syncwarp(half);
    out[threadIdx.x] = 1;
}''', "planted")((1,), (32,), (cupy.zeros(32, np.int32),))
""",
}


def sanitizer():
    for name in ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer"):
        if shutil.which(name):
            return name
    return None


@pytest.mark.parametrize("tool", PLANTED)
def test_no_report_but_the_planted_one(tool, torch):
    del torch  # its presence says that there is a GPU
    pytest.importorskip("cupy")
    if sanitizer() is None:
        pytest.skip("no compute-sanitizer")
    end = "\ntry:\n    cupy.cuda.Device().synchronize()\nexcept Exception:\n    pass\n"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path),
                   "CUPY_CACHE_IN_MEMORY": "1"}
    done = subprocess.run(
        [sanitizer(), "--tool", tool, "--print-limit", "20", sys.executable, "-c",
         "import cupy\ncupy.cuda.set_allocator(None)\n" + CLEAN + POLICIES + END + PLANTED[tool] + end],
        env=environment, capture_output=True, text=True, timeout=300)
    clean, marker, planted = done.stdout.partition("CLEAN PART ENDS")
    assert marker, done.stdout[-3000:] + done.stderr[-3000:]
    reports = [line for line in clean.splitlines() if re.match(r"=========.*\b\w", line)
               and "COMPUTE-SANITIZER" not in line]
    assert not reports, "\n".join(reports[:30])
    ran = re.search(r"^RAN (.*)$", clean, re.M)[1].split()
    for family in ("decode", "prefill", "attend_f32", "mass", "cache_rotate", "cache_commit", "stage", "merge",
                   "backward_rows", "backward_numbers", "backward_keys", "backward_queries", "decode_evict",
                   "kv_append", "kv_step", "kv_evict", "kv_mass", "kv_weights"):
        assert any(name.startswith(family) for name in ran), f"{family} did not run: {ran}"
    summary = re.search(r"(ERROR|RACECHECK) SUMMARY: (\d+)", planted)
    assert summary and int(summary[2]) > 0, planted[-2000:]
