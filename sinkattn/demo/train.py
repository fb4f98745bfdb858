"""Trains the demo's model: a byte-level language model of Python source with BOS in front.

    python -m sinkattn.demo.train --out model_directory        (torch and a GPU; minutes on an H200)

Corpus: the Python files of the installed packages whose metadata name an MIT, BSD, Apache, PSF or
ISC licence, and the standard library. Every file that shares a 64-byte run with the demo's held-out
text is left out, and the count is reported. `model-int8.npz` is what the package ships as
`data/model.npz`; `corpus.json` says what was read and how the training went.

Why these settings. The demo needs a model whose attention has a sink, as large pre-trained models
do. BOS opens every training sequence, so the sink settles there. How much of the attention it takes
hangs on the weight decay (0.6, on the gains of the norms too) and on small initial weights: with
standard deviation 0.02 everywhere the first token took 26 to 44 per cent in each of the six layers
after 7000 steps; with 1 / sqrt(columns), and less for what writes to the residual stream, two
layers stayed below 1 per cent after 6000.

A small share of the sequences (`--copies`) has a line `NAME = '<random letters>'` written over its
text at two places. It sharpens recall inside the trained length; the demo measures how that recall
ends where the window ends. The names that the demo asks for are not among those trained on.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import sys
import sysconfig
import time

import numpy as np

from .model import BOS, Config, parameter_names, save_weights
from .text import RUN, held_out_text, run_hashes, shares_run

PERMISSIVE = re.compile(
    r"\b(mit|bsd|0bsd|apache|psf|iscl?|python software foundation|python-2\.0|cnri-python)\b", re.I
)
BESIDE_THEM = re.compile(r"\b(bsl-1\.0|zlib|cc0-1\.0)\b", re.I)
NOT_PERMISSIVE = re.compile(
    r"gpl|mozilla|\bmpl|eclipse|\bcc-?by|creative commons|proprietary|non-?commercial|nvidia|eula",
    re.I,
)
VENDORED = re.compile(r"(^|/)(_?vendor(ed)?|third_party|_?externals?|extern|_distutils)/")
SMALLEST_FILE, LARGEST_FILE = 200, 1_000_000
LONGEST_MEAN_LINE = 160
INITIAL_SCALE = 0.02  # of every matrix: a sink in every layer hangs on it, see above

COMMON_WORDS = """
able access action active address agent alpha amount answer area array asset author balance band
base batch beta block board body border branch bridge bucket buffer button cable cache call
carrier case cell center chain channel charge circle class client clock cloud code column command
common config content control core count cover credit cursor cycle daily data date deck default
delta depth design detail device digest disk domain door draft driver echo edge effect engine
entry error event exact extra factor family field figure file filter final flag flow folder form
frame front gamma gate global grade grid group guard guide handle hash header height help hidden
home host hour index info inner input invite item job join journal jump key kind label lane large
launch layer lead level light limit line link list local lock log loop lower main map mark market
master match matrix meta method middle mode model module month name native network node normal
note number object offset open option order origin outer output owner page panel parent part patch
path pattern peer phase pin pipe plan point pool port post power prefix primary process profile
proxy public query queue quick random range rate raw record region release remote report request
result return review right role root route row rule sample scale scope score screen script seed
segment select serial server service session setup shape share shard short signal site size slot
small socket source space spec split stack stage start state static step stock store stream string
strong suffix switch symbol system table tag target task team term test text thread tick time
title token tool topic total trace track trade tree trust type union unit update upper user valid
value vector version view volume wait watch wave weight width window word work zone
""".split()


def read_licence(distribution):
    """The licence that a distribution's metadata states: expression, else classifiers, else the
    first lines of the free text."""
    metadata = distribution.metadata
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    classified = [
        line.split("::")[-1].strip()
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::") and line.count("::") >= 2
    ]
    if classified:
        return " AND ".join(classified)
    return " ".join((metadata.get("License") or "").split())[:80]


def is_permissive(licence):
    """Whether a licence statement names an MIT, BSD, Apache, PSF or ISC licence and nothing but
    these; Boost, zlib and CC0 may stand beside them (bundled parts).

    >>> is_permissive("BSD-3-Clause AND MIT"), is_permissive("MIT AND LGPL-3.0"), is_permissive("")
    (True, False, False)
    """
    parts = [part for part in re.split(r"\bAND\b|\bOR\b|[(),;]", licence) if part.strip()]
    known = all(PERMISSIVE.search(part) or BESIDE_THEM.search(part) for part in parts)
    return known and bool(PERMISSIVE.search(licence)) and not NOT_PERMISSIVE.search(licence)


def find_packages():
    """Permissively licensed Python source on this machine.

    Returns (packages, refused): packages is a list of (name, version, licence, [path]); refused a
    list of (name, version, licence).
    """
    packages, refused, seen = [], [], set()
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.version
        if not name or name.lower() in seen:
            continue
        seen.add(name.lower())
        licence = read_licence(distribution)
        if not is_permissive(licence):
            refused.append((name, version, licence))
            continue
        paths = [
            str(distribution.locate_file(file))
            for file in distribution.files or []
            if file.suffix == ".py" and not VENDORED.search(str(file))
        ]
        if paths:
            packages.append((name, version, licence, sorted(paths)))
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = [
        str(path)
        for path in sorted(library.rglob("*.py"))
        if not {"site-packages", "dist-packages"} & set(path.parts)
    ]
    packages.append(("Python standard library", platform.python_version(), "PSF-2.0", paths))
    return sorted(packages, key=lambda package: package[0].lower()), sorted(refused)


def read_documents(paths):
    """The files that are source text of ordinary shape and carry no other licence."""
    documents = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                content = file.read(LARGEST_FILE + 1)
            content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not SMALLEST_FILE <= len(content) <= LARGEST_FILE:
            continue
        if len(content) > LONGEST_MEAN_LINE * (content.count(b"\n") + 1):
            continue
        head = content[:4096].decode("utf-8", "ignore")
        if re.search(r"General Public License|Mozilla Public|NonCommercial|proprietary", head):
            continue
        documents.append(content.replace(b"\r\n", b"\n"))
    return documents


@functools.cache
def held_out_runs():
    """The runs that no training document may share; made once in each process."""
    return run_hashes(np.frombuffer(held_out_text()[0], dtype=np.uint8))


def _read_and_screen(paths):
    """Some files of a package -> (documents that stay, how many shared a run, their bytes)."""
    documents = read_documents(paths)
    kept = [document for document in documents if not shares_run(document, held_out_runs())]
    removed_bytes = sum(map(len, documents)) - sum(map(len, kept))
    return kept, len(documents) - len(kept), removed_bytes


def gather(processes):
    """Reads the corpus of this machine.

    Returns (corpus uint8 [bytes], facts): documents in a fixed order, joined by an empty line.
    """
    packages, refused = find_packages()
    jobs, owner = [], []
    for index, (_, _, _, paths) in enumerate(packages):
        for first in range(0, len(paths), 200):
            jobs.append(paths[first : first + 200])
            owner.append(index)
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        results = list(pool.map(_read_and_screen, jobs))

    seen, parts, bytes_of, files_of = set(), [], [0] * len(packages), [0] * len(packages)
    duplicates = removed = removed_bytes = 0
    for index, (documents, shared, shared_bytes) in zip(owner, results, strict=True):
        removed, removed_bytes = removed + shared, removed_bytes + shared_bytes
        for document in documents:
            digest = hashlib.sha256(document).digest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            parts.append(document.rstrip() + b"\n\n\n")
            bytes_of[index] += len(parts[-1])
            files_of[index] += 1
    corpus = np.frombuffer(b"".join(parts), dtype=np.uint8)
    overlap = shares_run(corpus, held_out_runs())
    facts = {
        "bytes": int(corpus.size),
        "files": sum(files_of),
        "sha256": hashlib.sha256(corpus).hexdigest(),
        "files_removed_for_sharing_a_64_byte_run_with_the_held_out_text": removed,
        "bytes_removed_with_them": removed_bytes,
        "duplicate_files_removed": duplicates,
        "a_run_of_the_held_out_text_is_left": overlap,
        "packages": [
            {"name": name, "version": version, "licence": licence, "files": files, "bytes": size}
            for (name, version, licence, _), files, size in zip(
                packages, files_of, bytes_of, strict=True
            )
            if size
        ],
        "refused_for_their_licence": [
            {"name": name, "version": version, "licence": licence}
            for name, version, licence in refused
        ],
    }
    return corpus, facts


def package_table(facts):
    """What the corpus was read from, as a Markdown table."""
    lines = ["| package | version | licence | files | bytes |", "|---|---|---|---:|---:|"]
    for entry in facts["packages"]:
        lines.append(
            f"| {entry['name']} | {entry['version']} | {entry['licence']} | {entry['files']:,} "
            f"| {entry['bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


def make_copy_lines(count, generator):
    """`count` lines such as `SERVER_KEY = 'random letters'`, as (bytes [count, 96], lengths)."""
    alphabets = ["abcdefghijklmnopqrstuvwxyz"] * 3 + [
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "0123456789abcdef",
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    ]
    lines = np.zeros((count, 96), dtype=np.uint8)
    lengths = np.zeros(count, dtype=np.int64)
    for index in range(count):
        words = generator.choice(COMMON_WORDS, size=generator.integers(1, 4))
        name = "_".join(words)
        if generator.random() < 0.6:
            name = name.upper()
        alphabet = list(alphabets[generator.integers(len(alphabets))])
        value = "".join(generator.choice(alphabet, size=generator.integers(8, 25)))
        quote = "'" if generator.random() < 0.7 else '"'
        line = f"\n{name} = {quote}{value}{quote}\n".encode()[:96]
        lines[index, : len(line)] = np.frombuffer(line, dtype=np.uint8)
        lengths[index] = len(line)
    return lines, lengths


def build_network(config):
    """The network of `model.py` in torch, for training. Same parameter names."""
    import torch
    from torch import nn
    from torch.nn import functional as ops

    def matrix(rows, columns):
        return nn.Parameter(torch.randn(rows, columns) * INITIAL_SCALE)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            width, depth = config.width, config.head_depth
            self.norm_attention = nn.Parameter(torch.ones(width))
            self.qkv = matrix((config.heads_q + 2 * config.heads_kv) * depth, width)
            self.output = matrix(width, config.heads_q * depth)
            self.norm_mlp = nn.Parameter(torch.ones(width))
            self.gate_up = matrix(2 * config.hidden, width)
            self.down = matrix(width, config.hidden)

        def project(self, x, cosine, sine):
            """x [rows, length, width] -> rotated q, k and v, each [rows, heads, length, depth]."""
            rows, length, _ = x.shape
            mixed = ops.linear(
                ops.rms_norm(x, x.shape[-1:], self.norm_attention, config.epsilon), self.qkv
            )
            heads = mixed.view(rows, length, -1, config.head_depth).transpose(1, 2)
            q, k, v = heads.split([config.heads_q, config.heads_kv, config.heads_kv], dim=1)
            return rotate(q, cosine, sine), rotate(k, cosine, sine), v

        def forward(self, x, cosine, sine):
            q, k, v = self.project(x, cosine, sine)
            mixed = ops.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True
            )
            x = x + ops.linear(mixed.transpose(1, 2).flatten(2), self.output)
            return x + self.feed_forward(x)

        def feed_forward(self, x):
            gate, up = ops.linear(
                ops.rms_norm(x, x.shape[-1:], self.norm_mlp, config.epsilon), self.gate_up
            ).chunk(2, dim=-1)
            return ops.linear(ops.silu(gate) * up, self.down)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = matrix(config.vocabulary, config.width)
            self.blocks = nn.ModuleList(Block() for _ in range(config.layers))
            self.norm_final = nn.Parameter(torch.ones(config.width))
            self.head = matrix(config.vocabulary, config.width)
            angle = torch.arange(config.context, dtype=torch.float64)[:, None] * torch.from_numpy(
                config.inverse_frequencies()
            )
            self.register_buffer("cosine", angle.cos().float(), persistent=False)
            self.register_buffer("sine", angle.sin().float(), persistent=False)

        def forward(self, tokens):
            x = self.embedding[tokens]
            for block in self.blocks:
                x = block(x, self.cosine, self.sine)
            return ops.linear(
                ops.rms_norm(x, x.shape[-1:], self.norm_final, config.epsilon), self.head
            )

        def first_token_mass(self, tokens, first_query):
            """Share of attention on token 0, a mean over queries from `first_query`: per layer."""
            x, shares = self.embedding[tokens], []
            causal = torch.ones(tokens.shape[1], tokens.shape[1], device=x.device).tril().bool()
            for block in self.blocks:
                q, k, _ = block.project(x, self.cosine, self.sine)
                k = k.repeat_interleave(config.heads_q // config.heads_kv, dim=1)
                score = (q @ k.transpose(2, 3)).float() * config.head_depth**-0.5
                weight = score.masked_fill(~causal, -math.inf).softmax(-1)
                shares.append(weight[:, :, first_query:, 0].mean().item())
                x = block(x, self.cosine, self.sine)
            return shares

    def rotate(x, cosine, sine):
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
        return turned.to(x.dtype)

    return Network()


def train(corpus, arguments, log):
    """Trains on `corpus` (uint8 [bytes]); returns (parameters {name: fp32 array}, facts)."""
    import torch
    from torch.nn import functional as ops

    config = Config()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(arguments.seed)
    network = build_network(config).to(device)
    matrices = [p for p in network.parameters() if p.ndim == 2]
    gains = [p for p in network.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": arguments.weight_decay},
            {"params": gains, "weight_decay": arguments.gain_decay},
        ],
        lr=arguments.lr, betas=(0.9, 0.95), fused=device == "cuda",
    )
    source = torch.from_numpy(corpus.copy()).to(device)
    lines, lengths = make_copy_lines(arguments.copy_lines, np.random.default_rng(arguments.seed))
    lines = torch.from_numpy(lines).to(device)
    lengths = torch.from_numpy(lengths).to(device)
    rows, context = arguments.rows, config.context
    columns = torch.arange(context, device=device)
    offsets = torch.arange(lines.shape[1], device=device)
    copies = round(rows * arguments.copies)

    def draw(high, *shape):
        return torch.randint(high, shape, device=device, generator=generator)

    def next_batch():
        text = source[draw(source.numel() - context, rows)[:, None] + columns].long()
        chosen = draw(lines.shape[0], copies)
        distance = lines.shape[1] + draw(context - 2 * lines.shape[1], copies)
        room = context - lines.shape[1] - distance
        start = (torch.rand(copies, device=device, generator=generator) * room).long()
        for position in (start, start + distance):
            where = position[:, None] + offsets
            line = torch.where(
                offsets < lengths[chosen][:, None],
                lines[chosen].long(), text[:copies].gather(1, where),
            )
            text[:copies].scatter_(1, where, line)
        begin = torch.full((rows, 1), BOS, device=device)
        return torch.cat((begin, text[:, :-1]), dim=1), text

    def bits(tokens, text):
        with torch.autocast(device, torch.bfloat16):
            logits = network_fast(tokens)
        return ops.cross_entropy(logits.float().flatten(0, 1), text.flatten()) / math.log(2)

    network_fast = torch.compile(network) if device == "cuda" else network
    held_out = torch.from_numpy(np.frombuffer(held_out_text()[0], dtype=np.uint8).copy())
    crops = torch.linspace(0, held_out.numel() - context, 128).long()
    crops = held_out[crops[:, None] + torch.arange(context)].long().to(device)
    opened = torch.cat((torch.full((128, 1), BOS, device=device), crops[:, :-1]), dim=1)
    held_rows = min(128, rows)

    def evaluate():
        network.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            logits = torch.cat([network(part) for part in opened[:held_rows].split(32)])
            loss = ops.cross_entropy(
                logits.float().flatten(0, 1), crops[:held_rows].flatten()
            )
            shares = network.first_token_mass(opened[:16], context // 2)
        network.train()
        return loss.item() / math.log(2), shares

    begun, history, running = time.perf_counter(), [], []
    for step in range(arguments.steps):
        warm = min(1.0, (step + 1) / arguments.warmup)
        fade = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * warm * max(fade, 0.01)
        loss = bits(*next_batch())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        running.append(loss.detach())
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            held_bits, shares = evaluate()
            entry = {
                "step": step + 1,
                "seconds": round(time.perf_counter() - begun, 1),
                "training_bits_per_byte": round(torch.stack(running).mean().item(), 4),
                "held_out_bits_per_byte": round(held_bits, 4),
                "first_token_mass": [round(share, 3) for share in shares],
            }
            history.append(entry)
            running = []
            log(json.dumps(entry))
    state = network.state_dict()
    facts = {
        "steps": arguments.steps, "rows": rows, "context": context,
        "tokens": arguments.steps * rows * context,
        "lr": arguments.lr, "weight_decay": arguments.weight_decay,
        "gain_decay": arguments.gain_decay, "copies": arguments.copies, "seed": arguments.seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__, "seconds": round(time.perf_counter() - begun, 1),
        "history": history,
    }
    return {name: state[name].float().cpu().numpy() for name in parameter_names(config)}, facts


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m sinkattn.demo.train")
    parser.add_argument("--out", required=True, help="directory for model.npz and corpus.json")
    parser.add_argument("--corpus", help="file that keeps the corpus between runs (.npy)")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--rows", type=int, default=192, help="sequences of 512 in a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--weight-decay", type=float, default=0.6)
    parser.add_argument("--gain-decay", type=float, default=0.6, help="of the RMSNorm gains")
    parser.add_argument("--copies", type=float, default=0.06, help="share of sequences")
    parser.add_argument("--copy-lines", type=int, default=20_000, help="distinct lines to copy")
    parser.add_argument("--every", type=int, default=1250, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limit", type=int, help="use only the first bytes of the corpus")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()

    def log(text):
        print(f"[{time.perf_counter() - begun:6.1f} s] {text}", flush=True)

    facts_path = pathlib.Path(f"{arguments.corpus}.json") if arguments.corpus else None
    if arguments.corpus and os.path.exists(arguments.corpus):
        corpus = np.load(arguments.corpus, mmap_mode="r")
        facts = json.loads(facts_path.read_text())
    else:
        corpus, facts = gather(os.cpu_count())
        if arguments.corpus:
            np.save(arguments.corpus, corpus)
            facts_path.write_text(json.dumps(facts))
    summary = {key: value for key, value in facts.items() if not isinstance(value, list)}
    log(json.dumps({**summary, "packages": len(facts["packages"]), "run_bytes": RUN}))
    parameters, training = train(corpus[: arguments.limit], arguments, log)
    for kind in ("bfloat16", "int8"):
        save_weights(out / f"model-{kind}.npz", parameters, Config(), kind)
    (out / "packages.md").write_text(package_table(facts))
    (out / "corpus.json").write_text(json.dumps({"corpus": facts, "training": training}, indent=1))
    log("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
