"""Where does attention go when it has nothing to say? Three small language models, one difference.

    python examples/train_with_sinks.py            # a few minutes on two cores
    python examples/train_with_sinks.py --quick    # seconds: that it runs, no more

A byte-level transformer (pre-norm, no biases, rotary positions) is trained on the text that ships with
the package (sinkattn/demo/data, the source of peewee), each crop behind a start token:

plain     the softmax must spend all its weight on keys
learned   a sink logit for each head and layer, trained with the rest (as in gpt-oss)
null      sink_logits = log 4 everywhere: what prepending four zero embeddings would do in such a
          model, without the four slots

All three start from the same weights and see the same batches. Printed are bits per byte on held-out
text, and where the weight of the second half of the queries goes: to the start token, to the sink, or
to text. An even spread would give the start token 0.5 % (context 256).

Seen (2026-11-25, one seed): 1.679, 1.707 and 1.706 bits per byte; to the start token 0.2, 0.1 and 0.1 %,
to the sink none, 2.6 and 6.1 %. At this size nobody dumps anything on the first token.
"""

import argparse
import math
import time

import torch
from torch import nn
from torch.nn import functional

from sinkattn import attend
from sinkattn.demo.text import held_out_text

START = 256  # beside the 256 bytes
KINDS = ("plain", "learned", "null")
FULL = {"width": 96, "layers": 4, "heads": 3, "context": 256, "batch": 6, "steps": 800}
QUICK = {"width": 32, "layers": 2, "heads": 2, "context": 48, "batch": 2, "steps": 12}


def turned(x, base=10000.0):
    """Rotary positions: x [batch, heads, length, depth] at 0, 1, 2, ..."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) / half)
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self, width, heads, kind):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.sinks = {"plain": None, "learned": nn.Parameter(torch.zeros(heads)),
                      "null": nn.Buffer(torch.full((heads,), math.log(4)))}[kind]

    def forward(self, x, watch=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = turned(q), turned(k)
        if watch is not None:
            watch.append(shares(q, k, v, self.sinks))
        return self.out(attend(q, k, v, sink_logits=self.sinks).transpose(1, 2).flatten(2))


def shares(q, k, v, sinks):
    """{"start", "sink", "text"}: of the weight of the queries in the second half, mean over rows, for
    each head."""
    counted = q.shape[2] // 2
    _, lse, mass = attend(q, k, v, sink_logits=sinks, return_lse=True, return_mass=True,
                          mass_queries=counted)
    start = mass[:, :, 0].mean(0) / counted
    sink = torch.zeros_like(start)
    if sinks is not None:
        sink = torch.exp(sinks[:, None] - lse[:, :, -counted:]).mean((0, 2))
    return {"start": start, "sink": sink, "text": 1 - start - sink}


class Model(nn.Module):
    def __init__(self, kind, width, layers, heads):
        super().__init__()
        self.embedding = nn.Embedding(START + 1, width)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm": nn.RMSNorm(width), "attention": Attention(width, heads, kind),
            "norm_2": nn.RMSNorm(width), "up": nn.Linear(width, 4 * width, bias=False),
            "down": nn.Linear(4 * width, width, bias=False)}) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens, watch=None):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer["attention"](layer["norm"](x), watch)
            x = x + layer["down"](functional.gelu(layer["up"](layer["norm_2"](x))))
        return self.head(self.norm(x))


def crops(text, context, batch, generator):
    """(tokens [batch, context] behind a start token, the bytes to predict)."""
    first = torch.randint(len(text) - context, (batch, 1), generator=generator)
    taken = text[first + torch.arange(context)]
    return torch.cat([torch.full((batch, 1), START), taken[:, :-1]], 1), taken


def loss_of(model, text, size, generator):
    tokens, expected = crops(text, size["context"], size["batch"], generator)
    return functional.cross_entropy(model(tokens).flatten(0, 1), expected.flatten())


def trained(kind, text, size, tell=print):
    """The model after its steps, and the loss of each, in bits."""
    torch.manual_seed(0)
    model = Model(kind, size["width"], size["layers"], size["heads"])
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": weights, "weight_decay": 0.1},
                                   {"params": others, "weight_decay": 0.0}], lr=3e-3)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=size["steps"], pct_start=0.1)
    generator, losses, begun = torch.Generator().manual_seed(1), [], time.perf_counter()
    for step in range(size["steps"]):
        loss = loss_of(model, text, size, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pace.step()
        losses.append(loss.item() / math.log(2))
        if step % 100 == 99:
            tell(f"  {kind:8} step {step + 1:4}   {sum(losses[-50:]) / 50:.3f} bits per byte   "
                 f"{time.perf_counter() - begun:.0f} s")
    return model, losses


@torch.no_grad()
def measured(model, text, size, batches=24):
    """Bits per byte on held-out text, and the shares [layers, heads]."""
    generator, bits, watched = torch.Generator().manual_seed(2), 0.0, []
    for _ in range(batches):
        tokens, expected = crops(text, size["context"], size["batch"], generator)
        watch = []
        scores = model(tokens, watch)
        bits += functional.cross_entropy(scores.flatten(0, 1), expected.flatten()).item()
        watched.append({name: torch.stack([layer[name] for layer in watch]) for name in watch[0]})
    return {"bits": bits / batches / math.log(2),
            **{name: torch.stack([w[name] for w in watched]).mean(0) for name in watched[0]}}


def run(size, kinds=KINDS, tell=print):
    """{kind: what was measured, with the losses and the sink logits}."""
    text = torch.frombuffer(bytearray(held_out_text()[0]), dtype=torch.uint8).long()
    cut = len(text) * 9 // 10
    results = {}
    for kind in kinds:
        model, losses = trained(kind, text[:cut], size, tell)
        results[kind] = measured(model, text[cut:], size, batches=24 if size is FULL else 2)
        results[kind]["losses"] = losses
        results[kind]["sinks"] = [layer["attention"].sinks for layer in model.layers]
    return results


def table(results):
    lines = [f"{'':8}  bits per byte   to the start token   to the sink   to text      most of one head: start, sink"]
    for kind, r in results.items():
        mean = {name: 100 * r[name].mean().item() for name in ("start", "sink", "text")}
        most = {name: 100 * r[name].max().item() for name in ("start", "sink")}
        lines.append(f"{kind:8}  {r['bits']:13.3f}   {mean['start']:16.1f} %   {mean['sink']:9.1f} %   "
                     f"{mean['text']:5.1f} %      {most['start']:.0f} %, {most['sink']:.0f} %")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny, seconds: figures mean nothing")
    parser.add_argument("--steps", type=int, help="of training, each")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    if options.steps:
        size["steps"] = options.steps
    begun = time.perf_counter()
    print(table(run(size)))
    print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
