"""An einsum with a factor for each position of its result is the einsum of the others, times that factor."""

import pytest
import torch
from torch import Tensor

from attnopt.passes.linear_einsum import EXPANSIONS

ALLOWED, SPELLED_OUT = EXPANSIONS[torch.functional.einsum]
SIZES = {"b": 2, "h": 3, "n": 5, "d": 4, "e": 6, "l": 5}


def operands(equation: str) -> list[Tensor]:
    terms = equation.split("->", maxsplit=1)[0].replace("...", "bh").split(",")
    return [torch.randn([SIZES[x] for x in term.strip()], dtype=torch.float64) for term in terms]


@pytest.mark.parametrize(
    "equation",
    [
        "nde,nd,n->ne",
        "...nde,...nd,...n->...ne",
        "bhnd, bhnde, bhn -> bhne",
        "bn,bnd,bnde->ebn",
        "bnh,bhnd,bhnde->bhne",
        "nb,bnde,bnd->bne",
    ],
)
def test_it_is_the_same_einsum(equation: str) -> None:
    given = operands(equation)
    for form in (given, [given], [tuple(given)]):
        assert ALLOWED(equation, *form)
        out = SPELLED_OUT(equation, *form)
        assert out.shape == torch.einsum(equation, *given).shape
        torch.testing.assert_close(out, torch.einsum(equation, *given))


def test_a_factor_of_one_element_is_broadcast() -> None:
    states, q, _ = operands("bnde,bnd,bn->bne")
    factor = torch.randn(2, 1, dtype=torch.float64)
    assert ALLOWED("bnde,bnd,bn->bne", states, q, factor)
    out = SPELLED_OUT("bnde,bnd,bn->bne", states, q, factor)
    torch.testing.assert_close(out, torch.einsum("bnde,bnd,bn->bne", states, q, factor))


@pytest.mark.parametrize(
    "equation",
    [
        "nd,nde->ne",  # no third term
        "nde,nd,n",  # no result
        "bhnd,bhde,bhn->bhne",  # one state for all positions
        "nde,nd,nd->ne",  # varies along what is summed
        "nde,nd,e->ne",  # not along what the queries have
        "nde,nd,l->ne",  # along something else
        "nnd,nd,n->nd",  # a diagonal
        "nde,nd,n,n->ne",  # more of them
    ],
)
def test_others_stay(equation: str) -> None:
    assert not ALLOWED(equation, *operands(equation))


def test_operands_of_two_types_and_regions_of_autocast_stay() -> None:
    states, q, factor = operands("nde,nd,n->ne")
    assert not ALLOWED("nde,nd,n->ne", states, q, factor.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not ALLOWED("nde,nd,n->ne", states, q, factor)
