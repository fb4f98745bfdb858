"""`python -m sinkattn info` and `doctor`."""

import argparse
import importlib.util
import os
import time

import numpy as np

from sinkattn import SinkCache, attend, get_num_threads, reference, set_num_threads, show_config
from sinkattn.config import cpu_tables, cuda_devices, use_cpu_table
from sinkattn.rope import Rope


def info(arguments):
    argparse.ArgumentParser(prog="python -m sinkattn info").parse_args(arguments)
    config = show_config()
    print(f"sinkattn {config['version']}, Python {config['python']}, NumPy {config['numpy']}, "
          f"compiled by gcc/clang {config['compiler']}")
    print(f"kernel table    {config['cpu_table']}: {config['cpu_table_reason']}")
    for name, state in config["cpu_tables"].items():
        print(f"  {name:13} {state}")
    print(f"processor       {config['cpu_features'] or 'no vector extension that we use'}")
    print(f"threads         {config['threads']} (SINKATTN_NUM_THREADS, set_num_threads)")
    print(f"cuda            {cuda_devices()[1]}")
    for name, value in config["environment"].items():
        print(f"environment     {name}={value}")
    for module, gives in (("ml_dtypes", "bfloat16 arrays in NumPy"), ("torch", "torch tensors"),
                          ("matplotlib", "demo --plot; pip install 'sinkattn[demo]'")):
        found = importlib.util.find_spec(module) is not None
        print(f"{module:15} {'found' if found else 'missing'}: {gives}")
    if config["cpu_table"] == "reference":
        print("The scalar reference kernel is in use: right, and slow. A C compiler that knows "
              "-mavx2 or -mavx512f\nat build time, on a processor that has it, gives fast ones.")
    return 0


def _error(got, expected):
    finite = np.isfinite(expected)
    if not np.array_equal(np.asarray(got, np.float64)[~finite], expected[~finite]):
        return np.inf
    difference = np.asarray(got, np.float64)[finite] - expected[finite]
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected[finite]), 1e-30))


def _calls(random):
    """Argument sets that touch every feature: (name, q, k, v, keywords)."""
    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    q, k, v = normal(2, 8, 70, 64), normal(2, 2, 150, 64), normal(2, 2, 150, 64)
    one = normal(2, 8, 1, 64)
    odd = normal(1, 2, 9, 37), normal(1, 1, 300, 37), normal(1, 1, 300, 20)
    packed = normal(1, 4, 90, 64), normal(1, 2, 90, 64), normal(1, 2, 90, 64)
    bias = random.standard_normal((8, 4))
    yield "causal", q, k, v, {}
    yield "window + pinned", q, k, v, {"window": 20, "sinks": 4}
    yield "sink logits", q, k, v, {"sink_logits": random.standard_normal((8, 2))}
    yield "bias, second query", q, k, v, {"window": 20, "sinks": 4, "sink_bias": bias,
                                          "sink_q": normal(*q.shape)}
    yield "learned sinks", q, k, v, {"sink_kv": (normal(2, 3, 64), normal(2, 3, 64))}
    yield "softcap, alibi", q, k, v, {"softcap": 2.0, "alibi_slopes": random.random(8)}
    yield "padding", q, k, v, {"starts": [0, 30], "lengths": [150, 77], "q_lengths": [70, 11]}
    yield "decode", one, k, v, {"window": 100, "sinks": 4}
    yield "odd depths", *odd, {"causal": False}
    yield "packed", *packed, {"cu_seqlens_q": [0, 40, 90], "cu_seqlens_k": [0, 40, 90],
                              "window": 9, "sinks": 2}


def _check(name, error, bound, failures):
    verdict = "ok" if error <= bound else "FAILED"
    print(f"  {name:28} {error:9.2e}  (bound {bound:.0e})  {verdict}")
    if error > bound:
        failures.append(name)


def _check_calls(name, attend, failures):
    random = np.random.default_rng(7)
    for call, q, k, v, keywords in _calls(random):
        for dtype, bound in ((np.float32, 2e-6), (np.float16, 2e-3)):
            halves = [x.astype(dtype) for x in (q, k, v)]
            typed = {key: value.astype(dtype) if key == "sink_q" else
                     tuple(x.astype(dtype) for x in value) if key == "sink_kv" else value
                     for key, value in keywords.items()}
            got = attend(*halves, **typed, return_lse=True, return_mass=True)
            expected = reference.attend(*halves, **typed, return_lse=True, return_mass=True)
            error = max(_error(a, b) for a, b in zip(got, expected))
            _check(f"{name} {call} {np.dtype(dtype).name}", error, bound, failures)


def _device_door():
    """(NumPy -> the device, the device -> NumPy) by torch or CuPy; None without either."""
    if importlib.util.find_spec("torch") is not None:
        import torch
        if torch.cuda.is_available():
            return (lambda x: torch.from_numpy(np.ascontiguousarray(x)).cuda(),
                    lambda x: x.cpu().numpy())
    if importlib.util.find_spec("cupy") is not None:
        import cupy
        return cupy.asarray, cupy.asnumpy
    return None


def _check_cuda(failures):
    """Every call on the first device, or a sentence that says why not."""
    count, sentence = cuda_devices()
    door = _device_door() if count > 0 else None
    if door is None:
        return sentence if count == 0 else f"{sentence}; not checked: no torch with CUDA, no CuPy"
    there, back = door

    def on_device(*tensors, **keywords):
        moved = {name: there(x) if name == "sink_q" else tuple(map(there, x))
                 if name == "sink_kv" else x for name, x in keywords.items()}
        return [back(x) for x in attend(*map(there, tensors), **moved)]

    _check_calls("cuda", on_device, failures)
    return sentence


def _check_stream(failures):
    random = np.random.default_rng(8)
    rope = Rope.from_theta(32)
    ours, model = (kind(1, 2, 32, sinks=2, window=30, rope=rope)
                   for kind in (SinkCache, reference.SinkCache))
    worst = 0.0
    for tokens in (1, 1, 5, 40, 1, 1, 90, 3):
        q, k, v = (random.standard_normal((1, h, tokens, 32)).astype(np.float32) for h in (4, 2, 2))
        worst = max(worst, _error(ours.attend(q, k, v), model.attend(q, k, v)))
    _check("SinkCache stream", worst, 5e-6, failures)


def _check_threads(failures):
    q = np.random.default_rng(9).standard_normal((1, 4, 300, 64)).astype(np.float32)
    before, outs = get_num_threads(), []
    for threads in (1, 2, 4):
        set_num_threads(threads)
        outs.append(attend(q, q, q, window=50, sinks=4))
    set_num_threads(before)
    differ = any((o != outs[0]).any() for o in outs)
    _check("threads agree, bit for bit", float(differ), 0, failures)


def _check_fork(failures):
    child = os.fork()
    if child == 0:
        x = np.ones((1, 8, 256, 64), np.float32)
        os._exit(0 if np.allclose(attend(x, x, x), 1.0) else 1)
    until, status = time.monotonic() + 10, None
    while status is None and time.monotonic() < until:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.01)
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    _check("a forked child computes", float(status != 0), 0, failures)


def doctor(arguments):
    argparse.ArgumentParser(prog="python -m sinkattn doctor").parse_args(arguments)
    failures, chosen = [], show_config()["cpu_table"]
    print("relative L2 error against sinkattn.reference (NumPy, float64):")
    for table in cpu_tables():
        before = use_cpu_table(table)
        try:
            _check_calls(table, attend, failures)
        finally:
            use_cpu_table(before)
    _check_stream(failures)
    _check_threads(failures)
    _check_fork(failures)
    cuda = _check_cuda(failures)
    if failures:
        print(f"\nNot well: {len(failures)} checks failed: {', '.join(failures)}.")
        return 1
    print(f"\nAll well. Calls use the kernel table {chosen!r}; CUDA: {cuda}.")
    return 0
