"""A captured decode step gives the tokens of one that is not. Where there is no GPU the graph is played by a step
that runs again: what the host does around it is the same."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import CACHE, build, left_padded, tokens

import sinkattn.hf as hf
from sinkattn.hf import graphs as captures

pytestmark = pytest.mark.filterwarnings("ignore:SinkCache.*every layer of this model slides")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def a_stand_in(monkeypatch):
    """Without a GPU: nothing happens while a step is recorded but what its Python says of the host's columns."""
    if DEVICE == "cuda":
        return

    def record(step, device):
        class Results(dict):
            def __getattr__(self, name):
                return self[name]
        results, layers = Results(), next(cell.cell_contents for cell in step.__closure__
                                      if isinstance(cell.cell_contents, captures.Captured)).cache.layers

        def replay():
            for layer in layers:
                layer.columns -= 1
            results.update(step())
        for layer in layers:
            layer.columns += 1
        return results, replay
    monkeypatch.setattr(captures, "record", record)
    monkeypatch.setattr(captures, "_DEVICES", ("cpu",))


def made(family, rows=3):
    model = hf.enable(build(family)).to(DEVICE)
    ids, padding = (x.to(DEVICE) for x in left_padded(rows))
    return model, ids, padding, hf.SinkCache(model, sinks=2, window=12)


def more(model, cache, ids, padding, count=16, **keywords):
    return model.generate(ids, attention_mask=padding, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                          **{CACHE: cache}, **keywords)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gpt_neox", "gemma2"])
def test_the_same_tokens(family):
    """Left-padded rows, past the window, in two turns; sliding layers beside full ones."""
    model, ids, padding, cache = made(family)
    if family == "gpt_oss":
        model.set_experts_implementation("eager") if DEVICE == "cpu" else pytest.skip("its experts wait for the device")
    results = []
    for captured in (False, True):
        cache.reset()
        guard = hf.capture(model, cache) if captured else None
        first = more(model, cache, ids, padding)
        said = tokens(3, 5).to(DEVICE)
        text = torch.cat([first, said], 1)
        mask = torch.cat([padding, padding.new_ones(3, text.shape[1] - padding.shape[1])], 1)
        results.append(more(model, cache, text, mask))
        if captured:
            assert guard.replays == 14 + 15  # a turn's first token is the prompt's; the first step found nothing warm
            guard.close()
    assert (results[0] == results[1]).all()
    assert "forward" not in model.__dict__


def test_beams_and_another_batch():
    """Rows change places between steps; other rows have other memory, and are captured again."""
    model, ids, padding, cache = made("llama", rows=2)
    with hf.capture(model, cache) as guard:
        for rows, beams in ((2, 2), (1, 1)):
            cache.reset()
            got = more(model, cache, ids[:rows], padding[:rows], num_beams=beams)
            with torch.no_grad():
                fresh = hf.SinkCache(model, sinks=2, window=12)
                assert (more(model, fresh, ids[:rows], padding[:rows], num_beams=beams) == got).all()
        assert guard.replays > 20


def test_other_calls_run_as_always():
    """With gradients, more tokens at a time, hidden states asked for, a row that has no token."""
    model, ids, padding, cache = made("llama")
    other = hf.SinkCache(model, sinks=2, window=12)
    ones = torch.ones(3, 1, dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        for at in (cache, other):
            model(ids, attention_mask=padding, **{CACHE: at})
        with hf.capture(model, cache) as guard:
            for step in range(7):
                width = 2 if step == 4 else 1
                token = tokens(3, width, seed=step).to(DEVICE)
                padding = torch.cat([padding, *[ones] * width], 1)
                if step == 6:
                    padding[1, -1] = 0
                asked = {"output_hidden_states": True} if step == 3 else {}
                got, expected = (model(token, attention_mask=padding, **{CACHE: at}, **asked)
                                 for at in (cache, other))
                torch.testing.assert_close(got.logits, expected.logits, rtol=2e-5, atol=2e-5)
                assert guard.replays == [0, 1, 2, 2, 2, 3, 4][step]
            assert cache.get_seq_length() == other.get_seq_length()
            assert (cache.layers[0].stream.length == other.layers[0].stream.length).all()


def test_what_changes_the_model_is_captured_again():
    """Other sink logits, another attention: a replay of what was recorded before would be wrong."""
    model, ids, padding, cache = made("llama")
    fresh = hf.SinkCache(model, sinks=2, window=12)
    with torch.no_grad(), hf.capture(model, cache) as guard:
        for at in (cache, fresh):
            model(ids, attention_mask=padding, **{CACHE: at})
        for step in range(6):
            if step == 3:
                hf.set_sink_logits(model, 3.0)
            padding = torch.cat([padding, padding.new_ones(3, 1)], 1)
            got, expected = (model(tokens(3, 1, seed=step).to(DEVICE), attention_mask=padding, **{CACHE: at}).logits
                             for at in (cache, fresh))
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
        assert guard.replays == 2 + 2
        hf.set_sink_logits(model, None)
        model.set_attn_implementation("eager")
        with pytest.raises(NotImplementedError, match="the model does not use the attention implementation 'sinkattn'"):
            model(ids[:, :1], attention_mask=torch.cat([padding, padding[:, -1:]], 1), **{CACHE: cache})


def test_what_cannot_be_captured(monkeypatch):
    model, ids, padding, cache = made("llama")
    with pytest.raises(TypeError, match=r"capture\(\): cache is DynamicCache, expected a SinkCache"):
        from transformers import DynamicCache
        hf.capture(model, DynamicCache())
    with pytest.raises(TypeError, match=r"capture\(\): model is Linear, expected a model of transformers"):
        hf.capture(torch.nn.Linear(2, 2), cache)
    with hf.capture(model, cache):
        with pytest.raises(ValueError, match=r"capture\(\): forward of this model is replaced already"):
            hf.capture(model, cache)

        def refuse(step, device):
            step()
            raise RuntimeError("operation not permitted when stream is capturing")
        monkeypatch.setattr(captures, "record", refuse)
        with pytest.raises(NotImplementedError, match=r"a step of LlamaForCausalLM cannot be captured.*not permitted"):
            more(model, cache, ids, padding)
        assert cache.get_seq_length() == ids.shape[1] + 1
    monkeypatch.setattr(captures, "_DEVICES", ())
    with pytest.raises(NotImplementedError, match=r"capture\(\): the model is on"):
        hf.capture(model, cache)
    monkeypatch.setattr(captures, "_DEVICES", (DEVICE,))
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids: None)
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM takes no position_ids"):
        hf.capture(model, cache)
