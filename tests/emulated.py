"""The kernels of csrc/cuda compiled for the host (device/), called with NumPy arrays.

No GPU is needed, and none is imitated in its speed: this runs the same source, thread by thread.
"""

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DEVICE = ROOT / "tests/c/device"
KERNELS = ("decode", "decode_evict", "prefill_sm80", "attend_f32", "cache", "mass", "mass_sm80", "mass_sm90",
           "merge", "backward_rows", "backward_f32", "backward_sm80", "backward_sm90", "kv_append",
           "kv_step", "kv_evict", "kv_weights", "window_sm90")
NUMBER_TYPES = {"float32": 0, "float16": 1, "float64": 3, "int32": 6, "int64": 7}
I32, I64, F64, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _fields(kind, names):
    return [(name, kind) for name in names.split()]


class Tensor(ctypes.Structure):
    _fields_ = [("data", POINTER), *_fields(I64, "batch head token")]


class Numbers(ctypes.Structure):
    _fields_ = [("data", POINTER), ("value", F64), ("stride", I64 * 2), *_fields(I32, "type given")]


class Rows(ctypes.Structure):
    _fields_ = [("data", POINTER), *_fields(I64, "batch head token"), *_fields(I32, "type padding")]


class Cache(ctypes.Structure):
    _fields_ = [*_fields(POINTER, "keys values lengths lows inv_freq"),
                *_fields(I64, "window capacity pairs"), ("scaling", F64),
                *_fields(I32, "interleaved applied slot_positions padding")]


class Problem(ctypes.Structure):
    """sa_cuda_problem of csrc/cuda/params.h."""

    _fields_ = [
        *_fields(Tensor, "query key value output sink_query sink_key sink_value"),
        *_fields(Numbers, "sink_logits sink_bias alibi_slopes window starts lengths query_lengths "
                          "cumulative_query cumulative_key"),
        ("cache", Cache), *_fields(Rows, "row_lse row_weights"), *_fields(POINTER, "lse mass"),
        *_fields(I64, "batch heads_q heads_kv query_length kv_length depth depth_v sequences "
                      "logits pinned learned mass_length mass_queries"),
        *_fields(ctypes.c_float, "scale softcap"),
        *_fields(I32, "dtype causal mass_maximum prefetch"), *_fields(POINTER, "scratch counters"),
        *_fields(I64, "partial_offset state_offset lse_offset rotated_offset row_tiles"),
        *_fields(I32, "splits clustered append aligned lean group apart weighs"),
        ("common_window", I64), *_fields(Tensor, "held_key held_value"), *_fields(I32, "slots evicts")]


class Launch(ctypes.Structure):
    _fields_ = [("kernel", I32), *_fields(ctypes.c_uint32, "grid block cluster shared early")]


class Plan(ctypes.Structure):
    _fields_ = [("launches", Launch * 4), ("launch_count", ctypes.c_int),
                *_fields(I64, "scratch_bytes counter_count"), ("path", ctypes.c_char_p),
                ("form", ctypes.c_int)]


class Facts(ctypes.Structure):
    """sa_cuda_device of csrc/cuda/choose.h."""

    _fields_ = _fields(I32, "capability multiprocessors shared_limit cluster_limit wgmma")


H200 = Facts(90, 132, 232448, 8)
H200_PRODUCTS = Facts(90, 132, 232448, 8, 1)  # with wgmma
A100 = Facts(80, 108, 166912, 0)
SMALL = Facts(89, 142, 101376, 0)  # one warp a block where depth is 256


def _on_the_host(source):
    return re.sub(r"extern __shared__ .*char memory\[\];", "char *memory = shared_memory();", source.read_text())


def build(folder):
    """Compiles the kernels into a library under `folder`."""
    compiler = shutil.which("g++")
    for source in (*ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/cuda/*.[ch]"),
                   *ROOT.glob("csrc/core/*.[ch]"), ROOT / "csrc/sinkattn.h"):
        target = folder / source.relative_to(ROOT / "csrc")
        target.parent.mkdir(exist_ok=True)
        target.write_text(_on_the_host(source))
    for source in DEVICE.iterdir():
        shutil.copy(source, folder / "cuda")
    for name in KERNELS:
        (folder / f"cuda/{name}.cpp").write_text(_on_the_host(ROOT / f"csrc/cuda/{name}.cu"))

    def compile_one(name):
        language = ["-std=gnu11"] if name.endswith(".c") else ["-std=c++17", "-fno-strict-aliasing"]
        command = [compiler if name.endswith(".cpp") else "gcc", *language, "-O1", "-fPIC", "-w",
                   "-c", name, "-o", f"{name}.o"]
        subprocess.run(command, cwd=folder / "cuda", check=True)
        return f"{name}.o"

    shutil.copy(ROOT / "tests/gpu/fake_cuda.c", folder / "cuda")
    kernels = ["choose.c", "choose_prefill.c", "choose_backward.c", "device.cpp", *(f"{name}.cpp" for name in KERNELS)]
    names = ["merge.c", "work.c", "../core/status.c", "calls.cpp", "fake_cuda.c", "driver.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip((*kernels, *names), pool.map(compile_one, (*kernels, *names))))
    for target, own in {"kernels.so": names[:4], "libcuda.so.1": names[4:]}.items():
        subprocess.run([compiler, "-shared", *(objects[n] for n in (*kernels, *own)), "-o", target,
                        "-lm"], cwd=folder / "cuda", check=True)
    library = ctypes.CDLL(str(folder / "cuda/kernels.so"))
    assert library.size_of_problem() == ctypes.sizeof(Problem)
    assert library.size_of_backward_params() == ctypes.sizeof(BackwardParams)
    return library


def _tensor(array, axes):
    if array is None:
        return Tensor()
    size = array.itemsize
    strides = [array.strides[axis] // size if axis is not None else 0 for axis in axes]
    return Tensor(array.ctypes.data, *strides)


def _numbers(array, axes=(0, None)):
    if array is None:
        return Numbers()
    if np.isscalar(array):
        return Numbers(None, array, (I64 * 2)(0, 0), 0, 1)
    strides = [array.strides[axis] // array.itemsize if axis is not None else 0 for axis in axes]
    return Numbers(array.ctypes.data, 0.0, (I64 * 2)(*strides), NUMBER_TYPES[array.dtype.name], 1)


def _dtype(array):
    return {"float32": 0, "float16": 1, "bfloat16": 2}[array.dtype.name]


class HostTensor(ctypes.Structure):
    """sa_tensor of csrc/sinkattn.h."""

    _fields_ = [("data", POINTER), ("shape", I64 * 4), ("stride", I64 * 4), ("rank", ctypes.c_int),
                ("dtype", ctypes.c_int), ("readonly", ctypes.c_bool)]

    @classmethod
    def of(cls, array):
        return cls(array.ctypes.data, (I64 * 4)(*array.shape),
                   (I64 * 4)(*(s // array.itemsize for s in array.strides)), array.ndim,
                   _dtype(array))


class DeviceNumbers(ctypes.Structure):
    _fields_ = [("data", POINTER), ("stride", I64 * 4), ("type", ctypes.c_int)]


class HostNumbers(ctypes.Structure):
    """sa_floats and sa_ints."""

    _fields_ = [("data", POINTER), ("shape", I64 * 4), ("rank", ctypes.c_int),
                ("device", DeviceNumbers)]

    @classmethod
    def of(cls, array, dtype, on_device):
        """The array and the struct over it, cast as the host does or left as on a device."""
        on_device = on_device and np.ndim(array) > 0
        array = np.asarray(array) if on_device else np.asarray(array, dtype, order="C")
        made = cls(array.ctypes.data, (I64 * 4)(*array.shape), array.ndim)
        if on_device:
            made.device = DeviceNumbers(
                array.ctypes.data, (I64 * 4)(*(s // array.itemsize for s in array.strides)),
                NUMBER_TYPES[array.dtype.name])
        return array, made


TENSORS = "q k v out sink_q sink_k sink_v"
FLOATS = "sink_logits sink_bias alibi_slopes"
INTS = "window starts lengths q_lengths cu_seqlens_q cu_seqlens_k"


class AttendParams(ctypes.Structure):
    """sa_attend_params of csrc/sinkattn.h."""

    _fields_ = [("function", ctypes.c_char_p), ("on_cuda", ctypes.c_bool), ("device", ctypes.c_int),
                *_fields(HostTensor, TENSORS), *_fields(HostNumbers, FLOATS + " " + INTS),
                ("sinks", I64), *_fields(ctypes.c_bool, "causal has_scale has_softcap"),
                *_fields(F64, "scale softcap"), *_fields(POINTER, "lse mass"),
                ("mass_reduce", ctypes.c_int), ("mass_queries", I64)]

    def fill(self, q, k, v, on_device=False, sink_kv=None, scale=None, softcap=None, causal=True,
             sinks=0, **rest):
        """Returns what the pointers need."""
        self.function, self.on_cuda, self.causal, self.sinks = b"attend", True, causal, sinks
        self.has_scale, self.scale = scale is not None, scale or 0.0
        self.has_softcap, self.softcap = softcap is not None, softcap or 0.0
        self.mass_queries = -1
        sink_k, sink_v = sink_kv or (None, None)
        keep = []
        for name, x in {"q": q, "k": k, "v": v, "sink_k": sink_k, "sink_v": sink_v, **rest}.items():
            if x is None:
                continue
            made = HostTensor.of(x) if name in TENSORS.split() else None
            if made is None:
                x, made = HostNumbers.of(x, np.float32 if name in FLOATS else np.int64, on_device)
            setattr(self, name, made)
            keep.append(x)
        return keep


GRADIENTS = "q k v sink_q sink_k sink_v sink_logits sink_bias"


class MassParams(ctypes.Structure):
    """sa_mass_params."""

    _fields_ = [("attend", AttendParams), *_fields(HostNumbers, "lse row_weights")]


class BackwardParams(ctypes.Structure):
    """sa_attend_backward_params."""

    _fields_ = [("attend", AttendParams), *_fields(HostTensor, "dout out lse dlse"),
                ("deterministic", ctypes.c_bool),
                *((f"d{name}", POINTER) for name in GRADIENTS.split())]


def attend(library, q, k, v, **keywords):
    """(out, lse) by the host's half and the kernels."""
    params = AttendParams()
    out = np.empty((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.empty(q.shape[:3], np.float32)
    keep = params.fill(q, k, v, out=out, **keywords)
    params.lse = lse.ctypes.data
    assert library.run_attend(ctypes.byref(params)) == 0 and keep
    return out, lse


def mass(library, q, k, lse, *, row_weights=None, reduce="sum", queries=None, **keywords):
    """`sinkattn.mass` by the host's half and the kernel of the device."""
    params = MassParams()
    got = np.full((q.shape[0], *k.shape[1:3]), np.nan, np.float32)
    keep = params.attend.fill(q, k, k, **keywords)
    params.attend.mass, params.attend.mass_reduce = got.ctypes.data, reduce == "max"
    params.attend.mass_queries = -1 if queries is None else queries
    for name, x in {"lse": lse, "row_weights": row_weights}.items():
        if x is not None:
            x, made = HostNumbers.of(x, np.float32, keywords.get("on_device", False))
            setattr(params, name, made)
            keep.append(x)
    assert library.run_mass(ctypes.byref(params)) == 0 and keep
    return got


def attend_backward(library, dout, q, k, v, out, lse, *, dlse=None, one_pass=False, **keywords):
    """`sinkattn.attend_backward` by the host's half and the kernels of the device."""
    params, sink_kv = BackwardParams(), keywords.get("sink_kv")
    params.deterministic = not one_pass
    keep = params.attend.fill(q, k, v, **keywords)
    given = {"q": q, "k": k, "v": v, **{n: keywords.get(n) for n in (
        "sink_q", "sink_logits", "sink_bias")}}
    if sink_kv is not None:
        given |= {"sink_k": sink_kv[0], "sink_v": sink_kv[1]}
    got = {}
    for name, x in given.items():
        if x is not None:
            numbers = name in ("sink_logits", "sink_bias")
            got[name] = np.full(np.shape(x), np.nan, np.float32).astype(np.float32 if numbers else q.dtype)
            setattr(params, f"d{name}", got[name].ctypes.data)
    for name, x in {"dout": dout, "out": out, "lse": lse, "dlse": dlse}.items():
        if x is not None:
            setattr(params, name, HostTensor.of(x))
    has_wgmma = ctypes.c_bool.in_dll(library, "has_wgmma")
    has_wgmma.value = one_pass
    status = library.run_backward(ctypes.byref(params))
    has_wgmma.value = False  # other calls have no kernels of Hopper here
    assert status == 0 and keep
    if sink_kv is not None:
        got["sink_kv"] = got.pop("sink_k"), got.pop("sink_v")
    return got


def merge(library, outs, lses):
    """`sinkattn.merge` by the host's half and the kernel of the device."""
    parts = (HostTensor * 2 * len(outs))(*((HostTensor.of(o), HostTensor.of(x))
                                           for o, x in zip(outs, lses)))
    out, lse = np.empty(outs[0].shape, outs[0].dtype), np.empty(lses[0].shape, np.float32)
    library.sa_cuda_merge_bytes.restype = I64
    memory = np.empty(library.sa_cuda_merge_bytes(I64(len(outs))), np.uint8)
    status = library.sa_cuda_merge(b"merge", 0, parts, I64(len(outs)), *(
        POINTER(x.ctypes.data) for x in (out, lse, memory)), None)
    assert status == 0
    return out, lse


class Call:
    """One problem with its results in place; `keep` holds what its pointers need."""

    def __init__(self, q, k, v, *, causal=True, sinks=0, window=None, sink_logits=None,
                 sink_bias=None, sink_q=None, sink_kv=None, scale=None, softcap=None,
                 alibi_slopes=None, starts=None, lengths=None, q_lengths=None, cu_seqlens_q=None,
                 cu_seqlens_k=None, mass_reduce="sum", mass_queries=None, mass_length=None,
                 want_mass=True):
        batch, heads_q, queries, depth = q.shape
        heads_kv, keys, depth_v = v.shape[1:]
        mass_length = keys if mass_length is None else mass_length
        self.out = np.full((batch, heads_q, queries, depth_v), np.nan, np.float32).astype(q.dtype)
        self.lse = np.full((batch, heads_q, queries), np.nan, np.float32)
        self.mass = np.zeros((batch, heads_kv, mass_length), np.float32)
        self.keep = (q, k, v, sink_q, sink_kv, sink_logits, sink_bias, alibi_slopes, window, starts,
                     lengths, q_lengths, cu_seqlens_q, cu_seqlens_k)
        self.problem = p = Problem()
        four = (0, 1, 2)
        p.query, p.key, p.value, p.output, p.sink_query = (
            _tensor(x, four) for x in (q, k, v, self.out, sink_q))
        if sink_kv is not None:
            p.sink_key, p.sink_value = (_tensor(x, (None, 0, 1)) for x in sink_kv)
            p.learned = sink_kv[0].shape[1]
        several = getattr(sink_logits, "ndim", 0) == 2
        p.sink_logits = _numbers(sink_logits, (0, 1) if several else (0, None))
        p.logits = sink_logits.shape[1] if several else 1
        p.sink_bias = _numbers(sink_bias, (0, 1))
        p.alibi_slopes = _numbers(
            alibi_slopes, (0, 1) if getattr(alibi_slopes, "ndim", 0) == 2 else (None, 0))
        p.window, p.starts, p.lengths, p.query_lengths, p.cumulative_query, p.cumulative_key = (
            _numbers(x) for x in (window, starts, lengths, q_lengths, cu_seqlens_q, cu_seqlens_k))
        p.sequences = 0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1
        p.lse, p.mass = self.lse.ctypes.data, self.mass.ctypes.data if want_mass else None
        p.batch, p.heads_q, p.heads_kv, p.query_length, p.kv_length = (
            batch, heads_q, heads_kv, queries, keys)
        p.depth, p.depth_v, p.pinned, p.mass_length = depth, depth_v, sinks, mass_length
        p.mass_queries = -1 if mass_queries is None else mass_queries
        p.mass_maximum, p.causal, p.dtype = mass_reduce == "max", causal, _dtype(q)
        p.scale = depth**-0.5 if scale is None else scale
        p.softcap = softcap or 0.0

    def run(self, library, facts=H200):
        self.plan = Plan()
        if self.problem.mass and self.out.size and not self.problem.row_lse.data:
            library.sa_cuda_choose(ctypes.byref(self.problem), ctypes.byref(facts),
                                   ctypes.byref(self.plan))
            if self.problem.weighs:  # the host clears nothing
                self.mass.fill(np.nan)
        status = library.run_problem(ctypes.byref(self.problem), ctypes.byref(facts),
                                     ctypes.byref(self.plan))
        assert status == 0, "a counter is not zero" if status > 0 else "the grid is too large"
        return self.out, self.lse, self.mass

    def weigh(self, library, lse, row_weights=None, facts=H200):
        """Mass alone."""
        for name, array in (("row_lse", lse), ("row_weights", row_weights)):
            if array is not None:
                strides = [stride // array.itemsize for stride in array.strides]
                setattr(self.problem, name, Rows(array.ctypes.data, *strides,
                                                 NUMBER_TYPES[array.dtype.name]))
        return self.run(library, facts)[2]


class SinkCache:
    """The device's cache in host memory."""

    def __init__(self, batch, kv_heads, head_dim, *, dtype, sinks=4, window=1020, rope=None,
                 positions="slot", rollback=0):
        slots = sinks + window + rollback
        self.sinks, self.slots, self.rope, self.library = sinks, slots, rope, None
        self.keys, self.values = (
            np.zeros((batch, kv_heads, slots, head_dim), dtype) for _ in range(2))
        self.lengths, self.lows = np.zeros(batch, np.int64), np.full(batch, sinks, np.int64)
        c = self.state = Cache()
        c.keys, c.values, c.lengths, c.lows = (
            x.ctypes.data for x in (self.keys, self.values, self.lengths, self.lows))
        c.window, c.capacity, c.slot_positions = window, window + rollback, positions == "slot"
        if rope is not None:
            self.inv_freq = np.asarray(rope.inv_freq, np.float64)
            c.inv_freq, c.pairs = self.inv_freq.ctypes.data, len(self.inv_freq)
            c.scaling, c.interleaved, c.applied = (
                rope.attention_scaling, rope.interleaved, rope.applied)

    def attend(self, library, facts, q, k, v, new_lengths=None, **keywords):
        call = Call(q, k, v, sinks=self.sinks, q_lengths=new_lengths, mass_length=self.slots,
                    **keywords)
        call.problem.cache = self.state
        call.run(library, facts)
        return call
