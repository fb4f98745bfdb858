"""Half types by the 2x rule: at most twice the error of torch eager in the same dtype."""

import numpy as np
import pytest

from sinkattn import attend, attend_backward, reference

torch = pytest.importorskip("torch")


def eager(q, k, v, sinks=None, window=None, pinned=0, softcap=None):
    """The feature written out in the dtype of the inputs, as model code does it."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])[None]
    visible = j <= i
    if window is not None:
        visible &= (i - j < window) | (j < pinned)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("feature", ["plain", "sink", "window", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_torch(dtype, feature, queries, table):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, 64, generator=generator).to(dtype)
               for h, n in ((4, queries), (2, 300), (2, 300)))
    sinks = torch.randn(4, generator=generator)
    theirs, ours = {
        "plain": ({}, {}),
        "sink": ({"sinks": sinks}, {"sink_logits": sinks.to(dtype)}),
        "window": ({"window": 50, "pinned": 4}, {"window": 50, "sinks": 4}),
        "softcap": ({"softcap": 5.0}, {"softcap": 5.0}),
    }[feature]
    wide = [x.double().numpy() for x in (q, k, v)]
    exact = reference.attend(*wide, **{n: np.asarray(x, np.float64) if n == "sink_logits" else x
                                       for n, x in {k: (v.double() if hasattr(v, "double") else v)
                                                    for k, v in ours.items()}.items()})
    with torch.no_grad():
        their_error = np.abs(eager(q, k, v, **theirs).double().numpy() - exact).max()
        our_error = np.abs(attend(q, k, v, **ours).double().numpy() - exact).max()
    assert our_error <= 2 * their_error


@pytest.mark.parametrize("feature", ["plain", "sink", "window", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_of_gradients_is_at_most_twice_that_of_autograd(dtype, feature, table):
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(2, h, n, 64, generator=generator).to(dtype)
                     for h, n in ((4, 100), (2, 300), (2, 300), (4, 100)))
    theirs, ours = {"window": ({"window": 50, "pinned": 4}, {"window": 50, "sinks": 4}),
                    "softcap": ({"softcap": 5.0}, {"softcap": 5.0})}.get(feature, ({}, {}))
    leaves = {"q": q, "k": k, "v": v}
    if feature == "sink":
        leaves["sink_logits"] = torch.tensor([-10.0, 0.0, 5.0, 20.0], dtype=dtype)
        ours = {"sink_logits": leaves["sink_logits"]}
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    eager(*(leaves[n] for n in "qkv"), sinks=leaves.get("sink_logits"), **theirs).backward(dout)
    out, lse = attend(q, k, v, return_lse=True, **ours)
    got = attend_backward(dout, q, k, v, out, lse, **ours)

    wide = [x.double().numpy() for x in (q, k, v)]
    ours = {name: x.double().numpy() if name == "sink_logits" else x for name, x in ours.items()}
    exact = reference.attend_backward(dout.double().numpy(), *wide, *reference.attend(*wide, return_lse=True, **ours), **ours)
    for name, leaf in leaves.items():
        their_error = np.linalg.norm(leaf.grad.double().numpy() - exact[name])
        assert np.linalg.norm(got[name].double().numpy() - exact[name]) <= 2 * their_error, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_error_of_gradients_of_sinks_over_many_draws(dtype, table):
    """d(sink) is one number a head, whose error in a single draw is a matter of luck, theirs too: root
    mean square of the relative errors, sinks drawn from [-10, 20]."""
    generator = torch.Generator().manual_seed(4)
    errors = []
    for _ in range(12):
        q, k, v, dout = (torch.randn(1, h, n, 64, generator=generator).to(dtype)
                         for h, n in ((4, 60), (2, 100), (2, 100), (4, 60)))
        sinks = (torch.rand(4, generator=generator) * 30 - 10).to(dtype).requires_grad_()
        eager(q, k, v, sinks=sinks).backward(dout)
        given = {"sink_logits": sinks.detach()}
        out, lse = attend(q, k, v, return_lse=True, **given)
        got = attend_backward(dout, q, k, v, out, lse, **given)["sink_logits"]
        wide = [x.double().numpy() for x in (q, k, v)]
        given = {"sink_logits": sinks.detach().double().numpy()}
        exact = reference.attend_backward(dout.double().numpy(), *wide,
                                          *reference.attend(*wide, return_lse=True, **given), **given)["sink_logits"]
        size = np.linalg.norm(exact)
        errors.append([np.linalg.norm(x.double().numpy() - exact) / size for x in (got, sinks.grad)])
    ours, theirs = np.sqrt(np.mean(np.square(errors), 0))
    assert ours <= 2 * theirs
