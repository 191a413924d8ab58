"""Operands into their canonical layout and the output back: values stay where they belong, whatever the layout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import site_of
from torch import Tensor
from torch.fx import Interpreter, Node

from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.passes import emit
from attnopt.passes.site import Operand
from attnopt.rule import Site

B, H, SQ, SK, D, DV = 2, 3, 5, 7, 4, 6


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    split = (x.view(B, -1, H, x.shape[-1] // H).transpose(1, 2) for x in (q, k, v))
    return plain(*split).transpose(1, 2).reshape(B, SQ, H * DV)


def merged_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(*(x.reshape(B * H, -1, x.shape[-1]) for x in (q, k, v)))


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,jbhd->dbih", torch.einsum("dhbi,bhdj->bhij", q, k).softmax(-1), v)


CASES = [
    (plain, (B, H, SQ, D), (B, H, SK, D), (B, H, SK, DV)),
    (heads_last, (B, SQ, H, D), (B, SK, H, D), (B, SK, H, DV)),
    (merged_heads, (B, SQ, H * D), (B, SK, H * D), (B, SK, H * DV)),
    (merged_batch, (B, H, SQ, D), (B, H, SK, D), (B, H, SK, DV)),
    (transposed, (D, H, B, SQ), (B, H, D, SK), (SK, B, H, DV)),
    (lambda q, k, v: plain(q[0], k[0], v[0]), (1, H, SQ, D), (1, H, SK, D), (1, H, SK, DV)),
]
layouts = pytest.mark.parametrize(("attend", "q", "k", "v"), CASES)


def evaluated(site: Site, inputs: tuple[Tensor, ...]) -> dict[Node, Any]:
    """The value of every node of the site's graph."""
    running = Interpreter(site.root.graph.owning_module, garbage_collect_values=False)
    running.run(*inputs)
    return running.env


@layouts
def test_a_call_computes_the_root_in_the_roots_layout(
    attend: Callable[..., Tensor], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    inputs = draw(*q), draw(*k), draw(*v)
    site = site_of(attend, *inputs)
    values = evaluated(site, inputs)
    got = emit.call(site, site.spec, REFERENCE.run, [values[node] for node in emit.leaves(site)])
    torch.testing.assert_close(got, values[site.root], rtol=1e-12, atol=1e-12)


@layouts
def test_arranging_and_restoring_gives_the_same_tensor_back(
    attend: Callable[..., Tensor], q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    inputs = draw(*q), draw(*k), draw(*v)
    site = site_of(attend, *inputs)
    values, result = evaluated(site, inputs), emit.result_of(site)
    sizes = emit.lengths(site, [values[node] for node in emit.leaves(site)])
    operand = Operand(site.root, result.dims, layout=result.roles.output)
    canonical = emit.arrange(operand, "out", result.roles, values, sizes)
    assert canonical.shape[-2:] == (SQ, DV)
    assert torch.equal(emit.restore(canonical, result, sizes), values[site.root])


def test_operands_have_the_shapes_that_the_spec_states() -> None:
    inputs = draw(B, SQ, H * D), draw(B, SK, H * D), draw(B, SK, H * DV)
    site = site_of(merged_heads, *inputs)
    values = evaluated(site, inputs)
    held = [values[node] for node in emit.leaves(site)]
    made = emit.operands(site, site.spec, held, emit.lengths(site, held))
    shapes = {name: tuple(t.shape) for name, t in made.items()}
    assert shapes == {"q": (B, H, SQ, D), "k": (B, H, SK, D), "v": (B, H, SK, DV)}
