"""The notebooks and the examples run, from their own text: without Jupyter, and small.

SINKATTN_QUICK=1 asks for sizes that show nothing and run in seconds, where a notebook has them.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
OPTIONAL = ("matplotlib", "torch", "transformers", "ml_dtypes")

pytestmark = pytest.mark.skipif(bool(os.environ.get("SINKATTN_INSTRUMENTED")), reason="minutes, where every line is counted")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Of torch, which else waits for a second one by turning in circles, on a machine that is busy."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if importlib.util.find_spec("torch"):
        import torch
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)
    else:
        yield


def code_of(notebook):
    """The code cells' text, without Jupyter's own commands."""
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(line for line in cell["source"] if not line.startswith("%"))
            for cell in cells if cell["cell_type"] == "code"]


def needs(text):
    """Optional packages that the code imports, also through ours."""
    found = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    found |= {"torch"} if re.search(r"train_with_sinks|sinkattn\.(torch|hf)", text) else set()
    found |= {"transformers"} if "sinkattn.hf" in text else set()
    return [name for name in OPTIONAL if name in found]


@pytest.mark.skipif(not NOTEBOOKS, reason="the examples are not part of a source distribution")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of other libraries
def test_a_notebook_runs(notebook, monkeypatch):
    cells = code_of(notebook)
    for name in needs("\n".join(cells)):
        pytest.importorskip(name)
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.get_fignums())) or plt.close("all"))
    monkeypatch.setenv("SINKATTN_QUICK", "1")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(EXAMPLES)
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for i, cell in enumerate(cells):
            exec(compile(cell, f"{notebook.name}, code cell {i + 1}", "exec"), names)
    assert shown or plt.get_fignums()
    plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_holds_its_outputs(notebook):
    cells = json.loads(notebook.read_text())["cells"]
    assert notebook.stat().st_size < 300_000
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)


@pytest.mark.skipif(not NOTEBOOKS, reason="the examples are not part of a source distribution")
def test_training_with_sinks_answers():
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, EXAMPLES / "train_with_sinks.py", "--quick", "--steps", "3"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr
    shares = {line.split()[0]: [float(x) for x in re.findall(r"([\d.]+) %", line)][:3]
              for line in done.stdout.splitlines() if line.split()[0] in ("plain", "learned", "null")}
    assert shares.keys() == {"plain", "learned", "null"}
    for kind, (start, sink, text) in shares.items():
        assert start + sink + text == pytest.approx(100, abs=0.2)
        assert (sink > 0) == (kind != "plain")


def test_the_examples_loss_falls_and_its_shares_are_those_of_the_weights():
    """Against a softmax written out."""
    torch = pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("train_with_sinks", EXAMPLES / "train_with_sinks.py")
    if spec is None or not (EXAMPLES / "train_with_sinks.py").exists():
        pytest.skip("the examples are not part of a source distribution")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    _, losses = example.trained("learned", torch.arange(64).repeat(20), {**example.QUICK, "steps": 20})
    assert losses[-1] < losses[0] - 1
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 2, 10, 8)
    logits = torch.tensor([0.5, -1.0])
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf)
    weights = torch.softmax(torch.cat([scores, logits[:, None, None].expand(3, 2, 10, 1)], -1), -1)[:, :, 5:]
    shares = example.shares(q, k, k, logits)
    for name, part in (("start", weights[..., 0]), ("sink", weights[..., -1]), ("text", weights[..., 1:-1].sum(-1))):
        torch.testing.assert_close(shares[name], part.mean((0, 2)))
