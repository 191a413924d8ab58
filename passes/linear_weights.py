"""What the weights of a linear attention are beside scale * q k^T: a mask, a decay, factors of queries and of keys."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

import sympy
from torch.fx import Node

from attnopt.mask import FULL, Mask
from attnopt.passes.layout import Space
from attnopt.passes.linear_apart import peeled, taken_apart
from attnopt.passes.linear_chain import Gate, Triangle, Weighting
from attnopt.passes.linear_decay import log_decay_operand
from attnopt.passes.linear_places import Places
from attnopt.passes.linear_product import End
from attnopt.passes.linear_rules import DECAY_RULES, vanished
from attnopt.passes.logits import LogitsReader
from attnopt.passes.mask_bounds import POSITIONS, bounds_for, integer_of
from attnopt.passes.mask_decay import DecayReading, decay_of
from attnopt.passes.mask_formula import (
    Call,
    Cases,
    Fact,
    Formula,
    Logic,
    NotUnderstood,
    Number,
    always,
    negate,
    parts_of,
)
from attnopt.passes.mask_numbers import compute, is_constant
from attnopt.passes.mask_reader import MaskReader, Value, as_condition, as_numbers
from attnopt.passes.mask_writes import operation
from attnopt.passes.site import Filled, Operand, Roles, flat
from attnopt.passes.terms import Fill
from attnopt.rule import Reject
from attnopt.spec import Decay

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)

_DECAYS = {"none": Decay.NONE, "per_head": Decay.PER_HEAD, "per_token": Decay.PER_TOKEN}


_STRAY = {
    "factor": "the weights are multiplied by a tensor that varies along features",
    "divisor": "the weights are divided by a tensor that varies along queries and keys",
}


#: What leaves the elements of a tensor as they are.
_PARTS = frozenset(
    {
        "slice",
        "select",
        "view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "expand",
        "to",
        "alias",
        "clone",
        "contiguous",
    }
)


@dataclass(frozen=True)
class Weights:
    """weights = scale * q k^T * decay where visible, q and k multiplied by their factors before.

    operands: the tensors that the mask and the decay name. on_out: factors of the queries that the output is multiplied
    by.
    """

    scale: float = 1.0
    mask: Mask = FULL
    decay: Decay = Decay.NONE
    operands: Mapping[str, Operand | Filled] = field(default_factory=dict)
    on_q: tuple[Operand, ...] = ()
    on_k: tuple[Operand, ...] = ()
    on_out: tuple[Operand, ...] = ()

    def agrees_with(self, other: "Weights") -> bool:
        """Whether they are the same but for the scale and what the output is multiplied by."""
        mine, theirs = (
            (w.mask, w.decay, dict(w.operands), Counter(w.on_q), Counter(w.on_k)) for w in (self, other)
        )
        return mine == theirs

    def factors_first(self) -> "Weights":
        """The same with all factors of the queries on q."""
        return replace(self, on_q=self.on_q + self.on_out, on_out=())


@dataclass(frozen=True, slots=True)
class WeightsReader:
    """Reads the weighting of one site, given what its axes mean; root: the last product of the site."""

    space: Space
    roles: Roles
    root: Node

    def read(self, found: Weighting) -> Weights:
        """Raises Reject for a tensor over pairs of positions that is not proven to be a mask or a decay."""
        inner = self._read(found)
        scale, on_out, *others = self._sorted(Weighting(factors=found.outer))
        if any(others):
            raise Reject("the output is multiplied by a tensor that varies along keys", found.outer[0].node)
        return replace(inner, scale=inner.scale * scale, on_out=on_out)

    def _read(self, found: Weighting) -> Weights:
        scale, on_q, on_k, pairs = self._sorted(found)
        gates = [Fill(gate.node, gate.dims, -inf, gate.hides) for gate in found.gates]
        hidden = LogitsReader(self.space, self.roles).read(gates, ())
        if not pairs and not found.triangles:
            return Weights(scale, hidden.mask, Decay.NONE, hidden.operands, on_q, on_k)
        try:
            factor, reading = self._matrix(pairs, found)
        except Reject:
            apart = taken_apart(self.space, found)
            if apart is None:
                raise
            return self._read(apart)
        decay: Mapping[str, Operand | Filled] = {}
        if reading.log_decay is not None:
            decay = {"log_decay": log_decay_operand(reading, self.roles)}
        return Weights(
            scale * factor,
            reading.causal & hidden.mask,
            _DECAYS[reading.kind],
            {**hidden.operands, **decay},
            on_q,
            on_k,
        )

    def _sorted(self, found: Weighting) -> tuple[float, tuple[Operand, ...], tuple[Operand, ...], list[End]]:
        """The factors by what they vary along: queries, keys, or both. What divides must not vary along both."""
        r, scale = self.roles, found.scale
        on_q: list[Operand] = []
        on_k: list[Operand] = []
        pairs: list[End] = []
        for factor in (*found.factors, *found.divisors):
            node, dims, number = peeled(self.space, factor)
            divides = factor in found.divisors
            scale = scale / number if divides else scale * number
            axes = set(flat(self.space, dims))
            if axes <= {*r.batch, *r.heads, *r.query}:
                on_q.append(Operand(node, dims, inverse=divides))
            elif axes <= {*r.batch, *r.kv_heads, *r.key}:
                on_k.append(Operand(node, dims, inverse=divides))
            elif not divides and axes <= {*r.batch, *r.heads, *r.query, *r.key}:
                pairs.append(End(node, dims, factor.user))
            else:
                raise Reject(_STRAY["divisor" if divides else "factor"], node)
        return scale, tuple(on_q), tuple(on_k), pairs

    def _matrix(self, pairs: Sequence[End], found: Weighting) -> tuple[float, DecayReading]:
        """The product of everything that weighs pairs of positions, as a constant and a decay on a mask."""
        try:
            reader, cases = self._elements(pairs, found)
            factor, cases = _without_constant(reader.logic.lift(partial(vanished, reader.logic), cases))
            reading = decay_of(reader, cases)
        except NotUnderstood:
            reading = None
        if reading is None:
            outside = next(filter(None, (_outside(p.node) for p in pairs)), None)
            why = "comes from outside the graph: nothing proves it" if outside else "is not proven to be"
            node = outside or (pairs[0].node if pairs else self.root)
            raise Reject(f"Q K^T is multiplied by a matrix that {why} a mask or a decay", node)
        return factor, reading

    def _elements(self, pairs: Sequence[End], found: Weighting) -> tuple[MaskReader, Cases]:
        """The element of the product for query i and key j."""
        labels = LogitsReader(self.space, self.roles)
        bounds = Places(self.roles).bounds(bounds_for(self.root, labels.sizes()))
        reader = MaskReader(Logic(bounds), DECAY_RULES)
        cases = always(ONE)
        for pair in pairs:
            held = self._element(reader, pair)
            cases = reader.logic.lift(_product, cases, as_numbers(reader.logic, held))
        for condition in self._conditions(reader, labels, found):
            cases = reader.logic.select(condition, cases, always(ZERO))
        return reader, cases

    def _conditions(self, reader: MaskReader, labels: LogitsReader, found: Weighting) -> list[Formula]:
        """Where the weights are not zeroed, as far as positions tell; what data tell, the gates' own reading says."""
        conditions = [_kept(reader.logic, labels, triangle) for triangle in found.triangles]
        for gate in found.gates:
            held = as_condition(reader.logic, self._element(reader, gate))
            visible = negate(held) if gate.hides else held
            conditions += [part for part in parts_of(visible) if not _reads_data(part)]
        return conditions

    def _element(self, reader: MaskReader, tensor: End | Gate) -> Value:
        """The element that the attention reads, in-place writes before that included."""
        return reader.element_at(tensor.node, Places(self.roles).index(self.space, tensor.dims), tensor.user)


def _outside(node: Node) -> Node | None:
    """The input of the graph of which a tensor is a part, or None."""
    while operation(node) in _PARTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node if node.op in ("placeholder", "get_attr") else None


def _kept(logic: Logic, labels: LogitsReader, triangle: Triangle) -> Formula:
    roles = labels.roles_of((triangle.rows, triangle.columns))
    diagonal = integer_of(triangle.diagonal)
    if roles is None or None in roles or diagonal is None:
        raise NotUnderstood
    row, column = (POSITIONS[role] for role in roles if role is not None)
    beyond = column - row - diagonal
    return logic.at_most_zero(beyond if triangle.lower else -beyond)


def _product(a: Number, b: Number) -> Number:
    if ZERO in (a, b):
        return ZERO
    return b if a == ONE else a if b == ONE else compute("mul", a, b)


def _without_constant(cases: Cases) -> tuple[float, Cases]:
    """A constant that all numbers but 0 have as a factor, and the numbers without it."""
    split = {leaf: _split(leaf) for leaf in cases if leaf != ZERO}
    constants = {constant for constant, _ in split.values()}
    if len(constants) != 1 or constants == {1.0}:
        return 1.0, cases
    return constants.pop(), {split[leaf][1] if leaf in split else leaf: when for leaf, when in cases.items()}


def _split(leaf: Number) -> tuple[float, Number]:
    if is_constant(leaf):
        return float(leaf), ONE
    match leaf:
        case Call("mul", (left, right)) if is_constant(left):
            return _scaled(left, right)
        case Call("mul", (left, right)) if is_constant(right):
            return _scaled(right, left)
        case Call("div", (left, right)) if is_constant(right) and right != ZERO:
            return _scaled(1 / float(right), left)
    return 1.0, leaf


def _scaled(number: float, leaf: Number) -> tuple[float, Number]:
    inner, rest = _split(leaf)
    return float(number) * inner, rest


def _reads_data(formula: Formula) -> bool:
    if isinstance(formula, Fact):
        return True
    return any(map(_reads_data, getattr(formula, "parts", ())))
