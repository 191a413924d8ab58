"""Running sums of log decays: cumsum of data as a number of the mask calculus, also under a triangle (`segsum`).

A running sum under a triangle, sum over p with j < p <= i of x[p], is the difference of two running sums: that of the
Mamba-2 reference (Dao and Gu 2024, arXiv:2405.21060, listing 1), which avoids the difference itself.
"""

import sympy
from torch.fx import Node

from attnopt.passes.mask_algebra import KEY, QUERY
from attnopt.passes.mask_formula import (
    AtMostZero,
    Call,
    Data,
    Formula,
    Index,
    Logic,
    NotUnderstood,
    Number,
    always,
)
from attnopt.passes.mask_numbers import compute, moved
from attnopt.passes.mask_reader import At, MaskReader, Value, as_numbers
from attnopt.passes.mask_rules import RULES
from attnopt.passes.sizes import Size, shape_of

ZERO = sympy.Integer(0)


class TokenReader(MaskReader):
    """Takes a tensor over tokens as it is where reading on would find a choice, or part of another tensor.

    The log decays of a length that was padded to whole chunks are 0 from some token on: that is a choice by position,
    but none between a query and a key, and the graph holds a tensor of what was chosen.
    """

    def _interpret(self, node: Node, index: Index) -> Value:
        value = super()._interpret(node, index)
        of_tokens = not any(e.has(QUERY, KEY) for e in index)
        is_choice = not isinstance(value, Formula) and (len(value) > 1 or any(map(_is_part, value)))
        return always(Data(node, index)) if is_choice and of_tokens else value


def _is_part(leaf: Number) -> bool:
    """Whether a number comes from a place that is more than one position a dimension."""
    return isinstance(leaf, Data) and not all(e.is_Symbol or e.is_Integer for e in leaf.index)


def running_sum(at: At) -> Value:
    """The element of a cumsum: Call("running", x[i]) stands for x[0] + ... + x[i]."""
    try:
        return RULES["cumsum"](at)
    except NotUnderstood:
        return _of_data(at)


def running_product(at: At) -> Value:
    """The element of a cumprod of data: the exponential of a running sum of logarithms, for positive numbers."""
    return at.logic.lift(
        lambda leaf: Call("exp", (_in_logarithms(leaf),)), as_numbers(at.logic, _of_data(at))
    )


def _in_logarithms(leaf: Number) -> Number:
    match leaf:
        case Call("running", (Call("exp", (term,)),)):
            return Call("running", (term,))
        case Call("running", (term,)):
            return Call("running", (Call("log", (term,)),))
    raise NotUnderstood


def _of_data(at: At) -> Value:
    source = at.args["self"]
    dim = at.args["dim"] % len(at.index)
    along = sympy.Symbol(f"{at.node.name}.position", integer=True, nonnegative=True)
    index = (*at.index[:dim], along, *at.index[dim + 1 :])
    reader = _reader_of_tokens(at.reader, along, shape_of(source)[dim])
    cases = as_numbers(reader.logic, reader.element_at(source, index, at.node))
    at.value(source, at.index)  # so that the terms are known by their place in the graph
    terms = [leaf for leaf in cases if leaf != ZERO]
    if len(terms) != 1:
        raise NotUnderstood
    (term,) = terms
    end = at.index[dim]
    if ZERO not in cases:
        return always(_up_to(term, along, end))
    start = _start(cases[term], along, at)
    whole = compute("sub", _up_to(term, along, end), _up_to(term, along, start - 1))
    # The difference is also right, namely 0, where the last position that does not count is the end itself.
    return at.logic.select(at.logic.at_most_zero(start - 1 - end), always(whole), always(ZERO))


def _reader_of_tokens(reader: MaskReader, along: sympy.Symbol, count: Size) -> TokenReader:
    return TokenReader(
        Logic(reader.logic.bounds.with_position(along, count)), reader.rules, depth=reader.depth
    )


def _up_to(term: Number, along: sympy.Symbol, end: sympy.Expr) -> Number:
    """x[0] + ... + x[end]."""
    if _has(term, along):
        return Call("running", (moved(term, along, end),))
    return compute("mul", term, end + 1)


def _start(condition: Formula, along: sympy.Symbol, at: At) -> sympy.Expr:
    """The first position that counts, where those that count are all from one behind a position on."""
    match condition:
        case AtMostZero(expr) if sympy.expand(expr + along - 1) in at.index:
            return sympy.expand(expr + along)
    raise NotUnderstood


def _has(number: Number, symbol: sympy.Symbol) -> bool:
    return moved(number, symbol, symbol + 1) != number
