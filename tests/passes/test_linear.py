"""Linear attention: each spelling is read, checked in fp64, rewritten, and computes what eager computes."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from linear_spellings import SPELLINGS, S, Spelling
from torch import Tensor

from attnopt.options import Options
from attnopt.pipeline import optimise
from attnopt.shadow import fake_value


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    differentiable = sum(x.is_floating_point() for x in inputs)
    report = check_like_eager(spelling.attend, inputs, differentiable=differentiable, inner="aot_eager")
    (site,) = report.attention
    assert (site.family, site.verdict, site.kernel, site.spec) == (
        "linear",
        "rewritten",
        "lightning",
        spelling.spec,
    )
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_no_value_over_pairs_of_positions_is_left(spelling: Spelling) -> None:
    left: list[str] = []

    def look(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        optimise(module, Options.parse({"verify": "off"}), gradient=False)
        values = {node.name: fake_value(node) for node in module.graph.nodes}
        left.extend(f"{name} {tuple(x.shape)}" for name, x in values.items() if is_over_pairs(x))
        return module.forward

    torch._dynamo.reset()
    torch.compile(spelling.attend, backend=look, dynamic=False)(*spelling.inputs())
    assert left == []


def is_over_pairs(value: object) -> bool:
    """Whether a tensor has a number for each query and key."""
    return isinstance(value, Tensor) and list(value.shape[-2:]) == [S, S]
