"""Which tensor that enters a loop is the query, key, value, first state or decay, and what its dimensions mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from attnopt.passes.layout import Axes, Axis, Dims
from attnopt.passes.linear_loop_probe import (
    ALL,
    ONE,
    OTHER,
    Pattern,
    Probe,
    Trial,
    is_linear_in,
    mixes,
    patterns,
    probe,
)
from attnopt.passes.linear_loop_tables import Table
from attnopt.passes.reroll_cut import Region
from attnopt.passes.site import Roles
from attnopt.passes.sizes import shape_of
from attnopt.rule import Reject

Patterns = tuple[Pattern, ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """The tensors by role, with what their dimensions have to do with the output. features: the output's last axis.

    gates: tensors over positions that have no features; others: tensors that have neither.
    """

    q: Node
    k: Node
    v: Node
    state: Node | None
    gates: tuple[Node, ...]
    others: tuple[Node, ...]
    features: int
    patterns: Mapping[Node, Patterns]


def cast_of(region: Region, trial: Trial, tables: Sequence[Table]) -> Cast:
    """The roles. Raises Reject, naming the recurrence where it is a known one of another kind."""
    held = {table.node for table in tables}
    free = [leaf for leaf in region.leaves if leaf not in held]
    probes = probe(trial, region.root, free, region.dim)
    found = patterns(trial.values[region.root].shape, probes)
    known = {leaf: p for leaf, p in found.items() if p is not None}
    rank = len(shape_of(region.root))
    reasons: list[Reject] = []
    for features in sorted(set(range(rank)) - {region.dim}, reverse=True):
        try:
            return _cast(region, _Measured(trial, region.root, probes[0], known), known, features)
        except Reject as reject:
            reasons.append(reject)
    raise max(reasons, key=lambda reject: reject.depth)


@dataclass(frozen=True, slots=True)
class _Measured:
    """A trial, and one element of its output."""

    trial: Trial
    end: Node
    element: Probe
    known: Mapping[Node, Patterns]

    def is_linear_in(self, leaves: Sequence[Node]) -> bool:
        """Whether the output is linear in these tensors together."""
        return is_linear_in(self.trial, self.element, leaves)

    def mixes_features(self, found: "_Likely") -> bool:
        """Whether what one feature of the queries is multiplied by depends on other features of the keys."""
        pairs = ((q, k) for q in found.queries for k in found.keys)
        return any(mixes(self.trial, self.end, self.element, (q, k), self._features) for q, k in pairs)

    def _features(self, leaf: Node) -> int:
        return self.known[leaf].index(ALL)


def _cast(region: Region, measured: _Measured, known: Mapping[Node, Patterns], features: int) -> Cast:
    """The roles if that dimension of the output holds features. Raises Reject."""
    dim, single = region.dim, region.length == 1
    wide = {leaf: p for leaf, p in known.items() if p.count(ALL) == 1 and OTHER not in p}
    spread = {leaf: ("upto", dim) in p for leaf, p in known.items()}
    q_like = [n for n, p in wide.items() if ("at", features) not in p and (("at", dim) in p or single)]
    k_like = [n for n, p in wide.items() if ("at", features) not in p and (spread[n] or single)]
    states = [n for n, p in wide.items() if ("at", features) in p and not spread[n] and ("at", dim) not in p]
    values = [
        n for n, p in known.items() if ("at", features) in p and n not in wide and (spread[n] or single)
    ]
    chosen = {*q_like, *k_like, *states, *values}
    gates = tuple(n for n, p in known.items() if n not in chosen and spread[n] and not {ALL, OTHER} & set(p))
    others = tuple(n for n in known if n not in chosen and n not in gates)
    if not single:
        _check_kind(region, measured, _Likely(q_like, k_like, values, states))
    if single:
        q_like, k_like = _told_apart(measured, q_like, states)
    if not (len(q_like) == len(k_like) == len(values) == 1 and len(states) <= 1):
        reason = "a loop over positions, but its queries, keys and values cannot be told from one another"
        raise Reject(reason, region.root, 1)
    state = states[0] if states else None
    return Cast(q_like[0], k_like[0], values[0], state, gates, others, features, known)


def _check_kind(region: Region, measured: _Measured, found: "_Likely") -> None:
    """Raises Reject for recurrences whose state is multiplied by more than a number for each head."""
    if len(found.values) != 1 or not found.keys:
        return
    linear = measured.is_linear_in
    if not linear([*found.values, *found.states]):
        raise Reject("a recurrence that is not linear in its values", region.root, 2)
    if len(found.queries) == 1 and not linear(found.queries):
        raise Reject(
            "a loop over positions that divides by a sum as it goes, so it is not linear in the queries; divide what a "
            "plain loop over keys times values makes, afterwards",
            region.root,
            3,
        )
    if not any(linear([k, *found.states]) for k in found.keys):
        raise Reject(_MATRIX if measured.mixes_features(found) else VECTOR, region.root, 3)
    if len(found.keys) > 1:
        raise Reject(VECTOR, region.root, 3)


@dataclass(frozen=True, slots=True)
class _Likely:
    """The tensors that could be queries, keys, values and first states."""

    queries: Sequence[Node]
    keys: Sequence[Node]
    values: Sequence[Node]
    states: Sequence[Node]


_MATRIX = (
    "a linear recurrence whose state is multiplied by a matrix made of the keys (a delta rule): kernels here take one "
    "number for each head"
)
VECTOR = (
    "a linear recurrence that forgets each feature by its own gate (gated linear attention, RWKV, a selective scan): "
    "its state is multiplied by a vector, and kernels here take one number for each head"
)


def _told_apart(
    measured: _Measured, alike: Sequence[Node], states: Sequence[Node]
) -> tuple[list[Node], list[Node]]:
    """Queries and keys of a single position: the output is linear in the queries, also through the first state."""
    queries = [n for n in alike if measured.is_linear_in([n])]
    if len(alike) == 2 and not states:
        return [alike[0]], [alike[1]]
    return queries, [n for n in alike if n not in queries]


@dataclass(frozen=True, slots=True)
class Labels:
    """roles: the axes of the site. out: the dimensions of the root. by: of each tensor."""

    roles: Roles
    out: Dims
    by: Mapping[Node, Dims]


def label(region: Region, cast: Cast, head: int | None) -> Labels:
    """Axes for all dimensions; `head`: the dimension of the output along which decays differ (None: not known)."""
    shape = shape_of(region.root)
    axes: list[Axes] = [() if n == 1 else (Axis(n),) for n in shape]
    key: Axes = () if region.length == 1 else (Axis(shape[region.dim]),)
    d_size = max(
        (s for s, p in zip(shape_of(cast.q), cast.patterns[cast.q], strict=True) if p == ALL), default=1
    )
    d: Axes = () if d_size == 1 else (Axis(d_size),)
    rest = [n for n in range(len(shape)) if n not in (region.dim, cast.features)]
    heads = head if head is not None else (rest[-1] if len(rest) > 1 else None)
    batch = tuple(a for n in rest if n != heads for a in axes[n])
    roles = Roles(
        batch, axes[heads] if heads is not None else (), (), axes[region.dim], key, d, axes[cast.features]
    )
    places = {("at", n): group for n, group in enumerate(axes)}
    named: dict[Pattern, Axes] = {ONE: (), ALL: d, **places, ("upto", region.dim): key}
    by = {
        leaf: tuple(named[p] for p in found)
        for leaf, found in cast.patterns.items()
        if all(p in named for p in found) and leaf not in cast.others
    }
    missing = next((n for n in (cast.q, cast.k, cast.v) if n not in by), None)
    if missing is not None:
        raise Reject(
            "a loop over positions, but a tensor in it has dimensions that mean nothing here", missing, 2
        )
    return Labels(roles, tuple(axes), by)
