"""Interprets a mask subgraph of the shadow, node by node: the element at a symbolic index, as a function of positions.

`MaskReader.element(node, index)` asks the rule for the node's operation, which asks for elements of its inputs at
indices of their own. What has no rule, or is not certain, is data. The rules are in mask_views and mask_rules.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.mask_bounds import POSITIONS, Role, integer_of
from attnopt.passes.mask_formula import (
    FALSE,
    TRUE,
    Cases,
    Data,
    Fact,
    Formula,
    Index,
    Logic,
    NotUnderstood,
    always,
    negate,
)
from attnopt.passes.mask_numbers import as_leaf, convert
from attnopt.passes.mask_writes import arguments, covered, is_settled, operation, writes_after
from attnopt.passes.sizes import Size, is_one, same, shape_of

#: What an element is: a condition for tensors of booleans, else a number.
Value = Formula | Cases

#: A node and the index into it.
Element = tuple[Node, Index]

#: Chains longer than this are computations, not masks.
MAX_DEPTH = 48


@dataclass(frozen=True)
class At:
    """One element that a rule computes: of `node`, at `index`; helps to ask for elements of the node's inputs."""

    reader: "MaskReader"
    node: Node
    index: Index

    @cached_property
    def args(self) -> Mapping[str, Any]:
        """The arguments of the call by name."""
        return arguments(self.node)

    @property
    def logic(self) -> Logic:
        return self.reader.logic

    @property
    def shape(self) -> tuple[Size, ...]:
        return shape_of(self.node)

    def value(self, given: Any, index: Index | None = None) -> Value:
        """The element of an argument: at its own `index`, or at that which broadcasting gives it; a number as it is."""
        if not isinstance(given, Node) or not isinstance(given.meta.get("val"), Tensor):
            return always(as_leaf(given))
        if index is None:
            index = broadcast(self.index, self.shape, shape_of(given))
        return self.reader.element_at(given, index, self.node)

    def numbers(self, given: Any, index: Index | None = None) -> Cases:
        """`value`, booleans as 0 and 1."""
        return as_numbers(self.logic, self.value(given, index))

    def condition(self, given: Any, index: Index | None = None) -> Formula:
        """`value`, numbers as whether they differ from 0."""
        return as_condition(self.logic, self.value(given, index))

    def integer(self, given: Any) -> sympy.Expr:
        """An argument that is a size, a dimension, a diagonal."""
        found = integer_of(given)
        if found is None:
            raise NotUnderstood
        return found

    def size(self, given: Node, dim: int) -> sympy.Expr:
        return sympy.sympify(shape_of(given)[dim])


@dataclass
class MaskReader:
    """Elements of one shadow graph.

    rules: by the name of an ATen operation, or by the function that a node calls. seen: all elements that were asked
    for so far. needs: element -> the elements it was computed from; None -> what was asked for from outside, since
    the last `read`. writes: in-place writes to each node so far asked about. readings: what callers concluded; a
    reader serves all sites of a graph that have the same sizes, so that a mask is read once for all layers.
    """

    logic: Logic
    rules: "Mapping[object, Rule]"
    seen: dict[Element, Value] = field(default_factory=dict)
    depth: int = 0
    writes: dict[Node, list[Node]] = field(default_factory=dict)
    needs: dict[Element | None, dict[Element, None]] = field(default_factory=dict)
    readings: dict[Any, Any] = field(default_factory=dict)
    asking: Element | None = None

    def element(self, node: Node, index: Index) -> Value:
        """The element of `node`, as it was when the node had just run."""
        key = (node, index)
        self.needs.setdefault(self.asking, {})[key] = None
        if key not in self.seen:
            before, self.asking, self.depth = self.asking, key, self.depth + 1
            self.seen[key] = self._interpret(node, index)
            self.asking, self.depth = before, self.depth - 1
        return self.seen[key]

    def read(self, node: Node, roles: tuple[Role | None, ...], at: Node | None) -> Value:
        """The element of a tensor whose dimensions have these roles, when `at` reads it.

        Without `at`: when anybody does; NotUnderstood if that is not the same for all.
        """
        self.needs.pop(None, None)
        if at is None and not is_settled(node):
            raise NotUnderstood
        return self.element_at(node, index_of(roles), at)

    def reached(self) -> dict[Element, Value]:
        """The elements that the last `read` depends on, innermost first: all made before whatever asked for it."""
        found: dict[Element, Value] = {}
        entered: set[Element] = set()
        pending = list(self.needs.get(None, ()))
        while pending:
            key = pending[-1]
            if key not in entered:
                entered.add(key)
                pending.extend(self.needs.get(key, ()))
                continue
            found.setdefault(pending.pop(), self.seen[key])
        return found

    def written(self, node: Node, before: Node | None = None) -> list[Node]:
        """In-place writes to `node`, in order; those before `before` reads it."""
        if node not in self.writes:
            self.writes[node] = writes_after(node, None)
        return [write for write in self.writes[node] if before is None or write < before]

    def element_at(self, node: Node, index: Index, reader: Node | None) -> Value:
        """The element of `node` when `reader` reads it, in-place writes in between included."""
        value = self.element(node, index)
        for write in self.written(node, reader):
            value = self._overwritten(node, write, index, value)
        return value

    def _interpret(self, node: Node, index: Index) -> Value:
        name = operation(node) or node.target if node.op == "call_function" else node.op
        rule = self.rules.get(name)
        dtype = node.meta["val"].dtype if isinstance(node.meta["val"], Tensor) else None
        if rule is not None and self.depth <= MAX_DEPTH and dtype is not None:
            try:
                return self._as_held(rule(At(self, node, index)), node)
            except NotUnderstood:
                pass
        return Fact(Data(node, index)) if dtype == torch.bool else always(Data(node, index))

    def with_position(self, symbol: sympy.Symbol, count: Size) -> "MaskReader":
        """A reader of the same graph that knows one more position."""
        logic = Logic(self.logic.bounds.with_position(symbol, count))
        return MaskReader(logic, self.rules, depth=self.depth)

    def _as_held(self, value: Value, node: Node) -> Value:
        """A rule's result in the dtype of the node."""
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return as_condition(self.logic, value)
        return self.logic.lift(
            lambda leaf: convert(leaf, dtype, self.logic.bounds), as_numbers(self.logic, value)
        )

    def _overwritten(self, node: Node, write: Node, index: Index, before: Value) -> Value:
        """The element after `write`: what was written where that covers the index, else what was there before."""
        places = covered(write, node)
        if places is None:
            raise NotUnderstood
        inside = self.logic.conj(
            self.logic.at_most_zero(e)
            for at, place in zip(index, places, strict=True)
            for e in (place.start - at, at - place.start - place.length + 1)
        )
        shifted = tuple(
            at - place.start for at, place in zip(index, places, strict=True) if not place.is_single
        )
        written = self.element(write, shifted)
        if isinstance(before, Formula) and isinstance(written, Formula):
            return self.logic.either(inside, written, before)
        return self.logic.select(inside, as_numbers(self.logic, written), as_numbers(self.logic, before))


#: Computes one element of a node from elements of its inputs, or raises NotUnderstood.
Rule = Callable[[At], Value]


def index_of(roles: tuple[Role | None, ...]) -> Index:
    """The index of a tensor whose dimensions have these roles."""
    return tuple(sympy.Integer(0) if role is None else POSITIONS[role] for role in roles)


def broadcast(index: Index, shape: tuple[Size, ...], source: tuple[Size, ...]) -> Index:
    """The index into a tensor of shape `source` that is broadcast to `shape`, given the index into the result."""
    if len(source) > len(shape):
        raise NotUnderstood
    aligned = zip(index[len(shape) - len(source) :], shape[len(shape) - len(source) :], source, strict=True)
    return tuple(_broadcast_one(*dimension) for dimension in aligned)


def _broadcast_one(at: sympy.Expr, size: Size, source: Size) -> sympy.Expr:
    if same(size, source):
        return at
    if is_one(source):
        return sympy.Integer(0)
    raise NotUnderstood


def as_numbers(logic: Logic, value: Value) -> Cases:
    """A condition as 1 where it holds and 0 elsewhere; numbers as they are."""
    if not isinstance(value, Formula):
        return value
    return logic.cases([(sympy.Integer(1), value), (sympy.Integer(0), negate(value))])


def as_condition(logic: Logic, value: Value) -> Formula:
    """Where numbers differ from 0; a condition as it is."""
    if isinstance(value, Formula):
        return value
    return logic.test(lambda leaf: _is_not_zero(logic, leaf), value)


def _is_not_zero(logic: Logic, leaf: Any) -> Formula:
    if isinstance(leaf, float):
        return TRUE if leaf != 0 else FALSE
    if isinstance(leaf, sympy.Expr):
        return negate(logic.equal(leaf, sympy.Integer(0)))
    raise NotUnderstood
