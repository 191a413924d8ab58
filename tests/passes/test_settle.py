"""Floats that a module holds, with dynamic=True: what they become later, the compiled code does as eager does."""

from collections.abc import Callable, Sequence

import pytest
import torch
from compiling import assert_runs_agree, check_like_eager, compiled, reports_after, run, widened
from float_spellings import FOLLOWED, SETTLED, Change, Held, capped_and_weighed, qkv, soft_cap, upper
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import attnopt
from attnopt.passes.settle import floats_read, settle
from attnopt.passes.softmax import RULE
from attnopt.rule import Reject
from attnopt.shadow import trace


def assert_follows(function: Callable[..., Tensor], held: nn.Module, differentiable: int = 3) -> None:
    """The compiled module against eager, forwards and backwards."""
    got, eager = (run(f, qkv(), differentiable) for f in (function, held))
    assert_runs_agree(got, run(held, widened(qkv()), differentiable), eager)


def assert_it_follows(held: Held, changes: Sequence[Change], inner: str) -> None:
    """Gives the module its numbers one after the other, twice, and compares it each time, compiled, with eager."""
    function = compiled(held, dynamic=True, inner=inner)
    for a, b, said in (*changes, *changes):
        held.a, held.b = a, b
        before = attnopt.reports()
        assert_follows(function, held)
        for site in reports_after(before).attention:
            assert site.verdict == ("rewritten" if said else "refused"), site.reason
            assert said in (None, site.spec)


@pytest.mark.parametrize("name", sorted(SETTLED))
def test_the_compiled_code_follows_a_number_that_changes(name: str) -> None:
    attend, changes = SETTLED[name]
    assert_it_follows(Held(attend, *changes[0][:2]), changes, "eager")


@pytest.mark.parametrize("name", sorted(FOLLOWED))
def test_it_follows_wherever_the_number_stands(name: str) -> None:
    attend, values = FOLLOWED[name]
    held, before = Held(attend, values[0]), attnopt.reports()
    function = compiled(held, dynamic=True)
    for n, held.a in enumerate((*values, *values)):
        assert_follows(function, held)
        if n == 0:
            (site,) = reports_after(before).attention
            assert site.verdict == "rewritten", site.reason


@pytest.mark.parametrize("name", ["soft cap", "baddbmm"])
def test_it_follows_where_autograd_is_traced_ahead(name: str) -> None:
    attend, changes = SETTLED[name]
    assert_it_follows(Held(attend, *changes[0][:2]), changes[:2], "aot_eager")


def test_a_scale_is_an_operand_and_compiles_once() -> None:
    def attend(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * self.a / self.b).masked_fill(upper(q, k), -torch.inf)
        return scores.float().softmax(-1).to(v.dtype) @ v

    held, before = Held(attend, 0.5), attnopt.reports()
    function = compiled(held, dynamic=True)
    for held.a, held.b in [(0.5, 1.0), (0.25, 3.0), (-2.0, -7.0)]:
        assert_follows(function, held)
    (site,) = reports_after(before).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1/input*input causal")


def test_it_follows_from_inside_a_checkpoint() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, held: Held) -> None:
            super().__init__()
            self.held = held

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return checkpoint(self.held, q, k, v, use_reentrant=False)

    held = Held(soft_cap, 5.0, 0.5)
    model, before = Checkpointed(held), attnopt.reports()
    function = compiled(model, dynamic=True)
    for held.a in (5.0, 7.0, 5.0):
        assert_follows(function, model)
    caps = [site.spec.partition("softcap=")[2] for site in reports_after(before).attention]
    assert caps == ["5", "7"]


def test_it_follows_an_argument_while_it_watches_itself() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
        return (torch.tanh(q @ k.mT / cap) * cap).softmax(-1) @ v

    function = compiled(attend, dynamic=True, verify="always")
    for cap in (5.0, 3.0, 5.0, -5.0):
        torch.testing.assert_close(function(*qkv(), cap), attend(*qkv(), cap))


def test_a_number_that_is_a_cap_and_an_operand_is_not_both() -> None:
    held = Held(capped_and_weighed, 5.0)
    function = compiled(held, dynamic=True)
    for held.a in (5.0, 2.0, 5.0):
        assert_follows(function, held)


def test_layers_that_share_code_have_numbers_of_their_own() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Held(soft_cap, cap, 0.25) for cap in (3.0, 5.0, 3.0))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for layer in self.layers:
                q = layer(q, k, v)
            return q

    layers = Layers()
    function, before = compiled(layers, dynamic=True), attnopt.reports()
    assert_follows(function, layers)
    caps = [site.spec.partition("softcap=")[2] for site in reports_after(before).attention]
    assert caps == ["3", "5", "3"]
    layers.layers[2].a = 9.0
    assert_follows(function, layers)


def test_what_data_makes_is_never_taken_as_a_number() -> None:
    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cap = k.max().item()
        return (torch.tanh(q @ k.mT / cap) * cap).softmax(-1) @ v

    def hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).masked_fill(upper(q, k), -torch.inf) * k.min().item()).softmax(-1) @ v

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for function in (capped, hidden):
            (site,) = check_like_eager(function, qkv(), dynamic=True).attention
            assert site.verdict == "refused"


def test_sizes_that_may_make_a_scale_negative_hide_nothing() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).masked_fill(upper(q, k), -torch.inf) * ((5 - k.shape[2]) / 7)).softmax(-1) @ v

    (site,) = check_like_eager(attend, qkv(), dynamic=True).attention
    assert site.verdict == "refused"


def test_a_guard_that_would_come_too_late_is_no_guard() -> None:
    seen: list[str] = []

    def backend(module: GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        del inputs
        shadow = trace(module)
        (anchor,) = shadow.module.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)
        site = RULE.read(anchor, shadow)
        values = list(floats_read(shadow, site))
        env = values[0].node.shape_env
        env.frozen = True
        with pytest.raises(Reject, match="no guard can be added"):
            settle(shadow, site)
        env.frozen = False
        settle(shadow, site)
        assert not list(floats_read(shadow, site))
        seen.extend(str(guard.expr) for guard in env.guards if "5.0" in str(guard.expr))
        return module.forward

    torch._dynamo.reset()
    torch.compile(Held(soft_cap, 5.0), backend=backend, dynamic=True)(*qkv())
    assert len(seen) == 1
