"""Whether autograd sees a site as one piece: the call that replaces it has one gradient, and gets it in one mode."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.passes.replay import Replay
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

#: Operators around other graphs that leave the gradients of what is inside as they are.
_TRANSPARENT = frozenset(
    {
        "tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "wrap_with_autocast", "invoke_subgraph",
        "inductor_compiled_code", "hints_wrapper", "run_const_graph", "scan",
    }
)  # fmt: skip


def check_gradients(shadow: Shadow, site: Site) -> None:
    """Raises Reject if part of the site gets another gradient than the formula says.

    That is so where part of it runs under `torch.no_grad()` and part of it does not, or where a value passes through
    a hook or a `torch.autograd.Function`, whose backward is its own.
    """
    replay = Replay.of(shadow, site)
    for node, origin in _foreign(shadow):
        if node in replay.nodes or (node in replay.leaves and _lies_before(shadow, node, origin)):
            raise Reject(
                f"part of the attention passes through {origin.target}, which has a gradient of its own", node
            )
    modes = grad_modes(shadow)
    for node in _with_gradient(replay):
        if modes[node] != modes[site.root]:
            raise Reject("part of the attention is computed under torch.no_grad(), and part is not", node)


def grad_modes(shadow: Shadow) -> dict[Node, bool]:
    """For each node whether gradients are recorded where it runs; taken as on where the graph begins."""
    modes, on = {}, True
    for node in shadow.nodes:
        if node.target is torch._C._set_grad_enabled:
            on = bool(node.args[0])
        modes[node] = on
    return modes


def _foreign(shadow: Shadow) -> Iterator[tuple[Node, Node]]:
    """Values that come out of operators with a backward of their own, each with that operator."""
    for original, value in shadow.outputs.items():
        target = original.target
        if isinstance(target, HigherOrderOperator) and target.name() not in _TRANSPARENT:
            yield from ((n, original) for n in pytree.tree_leaves(value) if isinstance(n, Node))


def _lies_before(shadow: Shadow, node: Node, origin: Node) -> bool:
    """Whether an operand would be taken from before an operator that hands it on as it is, such as a hook."""
    original = shadow.value_of.get(node)
    return original is not None and original < origin


def _with_gradient(replay: Replay) -> Iterator[Node]:
    """The nodes through which the gradient of a floating-point operand goes."""
    carriers = {node for node in replay.leaves if _is_float(node)}
    for node in replay.nodes:
        if _is_float(node) and not carriers.isdisjoint(node.all_input_nodes):
            carriers.add(node)
            yield node


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
