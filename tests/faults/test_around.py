"""What stands around an attention in use: regions compiled once, backward graphs, values made leaves, meta tensors."""

from collections.abc import Callable

import pytest
import torch
from compiling import compiled, reports_after
from torch import Tensor, nn

import attnopt

INPUTS = torch.randn(3, 2, 3, 7, 16, dtype=torch.float64).unbind()


@torch.compiler.nested_compile_region
def softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 4).masked_fill(~keep, -torch.inf).softmax(-1) @ v


@torch.compiler.nested_compile_region
def linear(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 4).masked_fill(~keep, 0) @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attend", [softmax, linear], ids=["softmax", "linear"])
def test_a_region_that_is_compiled_once_is_trained(attend: Callable[..., Tensor], *, dynamic: bool) -> None:
    """Autograd goes on behind a region only if the values that it returns are noted to need a gradient."""

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return attend(q, k, v, keep) + attend(q, v, k, keep)

    inputs, before = [x.clone().requires_grad_() for x in INPUTS], attnopt.reports()
    out = compiled(twice, dynamic=dynamic, inner="aot_eager")(*inputs)
    assert [site.verdict for site in reports_after(before).attention] == ["rewritten"]
    plain = twice(*inputs)
    assert torch.allclose(out, plain)
    found, wanted = (torch.autograd.grad(x.square().sum(), inputs) for x in (out, plain))
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


class Block(nn.Module):
    """Causal attention by a mask that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("keep", torch.ones(9, 9).tril())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        length = x.shape[1]
        scores = (q @ k.mT / 4).masked_fill(self.keep[:length, :length] == 0, -torch.inf)
        return scores.softmax(-1) @ v


def test_a_mask_without_numbers_proves_nothing_and_breaks_nothing() -> None:
    model, before = Block().to("meta"), attnopt.reports()
    out = compiled(model)(torch.empty(2, 7, 16, device="meta"))
    assert out.shape == (2, 7, 16)
    report = reports_after(before)
    assert report.warnings == ()
    assert [site.verdict for site in report.attention] == ["rewritten"]
    assert "causal" not in report.attention[0].spec


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_graph_of_compiled_autograd_is_left_as_it_is(inner: str) -> None:
    model, x, before = Block(), torch.randn(2, 7, 16), attnopt.reports()
    model(x).square().sum().backward()
    wanted = model.qkv.weight.grad.clone()
    model.zero_grad()
    run = compiled(model, inner=inner)
    backend = torch.compile(backend="attnopt", options={"inner": "eager"})
    with torch._dynamo.compiled_autograd._enable(backend):
        run(x).square().sum().backward()
    assert torch.allclose(model.qkv.weight.grad, wanted, atol=1e-5)
    report = reports_after(before)
    assert len(report.graphs) == 2
    assert report.warnings == ()


def test_complex_values_are_left_alone_with_the_reason() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 4).softmax(-1).to(v.dtype) @ v

    q, k, v = INPUTS
    before = attnopt.reports()
    assert torch.equal(compiled(attend)(q, k, v.to(torch.complex128)), attend(q, k, v.to(torch.complex128)))
    (site,) = reports_after(before).attention
    assert site.verdict == "refused"
    assert "no kernel takes weights that are not floating point" in site.reason


class Tuned(nn.Module):
    """An embedding whose result is made to need a gradient, as checkpointed models do whose first layers are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block = nn.Embedding(11, 16), Block()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(self.embed(tokens).requires_grad_(True))


def test_making_a_value_need_a_gradient_is_no_transform() -> None:
    """Dynamo puts a call of functorch around `requires_grad_` under no_grad; the graph is read all the same."""
    model, tokens, before = Tuned(), torch.randint(0, 11, (2, 7)), attnopt.reports()
    run = compiled(model)
    with torch.no_grad():
        assert torch.allclose(run(tokens), model(tokens), atol=1e-6)
    gradients = []
    for each in (run, model):
        model.zero_grad()
        each(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    report = reports_after(before)
    assert report.warnings == ()
    assert [site.verdict for site in report.attention] == ["rewritten"] * 2


@pytest.mark.parametrize("where", ["scores", "weights", "values"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_value_inside_that_is_made_to_need_a_gradient_keeps_it(where: str, *, trained: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores, v = q @ k.mT / 4, v * 2
        scores = scores.requires_grad_() if where == "scores" else scores
        weights = scores.softmax(-1)
        weights = weights.requires_grad_() if where == "weights" else weights
        return weights @ (v.requires_grad_() if where == "values" else v)

    inputs = [x.clone().requires_grad_(trained) for x in INPUTS]
    out, plain = compiled(attend)(*inputs), attend(*inputs)
    assert torch.allclose(out, plain)
    assert out.requires_grad is plain.requires_grad is True
