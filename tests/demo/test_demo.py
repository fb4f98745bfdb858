"""The shipped model, its text, and the command."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from sinkattn.demo import main
from sinkattn.demo.methods import Dense, Streaming, stream
from sinkattn.demo.report import label
from sinkattn.demo.text import DATA, HELD_OUT_LICENCE, held_out_text


@pytest.fixture(scope="module")
def model():
    from sinkattn.demo.model import Model
    return Model.load(DATA / "model.npz")


@pytest.fixture(scope="module")
def rows():
    text = np.frombuffer(held_out_text()[0], dtype=np.uint8)
    return np.stack([text[:300], text[1000:1300]])


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_stream_does_not_depend_on_its_chunks(chunk, model, rows):
    rows = rows[:, :120] if chunk == 1 else rows
    whole = stream(model, Streaming(model.config, 2, 4, 64), rows, chunk=300)
    cut = stream(model, Streaming(model.config, 2, 4, 64), rows, chunk=chunk)
    np.testing.assert_allclose(cut, whole, atol=2e-3)


def test_a_cache_that_holds_all_is_dense(model, rows):
    dense = stream(model, Dense(model.config, 2, 300), rows)
    np.testing.assert_allclose(stream(model, Streaming(model.config, 2, 4, 400), rows), dense,
                               atol=2e-3)


def test_the_model_predicts_better_than_letters_at_random(model, rows):
    """Bits per byte of real text, against 8 for no model: a broken layer or weight shows."""
    assert stream(model, Dense(model.config, 2, 300), rows)[:, 50:].mean() < 2.5


def test_the_command_reports_what_it_should(capsys):
    arguments = ["--tokens", "700", "--streams", "1", "--samples", "60", "--plants", "2", "--json", "-"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    past = results["same_positions"]["past_trained_length"]
    assert past["dense"] > past["sinks + window"]
    assert past["window"] > 1.1 * past["sinks + window"]
    for entry in results["recall"]:
        if entry["method"] == "sinks + window":
            assert (entry["bits_per_letter"] < 2) == entry["in_window"]
    for shares in results["first_token_mass"].values():
        assert min(shares) > 0.1


def test_what_a_person_sees(capsys, tmp_path):
    """Tables, conclusions and the picture agree with the figures of the same run."""
    record, picture = tmp_path / "all.json", tmp_path / "both.png"
    arguments = ["--tokens", "640", "--streams", "1", "--samples", "40", "--plants", "2", "--json", str(record)]
    plot = ["--plot", str(picture)] if importlib.util.find_spec("matplotlib") else []
    assert main(arguments + plot) == 0
    text, results = capsys.readouterr().out, json.loads(record.read_text())
    for name, method in results["methods"].items():
        line = next(x for x in text.splitlines() if x.startswith(label(name, results["settings"])))
        assert f"{method['bits_per_byte'][0]:.3f}" in line
    assert f"{results['same_positions']['sinks_window_over_recomputed']:.3f} (95 %" in text
    assert "chance is 4.70" in text
    assert "attention on the first token" in text
    if plot:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_options_are_refused(capsys):
    assert main(["--text", "/no/such/file"]) == 2
    with pytest.raises(SystemExit):
        main(["--sinks", "64", "--window", "64"])
    assert "leaves no room" in capsys.readouterr().err


def test_no_torch_and_a_licence():
    assert "MIT" in HELD_OUT_LICENCE.read_text() or "Permission is hereby granted" in HELD_OUT_LICENCE.read_text()
    code = "import sys, sinkattn.demo.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
