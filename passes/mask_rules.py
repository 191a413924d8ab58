"""Rules for operations that make numbers and conditions: positions, constants, triangles, comparisons, logic."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from attnopt.buffers import BUFFER
from attnopt.passes.mask_bounds import Role, bounds_for
from attnopt.passes.mask_formula import Cases, Formula, Logic, NotUnderstood, Number, always, negate
from attnopt.passes.mask_literals import element_of, form_of
from attnopt.passes.mask_numbers import at_most, below, compute, convert, equal, from_float, is_exact
from attnopt.passes.mask_products import PRODUCTS
from attnopt.passes.mask_reader import At, MaskReader, Rule, Value, as_numbers
from attnopt.passes.mask_views import VIEWS, choose, piecewise
from attnopt.passes.sizes import Size, shape_of
from attnopt.shadow import CONSTANT

#: Key in the metadata of a shadow's module, where the readers of its masks are kept while it is read.
READERS = "attnopt_mask_readers"
#: A literal tensor with more elements than this is data.
MAX_LITERAL = 1 << 16


def reader_for(node: Node, sizes: Mapping[Role, Size]) -> MaskReader:
    """The reader for masks of the graph of `node` whose positions run over `sizes`.

    There is one for all sites of a graph with the same sizes; it lives as long as the graph does.
    """
    owner = node.graph.owning_module
    held = {} if owner is None else owner.meta.setdefault(READERS, {})
    key = tuple(sizes.items())
    if key not in held:
        held[key] = MaskReader(Logic(bounds_for(node, sizes)), RULES)
    reader: MaskReader = held[key]
    return reader


def _arange(at: At) -> Value:
    start, step = at.numbers(at.args.get("start", 0)), at.numbers(at.args.get("step", 1))
    run = at.logic.lift(partial(compute, "mul"), step, always(at.index[0]))
    return at.logic.lift(partial(compute, "add"), start, run)


def _constant(value: float) -> Rule:
    return lambda _: always(from_float(value))


def _argument(name: str) -> Rule:
    """The result holds an argument, broadcast."""
    return lambda at: at.value(at.args[name])


def _eye(at: At) -> Value:
    return at.logic.equal(at.index[0], at.index[1])


def _triangle(at: At, *, lower: bool) -> Value:
    """tril keeps the elements whose column is at most row + diagonal, triu those whose column is at least that."""
    row, column = at.index[-2:]
    beyond = column - row - at.integer(at.args["diagonal"])
    keep = at.logic.at_most_zero(beyond if lower else -beyond)
    return choose(at, keep, at.value(at.args["self"]), at.numbers(0))


def _comparison(test: Callable[[Logic, Number, Number], Formula]) -> Rule:
    def rule(at: At) -> Value:
        left, right = at.args["self"], at.args["other"]
        dtype = torch.result_type(_sample(left), _sample(right))
        operands = [_comparable(at, value, dtype) for value in (left, right)]
        return at.logic.test(partial(test, at.logic), *operands)

    return rule


def _sample(given: Any) -> Any:
    """What decides the dtype in which torch compares."""
    value = given.meta["val"] if isinstance(given, Node) else given
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return 0 if isinstance(value, torch.SymInt) else 0.0
    if not isinstance(value, Tensor | int | float):
        raise NotUnderstood
    return value


def _comparable(at: At, given: Any, dtype: torch.dtype) -> Cases:
    """An operand of a comparison, none of whose constants is rounded: rounded ones are equal by accident."""
    own = given.meta["val"].dtype if isinstance(_sample(given), Tensor) else dtype
    cases = at.numbers(given)
    if not all(is_exact(leaf, d) for leaf in cases for d in (own, dtype)):
        raise NotUnderstood
    if dtype == torch.bool:
        return cases
    return at.logic.lift(lambda leaf: convert(leaf, dtype, at.logic.bounds), cases)


def _logical(combine: Callable[[Logic, Formula, Formula], Formula], *, bitwise: bool = False) -> Rule:
    def rule(at: At) -> Value:
        if bitwise and at.node.meta["val"].dtype != torch.bool:
            raise NotUnderstood
        return combine(at.logic, at.condition(at.args["self"]), at.condition(at.args["other"]))

    return rule


def _not(at: At) -> Value:
    if at.node.meta["val"].dtype != torch.bool:
        raise NotUnderstood
    return negate(at.condition(at.args["self"]))


def _where(at: At) -> Value:
    if "self" not in at.args:  # where(condition): the places, not a choice
        raise NotUnderstood
    return choose(
        at, at.condition(at.args["condition"]), at.value(at.args["self"]), at.value(at.args["other"])
    )


def _masked_fill(at: At) -> Value:
    return choose(at, at.condition(at.args["mask"]), at.value(at.args["value"]), at.value(at.args["self"]))


def _arithmetic(name: str, *operands: str) -> Rule:
    """An operation on numbers; `alpha` multiplies the second operand of a sum or difference."""

    def rule(at: At) -> Value:
        dtype = at.node.meta["val"].dtype
        values = [_operand(at, operand, dtype) for operand in operands]
        alpha = at.args.get("alpha", 1)
        if alpha != 1 and name == "sub" and operands[0] == "other":
            raise NotUnderstood
        if alpha != 1:
            scaled = operands.index("other")
            values[scaled] = at.logic.lift(partial(compute, "mul"), values[scaled], at.numbers(alpha))
        return at.logic.lift(partial(compute, name), *values)

    return rule


def _operand(at: At, name: str, dtype: torch.dtype) -> Cases:
    cases = at.numbers(at.args[name])
    return (
        cases if dtype == torch.bool else at.logic.lift(lambda x: convert(x, dtype, at.logic.bounds), cases)
    )


def _divide(at: At) -> Value:
    match at.args.get("rounding_mode"):
        case None:
            return _arithmetic("div", "self", "other")(at)
        case "floor":
            return _arithmetic("floor_divide", "self", "other")(at)
    raise NotUnderstood


def _clamp(at: At) -> Value:
    cases = at.numbers(at.args["self"])
    for name, operation in (("min", "maximum"), ("max", "minimum")):
        if at.args.get(name) is not None:
            cases = at.logic.lift(partial(compute, operation), cases, at.numbers(at.args[name]))
    return cases


def _cumsum(at: At) -> Value:
    """Of what is the same number all along the dimension: as many times that number as there are elements so far."""
    source = at.args["self"]
    if not at.index:
        raise NotUnderstood
    dim = at.args["dim"] % len(at.index)
    along = sympy.Symbol(f"{at.node.name}.position", integer=True, nonnegative=True)
    index = (*at.index[:dim], along, *at.index[dim + 1 :])
    reader = at.reader.with_position(along, shape_of(source)[dim])
    cases = as_numbers(reader.logic, reader.element_at(source, index, at.node))
    (leaf, *others) = cases
    if others or not isinstance(leaf, sympy.Expr) or leaf.has(along):
        raise NotUnderstood
    return always(compute("mul", leaf, at.index[dim] + 1))


def _diff(at: At) -> Value:
    """Differences of neighbours, of the tensor between what is prepended and appended."""
    if at.args["n"] != 1 or at.node.meta["val"].dtype == torch.bool:
        raise NotUnderstood
    dim = at.args["dim"] % len(at.index)
    pieces = [at.args[name] for name in ("prepend", "self", "append") if at.args[name] is not None]
    after = (*at.index[:dim], at.index[dim] + 1, *at.index[dim + 1 :])
    numbers = [as_numbers(at.logic, piecewise(at, pieces, dim, index)) for index in (after, at.index)]
    return at.logic.lift(partial(compute, "sub"), *numbers)


def _copy_of_literal(at: At) -> Value:
    """A tensor written out in the program."""
    source = at.args["self"]
    if source.op != "get_attr":
        return at.value(source)
    held = getattr(source.graph.owning_module, source.target, None)
    if type(held) is not Tensor or not 0 < held.numel() <= MAX_LITERAL:
        raise NotUnderstood
    return _element(at, held)


def _input(at: At) -> Value:
    """A constant of the program, or what a module holds: the latter only behind a check at run time."""
    if CONSTANT in at.node.meta:
        return _element(at, at.node.meta[CONSTANT])
    buffer = at.node.meta.get(BUFFER)
    if buffer is None or at.reader.written(at.node):
        raise NotUnderstood
    handed = buffer.handed
    value = _element(at, buffer.value) if handed is None else element_of(handed, at.index, at.shape, at.logic)
    buffer.read = True
    return value


def _element(at: At, held: Tensor) -> Value:
    form = form_of(held)
    if form is None:
        raise NotUnderstood
    return element_of(form, at.index, at.shape, at.logic)


def _and(logic: Logic, a: Formula, b: Formula) -> Formula:
    return logic.conj([a, b])


def _or(logic: Logic, a: Formula, b: Formula) -> Formula:
    return logic.disj([a, b])


def _xor(logic: Logic, a: Formula, b: Formula) -> Formula:
    return logic.either(a, negate(b), b)


def _swapped(test: Callable[[Logic, Number, Number], Formula]) -> Callable[[Logic, Number, Number], Formula]:
    return lambda logic, a, b: test(logic, b, a)


def _different(logic: Logic, a: Number, b: Number) -> Formula:
    return negate(equal(logic, a, b))


COMPARISONS: Mapping[object, Rule] = MappingProxyType(
    {
        "eq": _comparison(equal),
        **{name: _comparison(_different) for name in ("ne", "not_equal")},
        **{name: _comparison(at_most) for name in ("le", "less_equal")},
        **{name: _comparison(below) for name in ("lt", "less")},
        **{name: _comparison(_swapped(at_most)) for name in ("ge", "greater_equal")},
        **{name: _comparison(_swapped(below)) for name in ("gt", "greater")},
    }
)

RULES: Mapping[object, Rule] = MappingProxyType(
    {
        **VIEWS,
        **COMPARISONS,
        **PRODUCTS,
        "arange": _arange,
        **{name: _constant(0.0) for name in ("zeros", "zeros_like", "new_zeros", "zero")},
        **{name: _constant(1.0) for name in ("ones", "ones_like", "new_ones")},
        **{name: _argument("fill_value") for name in ("full", "full_like", "new_full")},
        "fill": _argument("value"),
        "scalar_tensor": _argument("s"),
        "copy": _argument("src"),
        "eye": _eye,
        "tril": partial(_triangle, lower=True),
        "triu": partial(_triangle, lower=False),
        **{name: _logical(_and, bitwise=True) for name in ("bitwise_and", "__and__")},
        **{name: _logical(_or, bitwise=True) for name in ("bitwise_or", "__or__")},
        **{name: _logical(_xor, bitwise=True) for name in ("bitwise_xor", "__xor__")},
        "logical_and": _logical(_and),
        "logical_or": _logical(_or),
        "logical_xor": _logical(_xor),
        **dict.fromkeys(("logical_not", "bitwise_not"), _not),
        "where": _where,
        "masked_fill": _masked_fill,
        **{name: _arithmetic(name, "self", "other") for name in ("add", "sub", "mul", "maximum", "minimum")},
        **{name: _arithmetic(name, "self", "other") for name in ("floor_divide", "remainder")},
        "rsub": _arithmetic("sub", "other", "self"),
        "subtract": _arithmetic("sub", "self", "other"),
        "multiply": _arithmetic("mul", "self", "other"),
        **dict.fromkeys(("div", "divide", "true_divide"), _divide),
        **{name: _arithmetic(name, "self") for name in ("neg", "abs", "exp", "log", "sqrt")},
        "negative": _arithmetic("neg", "self"),
        "absolute": _arithmetic("abs", "self"),
        "pow": _arithmetic("pow", "self", "exponent"),
        **dict.fromkeys(("clamp", "clamp_min", "clamp_max"), _clamp),
        "cumsum": _cumsum,
        "diff": _diff,
        "lift_fresh_copy": _copy_of_literal,
        "placeholder": _input,
    }
)
