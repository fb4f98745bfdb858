"""The parts of the demo, each against something that is not the demo."""

import collections
import types

import numpy as np
import pytest

from sinkattn.demo import measure, recall
from sinkattn.demo.cli import MODEL, parse
from sinkattn.demo.methods import Dense, Streaming, recompute, with_bos
from sinkattn.demo.model import BOS, Model, load_weights, save_weights
from sinkattn.demo.text import DATA, HELD_OUT, RUN, held_out_text, run_hashes, shares_run
from sinkattn.demo.train import is_permissive
from sinkattn.demo.workers import Workers


@pytest.fixture(scope="module")
def model():
    return Model.load(MODEL)


@pytest.fixture(scope="module")
def text():
    return np.frombuffer(held_out_text()[0], dtype=np.uint8)


def forward_float64(tokens):
    """The model written out: one sequence, float64, a softmax over the whole score matrix, and
    rotary positions as complex numbers. -> logits [length, vocabulary]"""
    config, weights = load_weights(MODEL)
    weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, gain):
        return gain * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)

    def turn(x):
        half = config.head_depth // 2
        angle = np.outer(np.arange(len(x)), 1e4 ** (-np.arange(half) / half))
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = weights["embedding"][tokens]
    future = np.triu(np.ones((len(tokens), len(tokens)), dtype=bool), 1)
    for layer in range(config.layers):
        w = {name.split(".")[-1]: value for name, value in weights.items()
             if name.startswith(f"blocks.{layer}.")}
        heads = (norm(x, w["norm_attention"]) @ w["qkv"].T).reshape(len(x), -1, config.head_depth)
        seen = []
        for head in range(config.heads_q):
            group = head // (config.heads_q // config.heads_kv)
            k, v = heads[:, config.heads_q + group], heads[:, config.heads_q + config.heads_kv + group]
            score = turn(heads[:, head]) @ turn(k).T / np.sqrt(config.head_depth)
            weight = np.exp(np.where(future, -np.inf, score - score.max(axis=1, keepdims=True)))
            seen.append(weight / weight.sum(axis=1, keepdims=True) @ v)
        x = x + np.concatenate(seen, axis=1) @ w["output"].T
        gate, up = np.split(norm(x, w["norm_mlp"]) @ w["gate_up"].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["down"].T
    return norm(x, weights["norm_final"]) @ weights["head"].T


@pytest.mark.parametrize("make", [
    lambda config: Dense(config, 1, 200),
    lambda config: Streaming(config, 1, 4, 256),
    lambda config: Streaming(config, 1, 0, 256),
], ids=["dense", "sinks + window", "window"])
def test_logits_are_those_of_the_model_written_out(make, model, text):
    tokens = with_bos(text[None, :200])
    attention, expected = make(model.config), forward_float64(tokens[0])
    parts = [model.forward(tokens[:, a:b], attention) for a, b in ((0, 130), (130, 131), (131, 200))]
    np.testing.assert_allclose(np.concatenate(parts, axis=1)[0], expected, atol=2e-3)


@pytest.mark.parametrize("position", [0, 5, 62, 63, 64, 190])
def test_recomputation_sees_bos_and_the_bytes_of_its_window(position, model, text):
    slots, known = 64, text[:200]
    before = known[max(0, position - (slots - 1)) : position].astype(np.int64)
    logits = forward_float64(np.concatenate([[BOS], before]))[-1]
    expected = (np.log(np.exp(logits).sum()) - logits[known[position]]) / np.log(2)
    rows, at = np.zeros(1, dtype=np.int64), np.array([position])
    with Workers() as workers:
        found = recompute(model, known[None], rows, at, slots, workers)
    assert found[0] == pytest.approx(expected, abs=2e-3)


def test_a_cache_does_not_grow_and_a_buffer_does(model):
    cache = Streaming(model.config, 1, 4, 32)
    before = cache.nbytes
    model.forward(np.full((1, 500), BOS), cache)
    assert cache.nbytes == before
    assert Dense(model.config, 1, 2000).nbytes == 2 * Dense(model.config, 1, 1000).nbytes


@pytest.mark.parametrize("kind, error", [("bfloat16", 2.0**-8), ("int8", 0.5 / 127)])
def test_weights_survive_their_storage(kind, error, tmp_path):
    config, weights = load_weights(MODEL)
    save_weights(tmp_path / "again.npz", weights, config, kind)
    read_config, read = load_weights(tmp_path / "again.npz")
    assert read_config == config
    for name, value in weights.items():
        largest = np.abs(value).max(axis=-1, keepdims=True)
        assert (np.abs(read[name] - value) <= 1.001 * error * largest).all(), name


def test_what_ships_is_small_and_explained():
    assert MODEL.stat().st_size <= 10_000_000
    assert HELD_OUT.stat().st_size >= 256 * 1024
    assert HELD_OUT.name in (DATA / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("length, found", [(RUN - 1, False), (RUN, True), (RUN + 9, True)])
@pytest.mark.parametrize("offset", [0, 1, 977])
def test_a_run_of_the_held_out_text_is_found_at_any_offset(length, found, offset):
    random = np.random.default_rng(3)
    secret = random.integers(0, 256, 5000, dtype=np.uint8)
    document = random.integers(0, 256, 3000, dtype=np.uint8)
    document[offset : offset + length] = secret[1234 : 1234 + length]
    assert shares_run(document.tobytes(), run_hashes(secret)) == found


def test_the_planted_letters_come_again_at_the_distance(text):
    rows = recall.place(text, 100, 8, 300, np.random.default_rng(0))
    assert rows.shape == (8, 316)
    for row in rows:
        letters = row[300:].tobytes()
        assert letters.isalpha() and letters.islower()
        assert row[200:216].tobytes() == letters and row[216:218].tobytes() == b"'\n"
        head = row[:300].tobytes().rsplit(b"\n", 1)[1]
        assert head.endswith(b" = '") and row[:200].tobytes().endswith(b"\n" + head)
        assert row.tobytes().count(letters) == 2


@pytest.mark.parametrize("slots", [64, 100, 256, 2000])
def test_recall_is_asked_inside_and_beyond_any_window(slots):
    asked = recall.distances(slots)
    assert min(asked) >= recall.shortest_distance() and max(asked) >= 2 * slots
    assert asked == sorted(set(asked)) and sum(d < slots for d in asked) >= 1


def test_positions_are_distinct_and_even_over_the_buckets():
    buckets = measure.edges(5000, 512)
    assert buckets == [(0, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 5000)]
    rows, at = measure.draw_positions(buckets, 3, 500, np.random.default_rng(1))
    assert len(set(zip(rows.tolist(), at.tolist()))) == len(at) == 500
    assert [((at >= a) & (at < b)).sum() for a, b in buckets] == [100] * 5
    assert set(rows.tolist()) == {0, 1, 2}


def test_a_short_text_goes_round():
    rows = measure.lay_out(np.arange(10, dtype=np.uint8), 25, 2)
    np.testing.assert_array_equal(rows, np.add.outer([0, 5], np.arange(25)) % 10)


def test_a_long_stream_is_alone_unless_asked():
    assert parse(["--tokens", "8192"]).streams == 4
    assert parse(["--tokens", "1000000"]).streams == 1
    assert parse(["--tokens", "1000000", "--streams", "2"]).streams == 2


@pytest.mark.parametrize("licence, kept", [
    ("MIT", True), ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
    ("Apache Software License", True), ("PSF-2.0", True), ("ISC License (ISCL)", True),
    ("", False), ("Zlib", False), ("MPL-2.0 AND MIT", False), ("LicenseRef-NVIDIA-Proprietary", False),
    ("GNU General Public License v3 (GPLv3)", False), ("MIT OR LGPL-2.1", False),
])
def test_which_licences_are_trained_on(licence, kept):
    assert is_permissive(licence) == kept


def test_progress_is_silent_unless_on_a_terminal():
    from sinkattn.demo.progress import Progress
    written = collections.defaultdict(list)
    for terminal in (False, True):
        file = types.SimpleNamespace(
            isatty=lambda terminal=terminal: terminal, flush=lambda: None,
            write=written[terminal].append,
        )
        bar = Progress(10, file)
        bar.stage("reading")
        bar.advance(10)
        bar.close()
    assert not written[False]
    assert "reading" in "".join(written[True])
