"""Queries, keys, values and factors that the program itself makes infinite, such as 0 to a negative power.

Data may enter: 1 / (slope * 0) is infinite, whatever the slope. Such factors are tried with several drawn data. What is
written to in place on the way is written to in the trial, too.

Q K^T times infinity is infinite where it is summed with the values; on q or on k it enters other sums, and makes other
elements NaN. A key that is infinite itself is hidden by a fill of the scores, and by no mask that is added to them.
"""

from collections.abc import Callable, Iterable, Mapping
from math import isfinite, prod
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.linear_dropped import is_dropped
from attnopt.passes.mask_writes import is_settled, operation, writes_after
from attnopt.passes.replay import evaluate
from attnopt.passes.site import Filled, Operand
from attnopt.passes.sizes import Concrete, hint
from attnopt.rule import Reject
from attnopt.shadow import CONSTANT

#: Nodes and elements that are computed to learn what a factor holds; what is larger is taken to be finite.
MOST_NODES, MOST_ELEMENTS = 128, 1 << 22
#: The same for factors that data enter.
MOST_DRAWN_NODES, MOST_DRAWN_ELEMENTS = 32, 1 << 18

#: What data may be, from different numbers between 0 and 1. Whether they are rates, their logarithms or gates before a
#: sigmoid: for some of these an exponential of their sums over thousands of positions does not overflow.
DRAWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda uniform: 0.5 + uniform,
    lambda uniform: -0.5 - uniform,
    lambda uniform: 1e-6 * uniform,
    lambda uniform: 32 + uniform,
    lambda uniform: -32 - uniform,
)
#: Positive data all of which round to 0.
SMALL = DRAWS[2:3]


def check_finite(factors: Iterable[Operand], of: str = "weights") -> None:
    """Raises Reject for a factor that is infinite somewhere, or NaN, if it follows from sizes and numbers alone.

    With data in it, it is refused if it is infinite at the same place whatever is drawn. of: what it multiplies.
    """
    for factor in factors:
        if _is_infinite(factor):
            raise Reject(
                f"the {of} are multiplied by a number for each position that is infinite for some; "
                "choose the base of a power and the divisor of a quotient other than 0",
                factor.node,
            )


def check_operands(operands: Mapping[str, Operand]) -> None:
    """The same for queries, keys and values themselves, and for biases: these may be -inf."""
    for name in ("q", "k", "v"):
        if name in operands and _is_infinite(operands[name]):
            raise Reject(
                f"{name} is infinite, or NaN, at some position whatever the data are; choose the base of a power "
                "and the divisor of a quotient other than 0",
                operands[name].node,
                9,
            )
    for name, bias in operands.items():
        if name.startswith("bias") and _is_endless(bias):
            raise Reject(
                "what is added to the scores is +inf, or NaN, at some position whatever the data are, and its row NaN; "
                "hide a key by -inf",
                bias.node,
                9,
            )


def check_decay(decay: Operand | Filled) -> None:
    """Raises Reject for a log decay that is infinite, or NaN, whatever the data are, or made of numbers and grows.

    A log decay of -inf is NaN at a distance of 0. Growing weights overflow, in a kernel's chunks sooner than in a whole
    matrix.
    """
    if isinstance(decay, Filled):
        node, grows, endless = None, decay.value > 0, not isfinite(decay.value)
    else:
        node, endless = decay.node, _is_infinite(decay)
        is_known = not endless and not decay.times and not _sources(decay.node)[1]
        grows = is_known and _whatever_the_data(decay, lambda x: _log_decay(decay, x) > 0)
    if endless:
        raise Reject("the decay, or its logarithm, is infinite or NaN whatever the data are", node, 2)
    if isinstance(decay, Operand) and is_dropped(decay.node):
        raise Reject("dropout makes some decays 0, whose logarithm is NaN at a distance of 0", node, 2)
    if isinstance(decay, Operand) and _vanishes(decay):
        raise Reject(
            "the decay is 0 for small positive data, its logarithm -inf, and NaN at a distance of 0; "
            "do not round what the decay is made of",
            node,
            2,
        )
    if grows:
        raise Reject(
            "the weights grow with the distance instead of decaying: kernels take log decays of at most 0",
            node,
            2,
        )


def _vanishes(decay: Operand) -> bool:
    """Whether a logarithm in the program is -inf for small data; that of a base, taken by us, keeps the diagonal."""
    if decay.function == "log" or not _sources(decay.node)[1]:
        return False
    return _whatever_the_data(decay, lambda x: _log_decay(decay, x) == -torch.inf, _is_tame, SMALL)


def _log_decay(decay: Operand, x: Tensor) -> Tensor:
    """Of what the operand's node holds, what a kernel gets."""
    match decay.function:
        case "log":
            return x.log() * decay.factor
        case "differences":
            return x.diff(dim=-1) * decay.factor
    return x * decay.factor


#: Operations that make no infinity of numbers that are none, unless these are huge.
_TAME = frozenset(
    {
        "mul", "add", "sub", "rsub", "neg", "abs", "relu", "sigmoid", "tanh", "cos", "sin", "square", "sum", "mean",
        "cumsum", "matmul", "bmm", "mm", "linear", "addmm", "einsum", "view", "reshape", "_unsafe_view", "unsqueeze",
        "squeeze", "expand", "permute", "transpose", "mT", "t", "slice", "select", "unflatten", "flatten", "clone",
        "contiguous", "to", "_to_copy", "detach", "alias", "cat", "stack", "chunk", "split", "split_with_sizes",
        "unbind", "flip", "roll", "repeat", "repeat_interleave", "index", "index_select", "arange", "lift_fresh_copy",
        "elu", "silu", "gelu", "softplus", "embedding", "sym_size", "tril", "triu", "outer",
    }
)  # fmt: skip


def _is_tame(node: Node) -> bool:
    """Whether what the node makes is finite if all that it is given is."""
    if node.op != "call_function":
        held = _constant(node)
        return held is None or bool(held.isfinite().all())
    numbers = (x for x in node.args if isinstance(x, float))
    return (node.target is getitem or operation(node) in _TAME) and all(map(isfinite, numbers))


def _is_infinite(factor: Operand) -> bool:
    return _whatever_the_data(factor, lambda x: ~x.isfinite(), _is_tame)


def _is_endless(bias: Operand) -> bool:
    """Whether the bias is +inf or NaN somewhere, beside which no other key of the row weighs anything."""
    return _whatever_the_data(bias, lambda x: ~(x * bias.factor < torch.inf), _is_tame)


def _whatever_the_data(
    factor: Operand,
    test: Callable[[Tensor], Tensor],
    is_tame: Callable[[Node], bool] = lambda _: False,
    draws: tuple[Callable[[Tensor], Tensor], ...] = DRAWS,
) -> bool:
    """Whether the test says yes of the same element, whatever is drawn; not if all nodes that make it are tame."""
    nodes, data = _sources(factor.node)
    if not nodes or len(nodes) > (MOST_DRAWN_NODES if data else MOST_NODES):
        return False  # it is data itself, or too much to compute
    if not factor.inverse and all(map(is_tame, nodes)):
        return False
    found: Tensor | None = None
    for draw in draws if data else draws[:1]:
        value = _value(factor, nodes, data, draw)
        if value is None:
            return False
        found = test(value) if found is None else found & test(value)
        if not bool(found.any()):
            return False
    return True


def _sources(node: Node) -> tuple[set[Node], set[Node]]:
    """What a factor is made of: operations, sizes among them, and data; no operations if it costs too much.

    Writes to any of it before the factor is read are among the operations. A factor that is written to afterwards is
    no operand (`check_unmutated`).
    """
    nodes, data, pending = set[Node](), set[Node](), [node]
    end = None if is_settled(node) else node
    while pending:
        here = pending.pop()
        if here in nodes or here in data:
            continue
        value = here.meta.get("val")
        if isinstance(value, Tensor):
            pending.extend(writes_after(here, end))
        if isinstance(value, Tensor) and _is_data(here, value):
            data.add(here)
            continue
        if _constant(here) is not None:
            nodes.add(here)
            continue
        whole = isinstance(value, int | torch.SymInt)
        if len(nodes) == MOST_NODES or not (whole or _is_cheap(here, value)):
            return set(), set()
        nodes.add(here)
        pending.extend(() if whole else here.all_input_nodes)
    return nodes, data


def _value(
    factor: Operand, nodes: set[Node], data: set[Node], draw: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The factor at sizes with the same literals, in fp64; None where there is nothing to compute it from."""
    sizes = Concrete()
    values: dict[Node, Any] = {}
    for node in (*nodes, *data):
        value, held = node.meta.get("val"), _constant(node)
        if isinstance(value, int | torch.SymInt):
            values[node] = sizes.of(value)
        elif held is not None:
            values[node] = held.double() if held.is_floating_point() else held
        elif node in data and isinstance(value, Tensor):
            uniform = _uniform([sizes.of(size) for size in value.shape])
            values[node] = draw(uniform) if value.is_floating_point() else _truths(uniform, value.dtype, draw)
    try:
        made = evaluate(sorted(nodes - {*values}), values, sizes).get(factor.node)
    except (RuntimeError, IndexError, ValueError):
        return None  # the sizes at hand do not fit its literals
    if not isinstance(made, Tensor):
        return None
    return 1 / made.double() if factor.inverse else made.double()


def _uniform(shape: list[int]) -> Tensor:
    """Numbers between 0 and 1, no two alike, the same at every call."""
    count = prod(shape)
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1)).view(shape)


def _truths(uniform: Tensor, dtype: torch.dtype, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """A mask that says yes and no: what is infinite for either of them is infinite for some.

    Whole numbers may be a mask, 1 and 0, or lengths and positions, which nobody divides by where they are 0: 1 and 2.
    """
    kept = (torch.arange(uniform.numel()) % 2 == 0).view(uniform.shape).to(dtype)
    return kept if dtype == torch.bool or draw is DRAWS[0] else 2 - kept


def _is_data(node: Node, value: Tensor) -> bool:
    """Whether it is a small input, or parameter, of which any numbers, or truths, may be expected."""
    return (
        node.op in ("placeholder", "get_attr")
        and _constant(node) is None
        and not value.is_complex()
        and prod(hint(size) for size in value.shape) <= MOST_DRAWN_ELEMENTS
    )


def _constant(node: Node) -> Tensor | None:
    """A tensor that the program holds, and nobody trains."""
    held = node.meta.get(CONSTANT)
    if node.op == "get_attr":
        held = getattr(node.graph.owning_module, str(node.target), None)
        if isinstance(held, Tensor) and (held.is_floating_point() or held.dtype == torch.bool):
            return None
    return held if isinstance(held, Tensor) else None


def _is_cheap(node: Node, value: object) -> bool:
    """Whether the node makes the same few numbers at every call."""
    made = value if isinstance(value, list | tuple) else (value,)
    return (
        node.op == "call_function"
        and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())
        and all(isinstance(x, Tensor) and prod(map(hint, x.shape)) <= MOST_ELEMENTS for x in made)
    )
