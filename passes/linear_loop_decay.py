"""The decay of a loop: measured on a trial, then found among the tensors of the graph.

Where o_i = scale * sum over j <= i of w(i, j) (q_i . k_j) v_j, the gradient of o_i with respect to v_j is scale *
w(i, j) (q_i . k_j): one backward pass gives the weights of a whole row, for all heads at once, and neighbours give the
decay of each step. Which tensor holds it, or its logarithm, or a multiple of that, is told by its values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.fx import Node

from attnopt.passes import emit
from attnopt.passes.layout import Dims
from attnopt.passes.linear_loop_probe import ALL, Trial, gradient
from attnopt.passes.linear_loop_roles import VECTOR, Cast, Labels
from attnopt.passes.reroll_cut import Region
from attnopt.passes.reroll_facts import is_view
from attnopt.passes.reroll_sizes import name_of
from attnopt.passes.site import Operand, Roles
from attnopt.rule import Reject

CLOSE = 1e-9
#: A tensor with more numbers is no decay of heads.
MOST_HEADS = 4096


@dataclass(frozen=True, slots=True)
class Measured:
    """scale: the weight of a position for itself. steps: log decays (B, H, S - 1), of the second position and on."""

    scale: float
    steps: Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """log decay = factor * function(node), the dimensions of which are `dims`; node None: `factor` everywhere."""

    kind: Literal["per_head", "per_token"]
    node: Node | None
    dims: tuple[object, ...]
    factor: float
    function: Literal["", "log"] = ""


def canonical(value: Tensor, dims: Dims, name: str, roles: Roles, sizes: emit.Lengths) -> Tensor:
    """A tensor with these dimensions in the canonical layout of an operand."""
    operand = Operand(None, dims)  # type: ignore[arg-type]
    return emit.arrange(operand, name, roles, {None: value}, sizes)


def axis_lengths(labels: Labels, cast: Cast, trial: Trial) -> emit.Lengths:
    """The length of every axis in a trial."""
    known: emit.Lengths = {}
    for node in (cast.q, cast.k, cast.v):
        for axes, size in zip(labels.by[node], trial.given[node].shape, strict=True):
            known.update(dict.fromkeys(axes, size))
    return known


def measure(region: Region, trial: Trial, cast: Cast, labels: Labels) -> Measured:
    """Scale and decays. Raises Reject where the weights are of no such form."""
    sizes = axis_lengths(labels, cast, trial)
    out = trial.values[region.root].select(region.dim, -1)
    feature = cast.features - (cast.features > region.dim)
    row = gradient(trial, out.select(feature, 0).sum(), cast.v)
    roles = labels.roles
    d_v = canonical(row, labels.by[cast.v], "v", roles, sizes)[..., 0]
    q = canonical(trial.given[cast.q].detach(), labels.by[cast.q], "q", roles, sizes)[:, :, -1:]
    k = canonical(trial.given[cast.k].detach(), labels.by[cast.k], "k", roles, sizes)
    weights = d_v / (q @ k.mT)[:, :, 0]
    scale = float(weights[0, 0, -1])
    alike = (weights[..., -1] - scale).abs().max() <= CLOSE * abs(scale)
    if scale == 0 or not bool(alike) or not bool((weights / scale > 0).all()):
        if any(ALL in cast.patterns[leaf] for leaf in cast.others):
            raise Reject(VECTOR, region.root, 3)
        if cast.gates:
            raise Reject(_weighed(cast.gates), region.root, 2)
        raise Reject("a loop over positions whose weights are no scale times a decay", region.root, 1)
    logs = (weights / scale).log()
    return Measured(rounded(scale), logs[..., :-1] - logs[..., 1:])


def _weighed(gates: Sequence[Node]) -> str:
    names = " or ".join(node.name for node in gates)
    return (
        f"a loop over positions that gives each a weight of its own, made of {names}, beside the decay (as dt in a "
        "state space model); multiply the keys or the values by it before the loop, and make the decay there"
    )


def rounded(scale: float) -> float:
    """A scale measured at 1 but for rounding is 1."""
    return 1.0 if abs(scale - 1.0) < 1e-12 else scale


def differing_head(region: Region, cast: Cast, trial: Trial) -> int | None:
    """The dimension of the output along which a tensor without positions, such as a slope for each head, differs."""
    for leaf in cast.others:
        at = [
            p[1]
            for p in cast.patterns.get(leaf, ())
            if p[0] == "at" and p[1] not in (region.dim, cast.features)
        ]
        if len(at) == 1 and trial.given[leaf].numel() <= MOST_HEADS:
            return int(at[0])
    return None


def find(
    region: Region, trial: Trial, cast: Cast, labels: Labels, steps: Tensor, candidates: Sequence[Node]
) -> Found | None:
    """The log decay as an operand; None where nothing is forgotten. Raises Reject where no tensor holds it."""
    if steps.numel() == 0 or not bool((steps.abs() > CLOSE / 100).any()):
        return None
    per_head = steps[:1, :, :1]
    if bool(((steps - per_head).abs() <= CLOSE * per_head.abs().clamp_min(1e-3)).all()):
        found = next(_per_head(trial, labels, per_head[0, :, 0], candidates), None)
    else:
        sizes = axis_lengths(labels, cast, trial)
        found = next(_per_token(trial, cast, labels, steps, sizes), None)
    if found is None:
        raise Reject("no tensor of the graph holds the decay of this loop", region.root, 2)
    return found


def _per_head(trial: Trial, labels: Labels, wanted: Tensor, candidates: Sequence[Node]) -> Iterator[Found]:
    heads = labels.roles.heads
    for node in candidates:
        value = trial.values.get(node)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() > MOST_HEADS:
            continue
        held = value.detach().double().flatten()
        if held.numel() not in (1, wanted.numel()):
            continue
        dims = tuple(heads if n > 1 else () for n in value.shape)
        if held.numel() > 1 and not _is_of_heads(value, wanted.numel()):
            continue
        for factor, function in _multiples(held, wanted):
            yield Found("per_head", node, dims, factor, function)
    if bool((wanted == wanted[0]).all()) or bool(((wanted - wanted[0]).abs() <= CLOSE * wanted.abs()).all()):
        yield Found("per_head", None, (), float(wanted[0]))


def _is_of_heads(value: Tensor, heads: int) -> bool:
    return [n for n in value.shape if n > 1] == [heads]


def _per_token(
    trial: Trial, cast: Cast, labels: Labels, wanted: Tensor, sizes: emit.Lengths
) -> Iterator[Found]:
    roles = labels.roles
    for node in cast.gates:
        dims = labels.by.get(node)
        if dims is None:
            continue
        value = canonical(trial.given[node].detach(), (*dims, ()), "v", _without_features(roles), sizes)[
            ..., 0
        ]
        for factor, function in _multiples(value[..., 1:], wanted):
            yield Found("per_token", node, dims, factor, function)


def _without_features(roles: Roles) -> Roles:
    return Roles(roles.batch, roles.kv_heads, roles.share, roles.query, roles.key, roles.d, ())


def _multiples(held: Tensor, wanted: Tensor) -> Iterator[tuple[float, Literal["", "log"]]]:
    """factor and function with wanted = factor * function(held), for all elements."""
    functions: list[tuple[Literal["", "log"], Tensor]] = [("", held)]
    if bool((held > 0).all()):
        functions.append(("log", held.log()))
    for function, value in functions:
        if not bool((value != 0).all()):
            continue
        ratio = wanted / value
        factor = float(ratio.flatten()[0])
        close = bool(((ratio - factor).abs() <= CLOSE * abs(factor)).all())
        one_number = held.numel() == 1 and wanted.numel() > 1
        if close and factor != 0 and (function == "" or abs(factor - 1) < CLOSE) and not one_number:
            yield _whole(factor), function


def _whole(factor: float) -> float:
    """-1 and 1 without the error of measuring."""
    return float(round(factor)) if abs(factor - round(factor)) < 1e-7 and round(factor) else factor


#: Operations whose results are positive, whatever they are given.
POSITIVE = frozenset({"exp", "exp2", "sigmoid", "softmax", "softplus", "_softmax"})


def check_positive(region: Region, node: Node) -> None:
    """A factor is given as its logarithm: of a negative one NaN would come out. Constants were seen to be positive."""
    if node in region.nodes and not above(node, region) & set(region.leaves):
        return
    while is_view(node):
        node = node.all_input_nodes[0]
    if name_of(node) not in POSITIVE:
        reason = (
            f"the state is multiplied by {node.name}, which nothing proves to be positive; compute it as the exp or "
            "the sigmoid of something"
        )
        raise Reject(reason, node, 3)


def above(node: Node, region: Region) -> set[Node]:
    """A node of a region, and everything in the region of which it is made, leaves included."""
    inside, seen, pending = set(region.nodes), {node}, [node]
    while pending:
        at = pending.pop()
        if at in inside:
            fresh = [n for n in at.all_input_nodes if n not in seen]
            seen.update(fresh)
            pending += fresh
    return seen
