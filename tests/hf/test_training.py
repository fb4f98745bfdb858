"""Training: the gradient of every parameter is that of eager attention."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from hf_models import CACHE, EVERY, build, left_padded, tokens

import sinkattn.hf as hf


def gradients(model, ids, **keywords):
    """(loss, {name: gradient}) of a step of training."""
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids, **keywords).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                         if parameter.grad is not None}


def assert_same(got, expected, bound=1e-5):
    """Relative L2; where the gradient of a whole parameter is rounding (k_proj.bias: softmax does not feel
    it), against the largest of all."""
    largest = max(gradient.norm() for gradient in expected[1].values())
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (got[1][name] - gradient).norm() <= bound * max(gradient.norm(), 1e-3 * largest), name


@pytest.mark.parametrize("family", EVERY)
def test_gradients_are_those_of_eager(family):
    model = build(family).train()
    ids, padding = left_padded(3, 20)
    padding[0, 17:] = 0  # the first row on the right
    labels = ids.masked_fill(padding == 0, -100)
    labels[:, 1:].masked_fill_(padding[:, :-1] == 0, -100)  # what padding predicts is garbage in eager
    given = {"attention_mask": padding, "use_cache": False}

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=labels, **given).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    expected = step()
    hf.enable(model)
    got = step()
    assert_same(got, expected)
    if family == "gpt_oss":
        sinks = [name for name in got[1] if name.endswith("sinks")]
        assert len(sinks) == 2 and all(got[1][name].norm() > 0 for name in sinks)


def test_gradient_checkpointing():
    """The attention runs twice."""
    model, ids = build("gpt_oss").train(), tokens(2, 20)
    expected = gradients(model, ids, use_cache=False)
    hf.enable(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_same(gradients(model, ids, use_cache=False), expected)


def test_half_precision():
    """No further from the truth than eager attention in the same dtype."""
    model, ids = build("llama").train(), tokens(2, 20)
    _, exact = gradients(model, ids)
    model.bfloat16()
    _, eager = gradients(model, ids)
    _, ours = gradients(hf.enable(model), ids)

    def error(got):
        return sum((got[name].float() - exact[name]).square().sum() for name in exact).sqrt()
    assert error(ours) <= 1.5 * error(eager)


def test_packed_sequences():
    """A batch without padding, by position_ids: as the sequences one by one."""
    model, ids = hf.enable(build("llama")).train(), tokens(1, 24)
    labels = ids.clone()
    labels[:, 9] = -100  # nothing predicts the first token of the second
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    model(ids, labels=labels, position_ids=positions, use_cache=False).loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for part in (ids[:, :9], ids[:, 9:]):
        (model(part, labels=part).loss * (part.shape[1] - 1) / 22).backward()
    for name, parameter in model.named_parameters():
        assert (got[name] - parameter.grad).norm() <= 2e-5 * parameter.grad.norm(), name


def test_learned_sink_logits():
    """A parameter that was set trains: its gradient is a difference quotient of the loss."""
    model, ids = build("llama").train(), tokens(2, 20)
    logits = torch.nn.Parameter(torch.tensor([[0.5, -1.0, 2.0, 3.0], [1.0, 0.0, -2.0, 4.0]]))
    hf.set_sink_logits(model, logits)
    loss, got = gradients(model, ids)
    direction = torch.tensor([[1.0, -1.0, 0.5, 2.0], [-1.0, 1.0, 1.0, 0.5]])
    slope = float((got["sink_logits"] * direction).sum())
    with torch.no_grad():
        moved = []
        for step in (0.05, -0.05):
            logits += step * direction
            moved.append(model(ids, labels=ids).loss.item())
            logits -= step * direction
    assert slope == pytest.approx((moved[0] - moved[1]) / 0.1, rel=2e-2)


def test_our_cache_is_for_inference():
    """A chunk that is in the ring cannot be taken back to compute a gradient."""
    model = hf.enable(build("llama"))
    with pytest.raises(NotImplementedError, match="grad"):
        model(tokens(1, 4), **{CACHE: hf.SinkCache(model.config)})
