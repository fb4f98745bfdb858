"""The works of the CPU table: what is computed, by whom, and what of it is useful."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np

from sinkattn import KVCache, SinkCache, attend, attend_backward, policy

from . import counts, peers, statement
from .machine import MIB


@dataclass
class Contestant:
    who: str    # "sinkattn", "torch" or "NumPy"
    form: str   # how it is called
    call: object
    sets: list  # of arguments, one for each set of the work
    error: object  # (index of a set, result) -> relative L2 error
    hot: bool = False  # the same set again and again


@dataclass
class Work:
    suite: str
    name: str   # short, for the plot
    title: str
    dtype: str
    flops: float
    bytes: float  # that must cross the bus if nothing is cached
    limit: str | None  # the peak that it is compared with: "fma", "bf16_dot", "read"
    unit: str   # of its rate: "FLOP/s", "byte/s", "token/s", or "call"
    bound: float  # on the error of our results
    contestants: list = field(default_factory=list)
    note: str = ""
    items: int = 0  # tokens of a call


@dataclass
class Sizes:
    prefill: tuple = (8, 2048, 128)  # heads, length, depth
    window: int = 256
    linear: tuple = (4, 64, (8192, 16384, 32768, 65536, 131072))  # heads, depth, lengths
    decode: tuple = (32, 8, 128, (4096, 32768))  # heads_q, heads_kv, depth, lengths
    cache: tuple = (4, 4092)  # pinned, window
    arena: int = 512 * MIB
    cold: int = 256 * MIB  # sets of arguments in turn together have at least so many bytes


QUICK = Sizes(prefill=(2, 96, 16), window=16, linear=(1, 16, (128, 256)),
              decode=(4, 2, 16, (64, 256)), cache=(4, 28), arena=2 * MIB, cold=1 << 14)

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def bound_of(dtype, keys):
    """The bounds of the tests: longer fp32 sums round more often."""
    if dtype == "float32":
        return 2e-6 if keys <= 4096 else 5e-6
    return {"float16": 1e-3, "bfloat16": 8e-3}[dtype]


GRADIENT_BOUNDS = {"float32": 5e-6, "bfloat16": 2.5e-2}


def limit_of(dtype):
    return "bf16_dot" if dtype == "bfloat16" else "fma"


class Lab:
    """What the works share: sizes, peers, memory."""

    def __init__(self, sizes, torch, bfloat16, arena, cache_bytes):
        self.sizes, self.torch, self.bfloat16 = sizes, torch, bfloat16
        self.arena, self.cache_bytes = arena, cache_bytes
        self.skipped, self.random = [], np.random.default_rng(5)

    def dtypes(self, names):
        """Those that this installation can make arrays of."""
        for name in names:
            if name == "bfloat16" and self.bfloat16 is None:
                self.skip("bfloat16: needs ml_dtypes; pip install 'sinkattn[bench]'")
            else:
                yield name, self.bfloat16 if name == "bfloat16" else np.dtype(name)

    def skip(self, reason):
        if reason not in self.skipped:
            self.skipped.append(reason)

    def normal(self, dtype, *shape):
        return self.random.standard_normal(shape, np.float32).astype(dtype)

    def tensors(self, *arrays):
        return tuple(peers.tensor_of(self.torch, x) for x in arrays)

    def cold_sets(self, dtype, shape):
        """(k, v) pairs that fill the arena, or None where not even two fit."""
        flat = self.arena[:self.arena.size // 64 * 64].view(dtype)
        size = int(np.prod(shape))
        count = min(flat.size // (2 * size), -(-self.sizes.cold // (2 * size * flat.itemsize)))
        count = max(count, 2)
        if 2 * size * count > flat.size:
            return None
        fill(flat[:2 * size * count])
        parts = flat[:2 * size * count].reshape(count, 2, *shape)
        return [(pair[0], pair[1]) for pair in parts]


def fill(flat):
    """Normal numbers, repeated with a period that no row length divides."""
    block = np.random.default_rng(5).standard_normal(min(1_000_003, flat.size), np.float32)
    block = block.astype(flat.dtype)
    whole = flat.size // block.size
    flat[:whole * block.size].reshape(whole, block.size)[:] = block
    flat[whole * block.size:] = block[:flat.size - whole * block.size]


def causal_mask(length, window=None, sinks=0):
    """[length, length] bool, as a user of a dense mask would make it."""
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    seen = key <= query
    return seen if window is None else seen & ((query - key < window) | (key < sinks))


def prefill(lab):
    heads, length, depth = lab.sizes.prefill
    for name, dtype in lab.dtypes(("float32", "bfloat16", "float16")):
        shape = (1, heads, length, depth)
        q, k, v = (lab.normal(dtype, *shape) for _ in range(3))
        error = lambda _, out, q=q, k=k, v=v: statement.error_of(out, q, k, v)  # noqa: E731
        work = Work("prefill", f"prefill {SHORT[name]}",
                    f"dense causal, {heads} heads, N {length}, D {depth}, {SHORT[name]}", name,
                    counts.attention_flops(counts.visible_pairs(length), heads, depth),
                    counts.array_bytes(dtype.itemsize, *[shape] * 4), limit_of(name), "FLOP/s",
                    bound_of(name, length))
        work.contestants.append(Contestant("sinkattn", "attend", attend, [(q, k, v)], error))
        if lab.torch:
            work.contestants.append(Contestant("torch", "SDPA is_causal",
                                               peers.torch_causal(lab.torch),
                                               [lab.tensors(q, k, v)], error))
        work.contestants.append(Contestant("NumPy", "float32 matmul, mask",
                                           peers.numpy_attention,
                                           [(q, k, v, causal_mask(length))], error))
        yield work


def window(lab):
    heads, length, depth = lab.sizes.prefill
    width, sinks, shape = lab.sizes.window, 4, (1, heads, length, depth)
    q, k, v = (lab.normal(np.dtype("float32"), *shape) for _ in range(3))

    def error(_, out):
        return statement.error_of(out, q, k, v, width, sinks)
    mask = causal_mask(length, width, sinks)
    pairs = counts.visible_pairs(length, width, sinks)
    work = Work("window", "window fp32",
                f"{sinks} sinks + window {width}, {heads} heads, N {length}, D {depth}, fp32",
                "float32", counts.attention_flops(pairs, heads, depth),
                counts.array_bytes(4, *[shape] * 4), "fma", "FLOP/s", bound_of("float32", width))
    work.contestants.append(Contestant("sinkattn", "attend",
                                       partial(attend, window=width, sinks=sinks), [(q, k, v)],
                                       error))
    if lab.torch:
        work.contestants.append(Contestant("torch", "SDPA, dense bool mask",
                                           peers.torch_masked(lab.torch),
                                           [lab.tensors(q, k, v, mask)], error))
    work.contestants.append(Contestant("NumPy", "matmul, dense mask", peers.numpy_attention,
                                       [(q, k, v, mask)], error))
    yield work


def backward_work(lab, name, dtype, form, keywords):
    heads, length, depth = lab.sizes.prefill
    shape = (1, heads, length, depth)
    q, k, v, dout = (lab.normal(dtype, *shape) for _ in range(4))
    out, lse = attend(q, k, v, return_lse=True, **keywords)
    sight = keywords.get("window"), keywords.get("sinks", 0)
    mask = causal_mask(length, *sight) if keywords else None

    def call(*tensors):
        gradients = attend_backward(*tensors, **keywords)
        return gradients["q"], gradients["k"], gradients["v"]

    def error(_, gradients):
        return statement.gradient_error_of(gradients, dout, q, k, v, *sight)
    work = Work("backward", f"backward {SHORT[name]}{', window' if keywords else ''}",
                f"gradients, {form}, {heads} heads, N {length}, D {depth}, {SHORT[name]}", name,
                counts.backward_flops(counts.visible_pairs(length, *sight), heads, depth),
                counts.array_bytes(dtype.itemsize, *[shape] * 8), limit_of(name), "FLOP/s",
                GRADIENT_BOUNDS[name])
    work.contestants.append(Contestant("sinkattn", "attend_backward", call,
                                       [(dout, q, k, v, out, lse)], error))
    if lab.torch:
        tensors = lab.tensors(q, k, v, dout) + (lab.tensors(mask) if keywords else ())
        work.contestants.append(Contestant(
            "torch", "backward of SDPA" + (", dense bool mask" if keywords else " is_causal"),
            peers.torch_backward(lab.torch, *tensors), [()], error))
    return work


def backward(lab):
    sinks, width = 4, lab.sizes.window
    for name, dtype in lab.dtypes(("float32", "bfloat16")):
        yield backward_work(lab, name, dtype, "dense causal", {})
    yield backward_work(lab, "float32", np.dtype("float32"), f"{sinks} sinks + window {width}",
                        {"window": width, "sinks": sinks})


def linear(lab):
    heads, depth, lengths = lab.sizes.linear
    width, sinks = lab.sizes.window, 4
    longest = [lab.normal(np.dtype("float32"), 1, heads, lengths[-1], depth) for _ in range(3)]
    for length in lengths:
        q, k, v = (np.ascontiguousarray(x[:, :, :length]) for x in longest)
        error = lambda _, out, q=q, k=k, v=v: (  # noqa: E731
            statement.error_of(out, q, k, v, width, sinks, count=6))
        pairs = counts.visible_pairs(length, width, sinks)
        work = Work("linear", f"linear, N {length}",
                    f"{sinks} sinks + window {width}, {heads} heads, D {depth}, fp32, N {length}",
                    "float32", counts.attention_flops(pairs, heads, depth),
                    counts.array_bytes(4, *[q.shape] * 4), "fma", "FLOP/s",
                    bound_of("float32", width))
        work.contestants.append(Contestant("sinkattn", "attend",
                                           partial(attend, window=width, sinks=sinks), [(q, k, v)],
                                           error))
        yield work


def decode(lab):
    heads_q, heads_kv, depth, lengths = lab.sizes.decode
    for name, dtype in lab.dtypes(("float32", "bfloat16")):
        for length in lengths:
            sets = lab.cold_sets(dtype, (1, heads_kv, length, depth))
            if sets is None:
                lab.skip(f"decode {SHORT[name]}, N {length}: not enough memory for cold sets")
                continue
            yield decode_work(lab, name, sets, lab.normal(dtype, 1, heads_q, 1, depth))


def decode_work(lab, name, sets, q):
    keys = sets[0][0]
    heads_q, heads_kv, length, depth = q.shape[1], *keys.shape[1:]
    moved = 2 * keys.nbytes
    total = len(sets) * moved / MIB

    def error(index, out):
        return statement.error_of(out, q, *sets[index], count=6)
    work = Work("decode", f"decode {SHORT[name]} N {length}",
                f"GQA decode, {heads_q}/{heads_kv} heads, D {depth}, N {length}, {SHORT[name]}",
                name, counts.attention_flops(length, heads_q, depth), moved, "read", "byte/s",
                bound_of(name, length),
                note=f"cold: {len(sets)} sets of K and V in turn, {total:.0f} MiB")
    arguments = [(q, k, v) for k, v in sets]
    work.contestants.append(Contestant("sinkattn", "attend", attend, arguments, error))
    if lab.torch:
        tensors = [lab.tensors(*some) for some in arguments]
        work.contestants += [Contestant("torch", form, make(lab.torch), tensors, error)
                             for form, make in peers.DECODE_FORMS.items()]
    work.contestants.append(Contestant("NumPy", "float32 matmul, group folded", peers.numpy_decode,
                                       arguments, error))
    if lab.cache_bytes and moved <= lab.cache_bytes // 2:
        work.contestants.append(Contestant("sinkattn", "attend, hot: one set in the cache", attend,
                                           arguments[:1] * len(sets),
                                           lambda _, out: error(0, out), hot=True))
    return work


def cache(lab):
    heads_q, heads_kv, depth, _ = lab.sizes.decode
    sinks, width = lab.sizes.cache
    for name, dtype in lab.dtypes(("float32", "bfloat16")):
        held = (1, heads_kv, sinks + width, depth)
        moved = counts.array_bytes(dtype.itemsize, held, held)
        count = max(2, -(-lab.sizes.cold // moved))
        yield cache_work(lab, name, dtype, count, (heads_q, heads_kv, depth, sinks, width))


def cache_work(lab, name, dtype, count, shape):
    heads_q, heads_kv, depth, sinks, width = shape
    slots = sinks + width
    past = np.empty((2, 1, heads_kv, slots, depth), dtype)  # a stream that just fills the cache
    fill(past.reshape(-1))
    q = lab.normal(dtype, 1, heads_q, 1, depth)
    new = [lab.normal(dtype, 1, heads_kv, 1, depth) for _ in range(2)]

    def error(steps, out):
        """After `steps` copies of the new token."""
        steps = min(steps, width)
        k, v = (np.concatenate([x[:, :, :sinks], x[:, :, sinks + steps:],
                                np.repeat(y, steps, axis=2)], axis=2) for x, y in zip(past, new))
        return statement.error_of(out, q, k, v, count=6)
    full = SinkCache(1, heads_kv, depth, sinks=sinks, window=width, dtype=name)
    full.attend(past[0], past[0], past[1])
    caches = [full.copy() for _ in range(count)]
    moved = counts.array_bytes(dtype.itemsize, past.shape)
    work = Work("cache", f"cache step {SHORT[name]}",
                f"SinkCache step, {heads_q}/{heads_kv} heads, D {depth}, {sinks} + {width}, "
                f"{SHORT[name]}", name, counts.attention_flops(slots, heads_q, depth), moved,
                "read", "byte/s", bound_of(name, slots),
                note=f"cold: {count} caches in turn, {count * moved / MIB:.0f} MiB")
    work.contestants.append(Contestant(
        "sinkattn", "SinkCache.attend", SinkCache.attend, [(c, q, *new) for c in caches],
        lambda index, out: error(int(caches[index].length[0]) - slots, out)))

    def peer(who, form, step, wrap):
        cells = [[*wrap(past[0].copy(), past[1].copy()), 0] for _ in range(count)]
        return Contestant(who, form, step, [(cell, *wrap(q, *new)) for cell in cells],
                          lambda index, out: error(cells[index][2], out))
    if lab.torch:
        work.contestants += [
            peer("torch", f"cat + {form}",
                 peers.torch_stream_step(lab.torch, make(lab.torch), sinks), lab.tensors)
            for form, make in peers.DECODE_FORMS.items()]
    work.contestants.append(peer("NumPy", "concatenate + matmul",
                                 partial(peers.numpy_stream_step, sinks=sinks), lambda *x: x))
    return work


STEPPED = [policy.SinkWindow(), policy.H2O(), policy.TOVA(), policy.Scissorhands(),
           policy.SnapKV(w=8), policy.KeyDiff(), policy.KNorm(), policy.Random()]


def policies(lab):
    """A step of KVCache by policy, beside a SinkCache of the same size; hot: one cache for each."""
    heads_q, heads_kv, depth, _ = lab.sizes.decode
    sinks, width = lab.sizes.cache
    dtype, slots = np.dtype("float32"), sinks + width
    past = np.empty((2, 1, heads_kv, slots, depth), dtype)
    fill(past.reshape(-1))
    q = lab.normal(dtype, 1, heads_q, 1, depth)
    new = [lab.normal(dtype, 1, heads_kv, 1, depth) for _ in range(2)]
    work = Work("policies", "policy step fp32",
                f"KVCache step by policy, {heads_q}/{heads_kv} heads, D {depth}, {slots} tokens, "
                "fp32", "float32", counts.attention_flops(slots + 1, heads_q, depth),
                counts.array_bytes(4, past.shape), "read", "byte/s", bound_of("float32", slots))

    def contestant(form, cache, seen):
        cache.attend(past[0], past[0], past[1])

        def error(_, out):
            positions = np.array(seen(cache))                      # [heads_kv, tokens]
            held = [np.take_along_axis(np.concatenate([x[0], y[0]], axis=1),
                                       np.minimum(positions, slots)[..., None], axis=1)[None]
                    for x, y in zip(past, new)]
            return statement.error_of(out, q, *held, count=6)
        return Contestant("sinkattn", form, type(cache).attend, [(cache, q, *new)], error, hot=True)

    def before_the_last_eviction(cache):
        return [[*kept, head.departures[-1][0]] for kept, head in
                zip(cache.kept()[0], cache.ledger.heads[0])]
    work.contestants = [contestant(
        "SinkCache.attend", SinkCache(1, heads_kv, depth, sinks=sinks, window=width),
        lambda cache: [cache.kept()[0]] * heads_kv)]
    work.contestants += [contestant(
        f"KVCache.attend, {type(rule).__name__}",
        KVCache(1, heads_kv, depth, policy=rule, budget=slots, sinks=sinks, recent=width // 4),
        before_the_last_eviction) for rule in STEPPED]
    yield work


def overhead(lab):
    q, k, v = (lab.normal(np.dtype("float32"), 1, 1, n, 16) for n in (1, 8, 8))

    def error(_, out):
        return statement.error_of(out, q, k, v, count=1)
    work = Work("overhead", "attend, tiny",
                "attend on tiny arrays: 1 head, 1 query, 8 keys, D 16, fp32", "float32",
                counts.attention_flops(8, 1, 16), 0, None, "call", bound_of("float32", 8))
    work.contestants.append(Contestant("sinkattn", "attend, NumPy arrays", attend, [(q, k, v)],
                                       error))
    if lab.torch:
        tensors = [lab.tensors(q, k, v)]
        work.contestants.append(Contestant("sinkattn", "attend, torch tensors", attend, tensors,
                                           error))
        import sinkattn.torch  # noqa: F401 - defines the operator
        operator = lab.torch.ops.sinkattn.attend
        work.contestants.append(Contestant(
            "sinkattn", "attend, torch operator", lambda *x: operator(*x)[0], tensors, error))
        leaf = tensors[0][0].clone().requires_grad_()
        work.contestants.append(Contestant(
            "sinkattn", "attend, recording a gradient", lambda *x: attend(*x).detach(),
            [(leaf, *tensors[0][1:])], error))
        work.contestants.append(Contestant(
            "torch", "SDPA", lab.torch.nn.functional.scaled_dot_product_attention, tensors, error))
    work.contestants.append(Contestant("NumPy", "matmul", peers.numpy_attention, [(q, k, v)],
                                       error))
    yield work


def generate(lab):
    from . import hugging_face  # a command of its own too: not imported before it is run
    yield from hugging_face.works(lab)


SUITES = {"prefill": prefill, "window": window, "backward": backward, "linear": linear,
          "decode": decode, "cache": cache, "policies": policies, "overhead": overhead,
          "hf": generate}
BY_NAME_ONLY = ("policies", "hf")  # the second takes transformers and minutes
