"""Small changes to graphs of attention: whatever is made of a mutant, it still computes what the mutant computes."""

import copy
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from compiling import widened
from graphs import aten_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import OPERATORS, NoPlace, mutate
from near_misses import NEAR_MISSES
from spellings import SPELLINGS
from torch import Tensor
from torch.fx import GraphModule

from attnopt.backend import attnopt

#: Programs by name, without the one that reads memory which nobody has written.
PROGRAMS = {p.name: p for p in (*SPELLINGS, *NEAR_MISSES) if p.name != "baddbmm_of_nothing"}

#: Relative errors in fp64, and where the mutant itself works in less.
EXACT, ROUNDED = 1e-7, 5e-2


@cache
def inputs_of(name: str) -> tuple[Any, ...]:
    torch.manual_seed(0)
    return tuple(widened(PROGRAMS[name].inputs()))


@cache
def graph_of(name: str) -> GraphModule:
    def returning_a_tuple(*args: Any) -> tuple[Any, ...]:
        out = PROGRAMS[name].attend(*args)
        return out if isinstance(out, tuple) else (out,)

    return aten_graph(returning_a_tuple, *inputs_of(name))


def outputs(run: Any, name: str) -> Sequence[Tensor]:
    torch.manual_seed(0)
    return [x.detach() for x in run(*(x.clone() for x in inputs_of(name)))]


def works_in_less_than_double(module: GraphModule) -> bool:
    made = (node.meta.get("val") for node in module.graph.nodes)
    written = " ".join(f"{node.args} {node.kwargs}" for node in module.graph.nodes)
    narrow = {torch.float32, torch.bfloat16, torch.float16}
    return any(isinstance(x, Tensor) and x.dtype in narrow for x in made) or bool(
        re.search("float(16|32)", written)
    )


def assert_same_outputs(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    for out, want in zip(got, wanted, strict=True):
        assert (out.dtype, out.shape) == (want.dtype, want.shape)
        assert torch.equal(out.isnan(), want.isnan())
        assert torch.equal(out.isinf(), want.isinf())
        a, b = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (out, want))
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-12


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kernel", ["any", "streaming"])
@settings(max_examples=12 * settings().max_examples)  # most are no programs any more
@given(
    name=st.sampled_from(sorted(PROGRAMS)),
    operators=st.lists(st.sampled_from(sorted(OPERATORS)), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_a_mutant_is_left_alone_or_computed_right(
    kernel: str, name: str, operators: list[str], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mutant = copy.deepcopy(graph_of(name))
    try:
        for operator in operators:
            mutate(mutant, operator, lambda n: int(torch.randint(n, (), generator=generator)))
        wanted = outputs(copy.deepcopy(mutant), name)
    except (NoPlace, RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
        return  # no program any more
    tolerance = ROUNDED if works_in_less_than_double(mutant) else EXACT
    options = {"inner": "eager", "allow": () if kernel == "any" else (kernel,)}
    rewritten = attnopt(mutant, list(inputs_of(name)), options=options)
    assert_same_outputs(outputs(rewritten, name), wanted, tolerance)
