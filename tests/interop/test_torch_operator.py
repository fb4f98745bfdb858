"""The torch operators: what torch's own checks say, gradients, compilation, transformations."""

import numpy as np
import pytest

import sinkattn
from sinkattn import attend

torch = pytest.importorskip("torch")

import written_out
from torch._dynamo.utils import counters

import sinkattn.torch as ours
from sinkattn.torch import schema

SINKS = ("sink_logits", "sink_bias", "sink_q", "sink_kv")
CASES = {
    "causal": {},
    "window": {"window": 3, "sinks": 2, "softcap": 5.0, "scale": 0.3},
    "sinks": {"window": 4, "sinks": 2, "sink_logits": (4, 3), "sink_bias": (4, 2),
              "sink_q": (2, 4, 7, 16), "sink_kv": ((2, 3, 16), (2, 3, 8))},
    "padded": {"causal": False, "window": torch.tensor([2, 0, 3, 0]), "sinks": 1,
               "sink_logits": (4,), "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]),
               "starts": torch.tensor([2, 0]), "lengths": torch.tensor([6, 9]),
               "q_lengths": torch.tensor([6, 7])},
}


def made(case, dtype=torch.float32, grad=True):
    """q, k, v and keywords; shapes become tensors."""
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_(grad)

    keywords = {name: (tuple(normal(*shape) for shape in value) if name == "sink_kv" else
                       normal(*value) if name in SINKS else value)
                for name, value in CASES[case].items()}
    return [normal(2, 4, 7, 16), normal(2, 2, 9, 16), normal(2, 2, 9, 8)], keywords


def in_schema(tensors, keywords, grad=True):
    """As the operator takes them."""
    given = dict(zip("qkv", tensors), **keywords)
    if isinstance(given.get("window"), torch.Tensor):
        given["windows"] = given.pop("window")
    given["sink_k"], given["sink_v"] = given.pop("sink_kv", (None, None))
    values = {a.name: given.get(a.name, a.default_value if a.has_default_value() else None)
              for a in schema.attend._schema.arguments}
    return [x.detach() if isinstance(x, torch.Tensor) and not grad else x for x in values.values()]


def leaves(tensors, keywords):
    named = dict(zip("qkv", tensors), **{name: keywords[name] for name in SINKS if name in keywords})
    named["sink_k"], named["sink_v"] = named.pop("sink_kv", (None, None))
    return {name: x for name, x in named.items() if x is not None}


def gradients(function, tensors, keywords, of=None):
    """Of a sum of out and lse with weights that differ everywhere."""
    out, lse = function(*tensors, **keywords)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape) for x in (out, lse)]
    loss = (out * weights[0]).sum() + torch.where(lse > -torch.inf, lse * weights[1], 0.0).sum()
    named = leaves(tensors, keywords)
    named = {name: named[name] for name in of or named}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))


def with_lse(*tensors, **keywords):
    return attend(*tensors, **keywords, return_lse=True)


def in_double(tensors, keywords):
    def double(x):
        if isinstance(x, tuple):
            return tuple(double(y) for y in x)
        return x.detach().double().requires_grad_() if getattr(x, "requires_grad", False) else x
    return [double(x) for x in tensors], {name: double(x) for name, x in keywords.items()}


def error_of(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", CASES)
def test_torchs_own_checks(case):
    """Schema, aliases, autograd registration, fake tensors, compilation with dynamic shapes."""
    tensors, keywords = made(case)
    torch.library.opcheck(schema.attend, in_schema(tensors, keywords))
    plain = in_schema(tensors, keywords, grad=False)
    torch.library.opcheck(schema.attend, [*plain[:-3], True, "max", 3])
    out, lse, _ = schema.attend(*plain)
    torch.library.opcheck(schema.attend_backward,
                          (torch.randn_like(out), torch.randn_like(lse), *plain[:3], out, lse, *plain[3:-3]))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_sum_written_out(case):
    tensors, keywords = made(case)
    expected = gradients(written_out.attend, *in_double(tensors, keywords))
    got = gradients(with_lse, tensors, keywords)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        assert error_of(gradient, expected[name]) < 3e-6, name


@pytest.mark.parametrize("name", ["q", "k", "v", "sink_logits", "sink_bias", "sink_q", "sink_k", "sink_v"])
def test_any_one_argument_may_be_the_one_that_requires_grad(name):
    """The operator is reached by whichever asks, and the gradient is the same."""
    tensors, keywords = made("sinks")
    everything = gradients(with_lse, tensors, keywords)
    for other, tensor in leaves(tensors, keywords).items():
        tensor.requires_grad_(other == name)
    alone = gradients(with_lse, tensors, keywords, of=[name])
    torch.testing.assert_close(alone[name], everything[name], rtol=0, atol=0)


def test_each_result_alone_has_its_gradient():
    (q, k, v), _ = made("causal")
    both = torch.autograd.grad(sum(x.sum() for x in with_lse(q, k, v)), q)[0]
    parts = [torch.autograd.grad(with_lse(q, k, v)[i].sum(), q)[0] for i in (0, 1)]
    torch.testing.assert_close(sum(parts), both)
    mass = attend(q, k, v, return_mass=True)[1]
    assert not mass.requires_grad and mass.shape == (2, 2, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_as_near_as_those_of_torch(dtype):
    """At most twice the error of the form written out in the same dtype; logits kept in that dtype."""
    tensors, keywords = made("sinks", dtype)
    expected = gradients(written_out.attend, *in_double(tensors, keywords))
    peer = gradients(written_out.attend, tensors, keywords)
    for name, gradient in gradients(with_lse, tensors, keywords).items():
        assert gradient.dtype == dtype
        assert error_of(gradient, expected[name]) <= 2 * error_of(peer[name], expected[name]), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_a_break(case, backend):
    tensors, keywords = made(case)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(with_lse, backend=backend, fullgraph=True)
    got, expected = gradients(compiled, tensors, keywords), gradients(with_lse, tensors, keywords)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.filterwarnings("ignore")  # its own
def test_compiles_with_inductor():
    def step(q, k, logits):
        return attend(q, k, k, window=4, sinks=1, sink_logits=logits).transpose(1, 2).flatten(2).sin()

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    arguments = [torch.randn(shape, requires_grad=True) for shape in ((1, 2, 9, 16), (1, 2, 9, 16), (2,))]
    got, expected = (torch.autograd.grad(f(*arguments), arguments, torch.ones(1, 9, 32))
                     for f in (torch.compile(step, fullgraph=True), step))
    assert not counters["graph_break"]
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_dynamic_shapes_need_two_graphs_at_most():
    """Batch and length marked dynamic: one graph for all sizes; unmarked: a second one, then no more."""
    for mark, graphs in ((True, 1), (False, 2)):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(lambda q, k, v: attend(q, k, v, window=3, sinks=1), backend="aot_eager",
                                 fullgraph=True)
        for batch, length in ((2, 8), (3, 17), (5, 33)):
            x = torch.randn(batch, 2, length, 16)
            if mark:
                torch._dynamo.mark_dynamic(x, 0)
                torch._dynamo.mark_dynamic(x, 2)
            torch.testing.assert_close(compiled(x, x, x), attend(x, x, x, window=3, sinks=1))
        assert counters["stats"]["unique_graphs"] == graphs


def test_a_compiled_call_of_plain_tensors_goes_through_the_operator():
    """The core is C, which a compiler cannot trace; nothing requires grad here."""
    x = torch.randn(1, 2, 9, 16)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: attend(x, x, x, sink_logits=1.0, lengths=[9]), backend=backend, fullgraph=True)(x)
    assert "sinkattn.attend" in graphs[0].code


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return attend(x, x, x, window=3)

    x = torch.randn(1, 2, 9, 16)
    for strict in (True, False):
        program = torch.export.export(Layer(), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), attend(x, x, x, window=3))


def test_tracing_by_a_dispatch_mode_sees_the_operator():
    """Real tensors under make_fx: a direct call would be baked in as a constant."""
    from torch.fx.experimental.proxy_tensor import make_fx
    x, y = torch.randn(2, 1, 2, 9, 16)
    traced = make_fx(lambda x: attend(x, x, x))(x)
    torch.testing.assert_close(traced(y), attend(y, y, y))


def test_fake_and_meta_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode
    x = torch.randn(2, 4, 9, 16, dtype=torch.bfloat16)
    with FakeTensorMode() as mode:
        y = mode.from_tensor(x)
        out, lse, mass = attend(y, y, y, return_lse=True, return_mass=True)
    for result, shape in ((out, (2, 4, 9, 16)), (lse, (2, 4, 9)), (mass, (2, 4, 9))):
        assert result.shape == shape and result.dtype == (torch.bfloat16 if result is out else torch.float32)
    y = x.to("meta")
    assert attend(y, y, y[..., :3]).shape == (2, 4, 9, 3)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_casts_what_becomes_a_product(grad):
    """With and without gradients alike; the logits keep their bits."""
    tensors, keywords = made("sinks", grad=grad)
    low = [x.bfloat16() for x in tensors]
    inside = {**keywords, "sink_q": keywords["sink_q"].bfloat16(),
              "sink_kv": tuple(x.bfloat16() for x in keywords["sink_kv"])}
    expected = attend(*low, **inside)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(*tensors, **keywords)
        mixed = attend(low[0], *tensors[1:], **keywords)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*tensors, **keywords)
    for result in (got, mixed, compiled):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    if grad:
        assert torch.autograd.grad(got.sum(), keywords["sink_logits"])[0].dtype == torch.float32


class TestVmap:
    def many(self, *shape):
        torch.manual_seed(1)
        return torch.randn(3, *shape)

    def test_rows(self):
        q, k, v = self.many(2, 4, 7, 16), self.many(2, 2, 9, 16), torch.randn(2, 2, 9, 8)
        lengths, slopes = torch.tensor([[9, 4], [3, 8], [1, 2]]), torch.rand(3, 4)
        logits = torch.randn(4)

        def one(q, k, lengths, slopes):
            return attend(q, k, v, window=5, sinks=1, sink_logits=logits, starts=torch.tensor([0, 1]),
                          lengths=lengths - 1, alibi_slopes=slopes, return_lse=True, return_mass=True)
        got = torch.vmap(one)(q, k, lengths, slopes)
        expected = [torch.stack(x) for x in zip(*map(one, q, k, lengths, slopes))]
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)
        moved = torch.vmap(one, in_dims=(2, 0, 0, 0))(q.movedim(0, 2), k, lengths, slopes)
        torch.testing.assert_close(moved[0], got[0])

    def test_slopes_of_rows(self):
        q, slopes = self.many(2, 4, 7, 16), self.many(2, 4)
        for axes in ((0, 0), (0, None)):
            some = slopes if axes[1] == 0 else slopes[0]
            got = torch.vmap(lambda q, s: attend(q, q, q, alibi_slopes=s), in_dims=axes)(q, some)
            expected = [attend(x, x, x, alibi_slopes=slopes[i if axes[1] == 0 else 0]) for i, x in enumerate(q)]
            torch.testing.assert_close(got, torch.stack(expected))

    def test_gradients(self):
        """grad of vmap, also by torch.func; vmap of grad, one gradient each."""
        q, k = self.many(2, 4, 7, 16), self.many(2, 2, 9, 16)
        loss = lambda q, k: attend(q, k, k, window=4).sin().sum()  # noqa: E731
        q.requires_grad_()
        expected = torch.autograd.grad(sum(map(loss, q, k)), q)[0]
        total = lambda q: torch.vmap(loss)(q, k).sum()  # noqa: E731
        torch.testing.assert_close(torch.autograd.grad(total(q), q)[0], expected)
        torch.testing.assert_close(torch.func.grad(total)(q), expected)
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q, k), expected)

    @pytest.mark.parametrize("name", ["sink_logits", "sink_bias"])
    def test_batched_sinks_are_refused(self, name):
        x = torch.randn(2, 4, 7, 16)
        sinks = self.many(4, 2)
        with pytest.raises(NotImplementedError, match=rf"attend\(\): {name} is batched by torch.vmap"):
            torch.vmap(lambda s: attend(x, x, x, sinks=2, **{name: s}))(sinks)
        with pytest.raises(NotImplementedError, match=rf"{name} has one gradient for all rows"):
            torch.vmap(torch.func.grad(lambda q: attend(q, q, q, sinks=2, **{name: sinks[0]}).sum()))(self.many(1, 4, 7, 16))

    def test_packed_sequences_are_refused(self):
        cuts = torch.tensor([0, 3, 7])
        with pytest.raises(NotImplementedError, match="cu_seqlens_q and cu_seqlens_k are packed"):
            torch.vmap(lambda x: attend(x, x, x, cu_seqlens_q=cuts, cu_seqlens_k=cuts))(self.many(1, 4, 7, 16))


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own
def test_torch_func():
    x = torch.randn(1, 2, 9, 16)
    loss = lambda q: attend(q, q, q, window=4, sinks=1).sin().sum()  # noqa: E731
    y = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(y), y)[0])
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(x)
    with pytest.raises(NotImplementedError, match="a forward-mode derivative was asked for"):
        torch.func.jvp(loss, (x,), (x,))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_forward_mode_is_not_let_through():
    """A dual tensor does not say requires_grad, and the core would drop its tangent."""
    import torch.autograd.forward_ad as forward_ad
    x = torch.randn(1, 2, 9, 16)
    with forward_ad.dual_level():
        torch.testing.assert_close(attend(x, x, x), sinkattn.torch.attend(x, x, x))
        for tensors in ((forward_ad.make_dual(x, x), x, x), (x, x, forward_ad.make_dual(x, x))):
            with pytest.raises(NotImplementedError, match="a forward-mode derivative was asked for"):
                attend(*tensors)


def test_second_derivatives_are_refused_when_they_are_asked_for():
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    first = torch.autograd.grad(attend(x, x, x).sin().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint
    tensors, keywords = made("sinks")
    out = checkpoint(lambda *x: attend(*x, **keywords), *tensors, use_reentrant=reentrant)
    out.sin().sum().backward()
    expected = torch.autograd.grad(attend(*tensors, **keywords).sin().sum(), tensors)
    for tensor, gradient in zip(tensors, expected):
        torch.testing.assert_close(tensor.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("wish", [False, True])
def test_determinism_is_asked_for_as_torch_is_asked(wish, monkeypatch):
    asked, plain = [], sinkattn.attend_backward
    monkeypatch.setattr(sinkattn, "attend_backward",
                        lambda *a, deterministic, **k: asked.append(deterministic) or plain(*a, **k))
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    torch.use_deterministic_algorithms(wish)
    try:
        attend(x, x, x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [wish]


def test_a_profiler_sees_the_operators():
    """Calls that go straight to the core leave no line; while a profiler looks they do not."""
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    with torch.autograd.profiler.profile() as profile:
        ours.attend(x, x, x).sum().backward()
    assert {"sinkattn::attend", "sinkattn::attend_backward"} <= {event.key for event in profile.key_averages()}


def test_what_was_recorded_may_not_change():
    """What the gradient needs is kept where torch counts changes."""
    x, k = torch.randn(2, 1, 2, 9, 16)
    lengths = torch.tensor([7])
    for changed in (k, lengths):
        out = attend(x.clone().requires_grad_(), k, k, lengths=lengths)
        changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_what_torch_func_left_behind():
    """A tensor that outlived its transformation is a shell around the real one."""
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    kept = []
    torch.func.grad(lambda q: (kept.append(q), q.sum())[1])(x)
    got, expected = (torch.autograd.grad(attend(q, x, x).sin().sum(), x)[0] for q in (kept[0], x))
    torch.testing.assert_close(got, expected)


def test_a_negated_view_is_known_to_the_operator():
    view = torch.view_as_complex(torch.randn(1, 2, 9, 16, 2)).conj().imag
    assert view.is_neg()
    torch.testing.assert_close(ours.attend(view, view, view), attend(*[view.resolve_neg()] * 3))


def test_the_operator_itself_records():
    tensors, keywords = made("sinks")
    out, lse, mass = schema.attend(*in_schema(tensors, keywords))
    named = list(leaves(tensors, keywords).values())
    got = torch.autograd.grad(out.sin().sum() + lse.sin().sum(), named)
    expected = torch.autograd.grad(sum(x.sin().sum() for x in with_lse(*tensors, **keywords)), named)
    assert not mass.requires_grad
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"attend\(\): alibi_slopes requires grad, and it has no gradient"):
        schema.attend(*in_schema(tensors, {**keywords, "alibi_slopes": slopes}))


@pytest.mark.filterwarnings("ignore")  # its own
def test_compiled_autograd():
    """The backward of a call that was not compiled."""
    x = torch.randn(1, 2, 9, 16, requires_grad=True)
    torch._dynamo.reset()
    out, expected = attend(x, x, x).sum(), torch.autograd.grad(attend(x, x, x).sum(), x)[0]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        out.backward()
    torch.testing.assert_close(x.grad, expected)


def test_auxiliary_arguments_of_any_kind():
    """Numbers, lists and NumPy arrays, as without gradients."""
    q = torch.randn(2, 4, 7, 16, requires_grad=True)
    keywords = {"window": np.array([1, 2, 0, 3]), "sinks": np.int64(2), "sink_logits": 0.5, "scale": 1,
                "sink_bias": np.ones((4, 2)), "alibi_slopes": [0.1, 0.2, 0.3, 0.4], "lengths": [5, 7],
                "causal": 1, "sink_kv": [torch.zeros(4, 1, 16), torch.zeros(4, 1, 16)]}
    got = attend(q, q, q, **keywords, return_mass=True)
    with torch.no_grad():
        expected = attend(q, q, q, **keywords, return_mass=True)
    assert got[0].requires_grad
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_out():
    x = torch.randn(1, 2, 9, 16)
    y, into = x.clone().requires_grad_(), torch.empty_like(x)
    with pytest.raises(NotImplementedError, match="out cannot be given where a tensor requires grad"):
        attend(y, x, x, out=into)
    with torch.no_grad():
        assert attend(y, x, x, out=into) is into
    again = ours.attend(x, x, x, out=torch.empty_like(x))
    torch.testing.assert_close(again, into, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attend(x, x, x, out=again)
    torch.testing.assert_close(again, into, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match=r"out is torch.float32 \[1, 2, 9, 4\] on cpu, expected"):
        ours.attend(x, x, x, out=torch.empty(1, 2, 9, 4))


X = torch.zeros(1, 2, 5, 16)


@pytest.mark.parametrize(("keywords", "error", "match"), [
    ({"k": np.zeros((1, 2, 5, 16), np.float32)}, TypeError, "k is ndarray, expected a torch tensor"),
    ({"k": X.double()}, TypeError, "k has dtype float64"),
    ({"k": X[:, :, :, :8]}, ValueError, "k has head_dim 8"),
    ({"v": torch.zeros(1, 2, 16, 5).mT}, ValueError, "the last axis of v has stride 5"),
    ({"window": True}, TypeError, "window is bool"),
    ({"window": 1.5}, TypeError, "window is float, expected an int"),
    ({"sinks": "2"}, TypeError, "sinks is str, expected an int"),
    ({"sinks": -1}, ValueError, "sinks is -1"),
    ({"causal": None}, TypeError, "causal is NoneType, expected a bool"),
    ({"scale": "1"}, TypeError, "scale is str"),
    ({"softcap": True}, TypeError, "softcap is bool, expected a number"),
    ({"scale": torch.ones((), requires_grad=True)}, NotImplementedError, "scale requires grad"),
    ({"alibi_slopes": torch.ones(2, requires_grad=True)}, NotImplementedError, "alibi_slopes requires grad"),
    ({"sink_logits": True}, TypeError, "sink_logits is bool"),
    ({"sink_kv": X}, TypeError, "sink_kv is Tensor, expected a pair"),
    ({"sink_kv": (X[0],)}, ValueError, "sink_kv has 1 entries"),
    ({"mass_reduce": "mean"}, ValueError, "mass_reduce is 'mean'"),
    ({"out": 3}, TypeError, "out is int, expected a torch tensor"),
])
def test_refusals_name_the_argument(keywords, error, match):
    """As the core words them, or nearly."""
    given = {"q": X.clone().requires_grad_(), "k": X, "v": X, **keywords}
    with pytest.raises(error, match=rf"attend\(\): {match}"):
        attend(**given)


def test_tensors_elsewhere_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), pytest.raises(NotImplementedError, match=r"q is on mps.*; the backends are: cpu, cuda"):
        ours.attend(*[torch.empty(1, 2, 5, 16, device="mps")] * 3)


def test_window_and_windows_are_one_argument():
    with pytest.raises(ValueError, match="window and windows are both given"):
        torch.ops.sinkattn.attend(X, X, X, True, 3, torch.tensor([1, 2]))
