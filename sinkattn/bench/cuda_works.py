"""The works of the CUDA table: decode, the streaming step, prefill, gradients, host overhead; each
against what torch offers for it, on the same arrays in the same run."""

import os
from dataclasses import dataclass, field
from functools import partial

from sinkattn import KVCache, SinkCache, attend, attend_backward, policy
from sinkattn.bench import counts

COLD = 512 << 20  # sets of arguments in turn together hold at least so many bytes: ten times the L2


@dataclass
class Contestant:
    who: str      # "sinkattn" or "torch"
    form: str
    calls: list   # one callable for each set; a set is used again when all others were
    expected: object = None  # () -> what calls[0] should give, float64
    hot: bool = False


@dataclass
class Work:
    suite: str
    name: str
    title: str
    dtype: str
    flops: float
    bytes: float
    unit: str     # "byte/s", "FLOP/s" or "call"
    bound: float
    contestants: list = field(default_factory=list)
    note: str = ""
    graph: bool = True  # short calls: replayed, so that no host stands between them


def sdpa(torch, backend, **keywords):
    """SDPA held to one backend, chosen outside of what is timed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    backend = getattr(SDPBackend, backend)

    def call(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, enable_gqa=q.shape[1] != k.shape[1], **keywords)
    return call


def flex(torch, queries, keys, rule):
    """Compiled FlexAttention with a block mask; None where it is switched off."""
    if os.environ.get("SINKATTN_BENCH_FLEX") == "0":
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    mask = create_block_mask(rule, None, None, queries, keys, device="cuda") if rule else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def exact(torch, q, k, v, seen=None):
    """float64, one kv head at a time."""
    group, outs = q.shape[1] // k.shape[1], []
    for head in range(k.shape[1]):
        keys, values = (x[:, head, None].double() for x in (k, v))
        scores = q[:, head * group:(head + 1) * group].double() @ keys.mT * q.shape[-1] ** -0.5
        if seen is not None:
            scores.masked_fill_(~seen, -torch.inf)
        outs.append(scores.softmax(-1) @ values)
    return torch.cat(outs, 1)


def normal(torch, *shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def decode(torch, sizes):
    for batch, heads_q, heads_kv, depth, keys in sizes["decode"]:
        moved = 2 * batch * heads_kv * keys * depth * 2
        count = max(2, -(-sizes["cold"] // moved))
        q = normal(torch, batch, heads_q, 1, depth)
        shape = batch, heads_kv, keys, depth
        sets = [(normal(torch, *shape), normal(torch, *shape)) for _ in range(count)]
        work = Work("decode", f"decode B {batch} N {keys}",
                    f"decode, B {batch}, {heads_q}/{heads_kv} heads, D {depth}, N {keys}, bf16",
                    "bfloat16", 4.0 * depth * keys * heads_q * batch, moved, "byte/s", 8e-3,
                    note=f"cold: {count} sets of K and V in turn, {count * moved >> 20} MiB")
        right = partial(exact, torch, q, *sets[0]) if batch == 1 else partial(
            lambda q, k, v: exact(torch, q[:2], k[:2], v[:2]), q, *sets[0])

        def add(who, form, call, hot=False, q=q, sets=sets, work=work, right=right):
            calls = [partial(call, q, *(sets[0] if hot else one)) for one in sets]
            work.contestants.append(Contestant(who, form, calls, right, hot))

        add("sinkattn", "attend", attend)
        for form in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            add("torch", f"SDPA {form.partition('_')[0].lower()}", sdpa(torch, form))
        if (compiled := flex(torch, 1, keys, None)) is not None:
            add("torch", "flex, compiled", compiled)
        if 2 * moved <= torch.cuda.get_device_properties(0).L2_cache_size:
            add("sinkattn", "attend, hot: one set in the L2", attend, hot=True)
        yield work
        del sets


def step(torch, sizes):
    """One token a row: append, evict, attend. The peer does it as model code does: torch.cat of
    what is kept and the new token, then SDPA."""
    sinks, window = sizes["cache"]
    for batch in sizes["step"]:
        heads_q, heads_kv, depth, slots = 32, 8, 128, sinks + window
        moved = 2 * batch * heads_kv * slots * depth * 2
        count = max(2, -(-sizes["cold"] // moved))
        q, k, v = (normal(torch, batch, h, 1, depth) for h in (heads_q, heads_kv, heads_kv))
        past = [normal(torch, batch, heads_kv, slots, depth) for _ in range(2)]
        caches = []
        for _ in range(count):
            cache = SinkCache(batch, heads_kv, depth, sinks=sinks, window=window, dtype="bfloat16",
                              device="cuda")
            cache.attend(normal(torch, batch, heads_q, slots, depth), *past)
            caches.append(cache)
        kept = [tuple(x.clone() for x in past) for _ in range(count)]

        cudnn = sdpa(torch, "CUDNN_ATTENTION")

        def cat(k_past, v_past, q=q, k=k, v=v, cudnn=cudnn):
            keys, values = (torch.cat([x[:, :, :sinks], x[:, :, sinks + 1:], new], 2)
                            for x, new in ((k_past, k), (v_past, v)))
            return cudnn(q, keys, values)

        work = Work("cache", f"step B {batch}",
                    f"streaming step, B {batch}, {sinks} + {window}, {heads_q}/{heads_kv} heads, "
                    f"D {depth}, bf16", "bfloat16", 4.0 * depth * slots * heads_q * batch, moved,
                    "byte/s", 8e-3,
                    note=f"cold: {count} caches in turn; append and eviction included")
        first = [torch.cat([x[:, :, :sinks], x[:, :, sinks + 1:], new], 2)
                 for x, new in zip(past, (k, v))]
        work.contestants += [
            Contestant("sinkattn", "SinkCache.attend", [partial(c.attend, q, k, v) for c in caches],
                       partial(exact, torch, q, *first)),
            Contestant("torch", "cat + SDPA cudnn", [partial(cat, *one) for one in kept],
                       partial(exact, torch, q, *first))]
        yield work
        del caches, kept


STEPPED = [policy.SinkWindow(), policy.H2O(), policy.H2OEMA(), policy.TOVA(), policy.KNorm(),
           policy.SnapKV(w=8)]


def policies(torch, sizes):
    """A step of KVCache by policy, beside a SinkCache of the same size: as `step`."""
    sinks, window = sizes["cache"]
    heads_q, heads_kv, depth, slots = 32, 8, 128, sinks + window
    making = {"sinks": sinks, "dtype": "bfloat16", "device": "cuda"}
    for batch in sizes["step"]:
        moved = 2 * batch * heads_kv * slots * depth * 2
        count = max(2, -(-sizes["cold"] // moved))
        q, k, v = (normal(torch, batch, h, 1, depth) for h in (heads_q, heads_kv, heads_kv))
        prompt = normal(torch, batch, heads_q, slots, depth)
        past = [normal(torch, batch, heads_kv, slots, depth) for _ in range(2)]
        work = Work("policies", f"policy step B {batch}",
                    f"KVCache step by policy, B {batch}, {slots} tokens, {heads_q}/{heads_kv} "
                    f"heads, D {depth}, bf16", "bfloat16", 4.0 * depth * slots * heads_q * batch,
                    moved, "byte/s", 8e-3, note=f"cold: {count} caches in turn")

        def add(form, make, first, q=q, k=k, v=v, count=count, work=work, prompt=prompt, past=past):
            caches = [make() for _ in range(count)]
            for cache in caches:
                cache.attend(prompt, *past)
            seen = [torch.cat([x[:, :, :sinks], x[:, :, first:], new], 2)
                    for x, new in zip(past, (k, v))]
            work.contestants.append(Contestant(
                "sinkattn", form, [partial(c.attend, q, k, v) for c in caches],
                partial(exact, torch, q, *seen)))

        add("SinkCache.attend", lambda batch=batch: SinkCache(
            batch, heads_kv, depth, window=window, **making), sinks + 1)
        for rule in STEPPED:  # the new token sees all that is held; then one leaves
            add(f"KVCache.attend, {type(rule).__name__}", lambda rule=rule, batch=batch: KVCache(
                batch, heads_kv, depth, policy=rule, budget=slots, recent=window // 4,
                track_mass=type(rule)._needs_mass, **making), sinks)
        yield work


def prefill(torch, sizes):
    for heads_q, heads_kv, depth, length, window, sinks in sizes["prefill"]:
        q, k, v = (normal(torch, 1, h, length, depth) for h in (heads_q, heads_kv, heads_kv))
        sets = [(q, k, v), tuple(x.clone() for x in (q, k, v))]
        width = window or length
        pairs = sum(min(i + 1, width + min(sinks, max(0, i + 1 - width))) for i in range(length))
        name = "dense causal" if window is None else f"{sinks} sinks + window {window}"
        work = Work("prefill" if window is None else "window", f"{name} D {depth}",
                    f"{name}, {heads_q}/{heads_kv} heads, N {length}, D {depth}, bf16", "bfloat16",
                    4.0 * depth * pairs * heads_q, 2.0 * (2 * q.numel() + 2 * k.numel()), "FLOP/s",
                    8e-3, graph=False)
        rows = torch.arange(length - 64, length, device="cuda")[:, None]
        keys = torch.arange(length, device="cuda")
        seen = (keys <= rows) & ((rows - keys < width) | (keys < sinks))
        right = partial(exact, torch, q[:, :, -64:], k, v, seen)

        def add(who, form, call, sets=sets, work=work, right=right):
            work.contestants.append(Contestant(who, form, [partial(call, *s) for s in sets], right))

        def rule(b, h, i, j, width=width, sinks=sinks):
            return (j <= i) & ((i - j < width) | (j < sinks))

        add("sinkattn", "attend", partial(attend, window=window, sinks=sinks))
        if window is None:
            for form in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
                add("torch", f"SDPA {form.partition('_')[0].lower()}",
                    sdpa(torch, form, is_causal=True))
        if (compiled := flex(torch, length, length, rule)) is not None:
            add("torch", "flex, compiled", compiled)
        yield work


def recorded(torch, form, q, k, v, dout):
    """The backward of one recorded SDPA; gives the gradient of q."""
    graph = []

    def call():
        if not graph:
            with torch.enable_grad():
                tensors = [x.detach().requires_grad_() for x in (q, k, v)]
                graph.extend((sdpa(torch, form, is_causal=True)(*tensors), tensors))
        return torch.autograd.grad(graph[0], graph[1], dout, retain_graph=True)[0]
    return call


def last_gradients(torch, q, k, v, dout, count=64):
    """float64, of the last queries, which depend on no other."""
    length = q.shape[2]
    rows = torch.arange(length - count, length, device=q.device)[:, None]
    with torch.enable_grad():
        last = q[:, :, -count:].double().requires_grad_()
        out = exact(torch, last, k, v, torch.arange(length, device=q.device) <= rows)
        return torch.autograd.grad(out, last, dout[:, :, -count:].double())[0]


def backward(torch, sizes):
    """The gradients of q, k and v; that of the last queries is compared with float64."""
    for heads_q, heads_kv, depth, length in sizes["backward"]:
        heads = heads_q, heads_kv, heads_kv, heads_q
        tensors = q, k, v, dout = tuple(normal(torch, 1, h, length, depth) for h in heads)
        result = attend(q, k, v, return_lse=True)
        work = Work("backward", f"backward D {depth} {heads_q}/{heads_kv}",
                    f"gradients, dense causal, {heads_q}/{heads_kv} heads, N {length}, D {depth}, "
                    f"bf16", "bfloat16",
                    float(counts.backward_flops(counts.visible_pairs(length), heads_q, depth)),
                    8.0 * (q.numel() + k.numel()), "FLOP/s", 2.5e-2, graph=False)

        def ours(same, tensors=tensors, result=result):
            return attend_backward(tensors[3], *tensors[:3], *result, deterministic=same)["q"]

        right = partial(last_gradients, torch, *tensors)
        for name, same in (("attend_backward", False), ("attend_backward, deterministic", True)):
            work.contestants.append(Contestant("sinkattn", name, [partial(ours, same)], right))
        for form in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            theirs = recorded(torch, form, *tensors)
            work.contestants.append(Contestant(
                "torch", f"SDPA {form.partition('_')[0].lower()}", [theirs], right))
        yield work


def overhead(torch, sizes):
    """Host time of one call; the device is idle most of it."""
    del sizes
    q, k, v = (normal(torch, 1, h, n, 64) for h, n in ((4, 1), (2, 64), (2, 64)))
    cache = SinkCache(1, 2, 64, sinks=4, window=60, dtype="bfloat16", device="cuda")
    work = Work("overhead", "overhead", "host time of one call, 64 keys, bf16", "bfloat16", 0.0,
                0.0, "call", 8e-3, graph=False)
    right = partial(exact, torch, q, k, v)
    new = k[:, :, :1], v[:, :, :1]
    theirs = torch.nn.functional.scaled_dot_product_attention
    import sinkattn.torch  # noqa: F401 - defines the operator
    operator, leaf = torch.ops.sinkattn.attend, q.clone().requires_grad_()
    work.contestants += [
        Contestant("sinkattn", "attend", [partial(attend, q, k, v)], right),
        Contestant("sinkattn", "attend, torch operator", [lambda: operator(q, k, v)[0]], right),
        Contestant("sinkattn", "attend, recording a gradient",
                   [lambda: attend(leaf, k, v).detach()], right),
        Contestant("sinkattn", "SinkCache.attend", [partial(cache.attend, q, *new)]),
        Contestant("torch", "SDPA", [partial(theirs, q, k, v, enable_gqa=True)], right)]
    yield work


SUITES = {"decode": (decode,), "cache": (step,), "policies": (policies,),
          "prefill": (prefill,), "window": (prefill,), "backward": (backward,),
          "overhead": (overhead,)}
SIZES = {
    "cold": COLD,
    "decode": [(1, 32, 8, 128, 4096), (1, 32, 8, 128, 32768), (1, 32, 8, 128, 131072),
               (64, 32, 8, 128, 4096), (64, 64, 8, 64, 16384)],
    "cache": (4, 4092), "step": (1, 8),
    "backward": [(16, 16, 128, 8192), (32, 8, 128, 8192), (16, 16, 64, 8192)],
    "prefill": [(64, 8, 128, 2048, None, 0), (64, 8, 128, 8192, None, 0),
                (64, 8, 128, 32768, None, 0), (64, 8, 64, 16384, None, 0),
                (16, 16, 256, 16384, None, 0), (64, 8, 128, 32768, 1024, 4),
                (32, 8, 128, 32768, 4096, 4), (64, 8, 64, 65536, 1024, 4)],
}
QUICK = {
    "cold": 4 << 20, "decode": [(1, 8, 2, 64, 512)], "cache": (4, 60), "step": (1,),
    "backward": [(4, 2, 64, 512)], "prefill": [(4, 2, 64, 512, None, 0), (4, 2, 64, 512, 64, 4)],
}


def works(torch, suites, quick):
    sizes = QUICK if quick else SIZES
    makers = dict.fromkeys(maker for name in suites for maker in SUITES.get(name, ()))
    for maker in makers:
        for work in maker(torch, sizes):
            if work.suite in suites:
                yield work
