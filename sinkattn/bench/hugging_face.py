"""generate of a Hugging Face model as the stream grows: SinkCache against sdpa with DynamicCache.

A small Llama with random weights, contexts of random keys and values: what is timed does not depend
on either. On a GPU: python -m sinkattn.bench.hugging_face --device cuda --dtype bfloat16
"""

import argparse
import copy
import importlib.util
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .machine import MIB
from .statement import as_double

TOKENS = 8  # that a timed call generates, unless told otherwise
CHUNK = 4096  # tokens by which a cache is filled


@dataclass
class Sizes:
    hidden: int = 512
    layers: int = 6
    heads: tuple = (8, 2)
    depth: int = 64
    cache: tuple = (4, 1020)  # pinned, window
    contexts: tuple = (1024, 4096, 16384, 32768)
    rows: int = 1
    tokens: int = TOKENS


# Layers of a common size, and rows enough that a step of sdpa at 32 768 tokens is what it reads.
LARGE = Sizes(hidden=4096, layers=4, heads=(32, 8), depth=128, contexts=(32768,), rows=16)
QUICK = Sizes(hidden=32, layers=2, heads=(2, 1), depth=16, cache=(2, 14), contexts=(32,))


def missing():
    """Why this cannot run here, or None."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"hf: {package} is not installed; pip install 'sinkattn[hf]'"
    return None


def make_models(sizes, dtype, device):
    """The same weights with our attention and with sdpa."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sinkattn import hf
    config = LlamaConfig(
        vocab_size=257, hidden_size=sizes.hidden, intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads[0],
        num_key_value_heads=sizes.heads[1], head_dim=sizes.depth, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, max_position_embeddings=1 << 20)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa",
                                              dtype=getattr(torch, dtype)).eval()
    return hf.enable(copy.deepcopy(model)), model


class Clock:
    """A streamer of generate: when each token was there. What it is given first is the text."""

    def __init__(self):
        self.times = []

    def put(self, _):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def steps(self):
        """Seconds from one token to the next."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:])]


class Stream:
    """A model in the middle of a text."""

    def __init__(self, model, cache, context, fill, sizes):
        import torch
        self.model, self.cache, self.tokens = model, cache, sizes.tokens
        self.ids = torch.zeros(sizes.rows, context + 1, dtype=torch.int64, device=model.device)
        fill(cache, context)

    def generate(self, clock=None):
        """More tokens; the text and the cache are then so much longer."""
        import torch

        from sinkattn.hf.sinks import cache_keyword
        with torch.no_grad():
            self.ids = self.model.generate(
                self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=self.tokens,
                do_sample=False, streamer=clock, **{cache_keyword(self.model): self.cache})
        return self.ids

    def timed(self):
        """Seconds of a call, and of each step in it."""
        clock, begin = Clock(), time.perf_counter()
        self.generate(clock)[0, -1].item()  # waits for a device
        return time.perf_counter() - begin, clock.steps()


def random_states(sizes, context, model):
    """Keys and values of a layer."""
    import torch
    shape = (sizes.rows, sizes.heads[1], context, sizes.depth)
    return [torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)]


def ours(sizes, model, context):
    from sinkattn import hf
    from sinkattn.hf.masks import Mask, Pattern

    def fill(cache, length):
        import torch
        for layer in cache.layers:
            for begin in range(0, length, CHUNK):
                count = min(CHUNK, length - begin)
                key, value = random_states(sizes, count, model)
                query = key.new_zeros(sizes.rows, sizes.heads[0], count, sizes.depth)
                mask = Mask(Pattern(causal=True), sizes.rows, count, begin + count, begin)
                with torch.no_grad():
                    layer.attend(query, key, value, mask)
    sinks, window = sizes.cache
    return Stream(model, hf.SinkCache(model.config, sinks=sinks, window=window), context, fill,
                  sizes)


def captured(sizes, model, context):
    """Ours with the decode step as a CUDA graph."""
    from sinkattn import hf
    model = copy.copy(model)  # the same weights; a capture replaces forward
    stream = ours(sizes, model, context)
    stream.capture = hf.capture(model, stream.cache)
    return stream


def theirs(sizes, model, context):
    from transformers import DynamicCache

    def fill(cache, length):
        for layer in range(sizes.layers):
            cache.update(*random_states(sizes, length, model), layer)
    return Stream(model, DynamicCache(), context, fill, sizes)


def bytes_of(cache):
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers
               for x in (layer.keys, layer.values))


def stream_error(stream):
    """Relative L2 error of the first layer's attention for one more token against float64, from
    what the ring then holds."""
    layer, caught = stream.cache.layers[0], {}
    inner = layer.stream

    class Spy:
        def __getattr__(self, name):
            return getattr(inner, name)

        def attend(self, q, k, v, *, out, **keywords):
            inner.attend(q, k, v, out=out, **keywords)
            caught.update(q=q, out=out.clone())
    layer.stream = Spy()
    stream.generate()
    layer.stream = inner
    # the last of the tokens: its own key is the newest in the ring
    return error_of_step(inner.state_dict(), as_double(caught["q"].float().cpu()),
                         as_double(caught["out"].float().cpu()))


def wide(bits):
    if bits.dtype == np.uint16:
        bits = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(np.float64)


def error_of_step(state, q, out):
    """By the definition: the pinned keys are scored with the query at its slot (halves turn)."""
    keys, values = wide(state["keys"][0]), wide(state["values"][0])
    sinks, window, length = int(state["sinks"]), int(state["window"]), int(state["length"][0])
    angle = (min(length - 1, sinks + window - 1) - (length - 1)) * state["rope_inv_freq"]
    a, b = np.split(q[0, :, 0], 2, axis=-1)
    turned = np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                             b * np.cos(angle) + a * np.sin(angle)], -1)
    group, scale = q.shape[1] // keys.shape[0], q.shape[-1] ** -0.5
    expected = []
    for head in range(q.shape[1]):
        k, v = keys[head // group], values[head // group]
        score = np.concatenate([k[:sinks] @ turned[head], k[sinks:] @ q[0, head, 0]]) * scale
        weight = np.exp(score - score.max())
        expected.append(weight @ v / weight.sum())
    expected = np.array(expected)
    return float(np.linalg.norm(out[0, :, 0] - expected) / np.linalg.norm(expected))


def peer_error(stream, eager):
    """Relative L2 of the next token's logits, sdpa against eager attention, from one cache."""
    import torch

    from sinkattn.hf.sinks import cache_keyword
    logits = []
    with torch.no_grad():
        for model in (stream.model, eager):
            given = {cache_keyword(model): copy.deepcopy(stream.cache)}
            logits.append(model(stream.ids[:, -1:], **given).logits.double())
    return float((logits[0] - logits[1]).norm() / logits[1].norm())


def works(lab):
    """For the CPU table."""
    from .suites import QUICK as QUICK_TABLE
    from .suites import Contestant, Work, bound_of
    reason = missing()
    if reason:
        lab.skip(reason)
        return
    sizes = QUICK if lab.sizes is QUICK_TABLE else Sizes()
    enabled, plain = make_models(sizes, "float32", "cpu")
    eager = copy.deepcopy(plain)
    eager.set_attn_implementation("eager")
    (sinks, window), (heads_q, heads_kv) = sizes.cache, sizes.heads
    for context in sizes.contexts:
        work = Work("hf", f"generate at {context}",
                    f"generate, {sizes.layers} layers, {heads_q}/{heads_kv} heads, "
                    f"D {sizes.depth}, fp32, after {context} tokens", "float32", 0, 0, None,
                    "token/s", bound_of("float32", window), items=TOKENS,
                    note="the text grows with each call")
        for who, form, make, model, check in (
                ("sinkattn", f"SinkCache {sinks} + {window}", ours, enabled, stream_error),
                ("torch", "sdpa + DynamicCache", theirs, plain,
                 partial(peer_error, eager=eager))):
            stream = make(sizes, model, context)
            size = bytes_of(stream.cache) / MIB
            work.contestants.append(Contestant(
                who, f"{form}, {size:.1f} MiB", lambda s: s.generate(), [(stream,)],
                lambda _, out, s=stream, c=check: c(s)))
        yield work


def contestants(options):
    """By groups, whose members take turns: (name, maker of its stream, place among the models, what
    holds while it runs)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def without_cudnn():
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                            SDPBackend.MATH])
    if not options.device.startswith("cuda"):
        return [[("SinkCache", ours, 0, nullcontext),
                 ("sdpa + DynamicCache", theirs, 1, nullcontext)]]
    # What torch chooses by itself is cuDNN, which plans anew for each new length: the host's caches
    # are then cold for whoever is next, so it stands alone.
    return [[("SinkCache, captured", captured, 0, nullcontext),
             ("SinkCache", ours, 0, nullcontext),
             ("sdpa without cuDNN + DynamicCache", theirs, 1, without_cudnn)],
            [("sdpa + DynamicCache", theirs, 1, nullcontext)]]


def measure(group, context, sizes, models, repeats):
    """A line for each of those who take turns, call by call; the first calls are not counted."""
    streams = [(name, make(sizes, models[at], context), around) for name, make, at, around in group]
    held = [bytes_of(stream.cache) for _, stream, _ in streams]
    calls, steps = [[] for _ in streams], [[] for _ in streams]
    for turn in range(repeats + 1):
        for at, (_, stream, around) in enumerate(streams):
            with around():
                whole, between = stream.timed()
            if turn > 0:
                calls[at].append(whole)
                steps[at] += between
    for at, (name, stream, _) in enumerate(streams):
        error = f"; error {stream_error(stream):.1e}" if name == "SinkCache" else ""
        step = sizes.rows / statistics.median(steps[at])
        call = sizes.rows * sizes.tokens / statistics.median(calls[at])
        print(f"  {name:33} {step:9.1f} {call:9.1f} {held[at]:12}{error}", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m sinkattn.bench.hugging_face")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, help="of the batch")
    parser.add_argument("--large", action="store_true",
                        help="4 layers of 32/8 heads of 128, 16 rows")
    parser.add_argument("--tokens", type=int, help="that a timed call generates")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else LARGE if options.large else Sizes()
    sizes = replace(sizes, rows=options.rows or sizes.rows,
                    tokens=options.tokens or sizes.tokens,
                    contexts=options.contexts or sizes.contexts)
    models = make_models(sizes, options.dtype, options.device)
    print(f"{sizes.rows} rows, {options.repeats} calls of {sizes.tokens} tokens. Tokens per second "
          "from one token to the next (median), of whole calls (median); bytes of the cache")
    for context in sizes.contexts:
        print(f"after {context} tokens")
        for group in contestants(options):
            measure(group, context, sizes, models, options.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
