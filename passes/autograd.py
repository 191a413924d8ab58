"""Whether autograd sees a site as one piece: the call that replaces it has one gradient, and gets it in one mode.

Gradients of zeros count: optimisers skip a parameter that has none, DDP reports it, and neither is so with zeros.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.passes import emit
from attnopt.passes.mask_writes import sharing, writes_after
from attnopt.passes.replay import Replay
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow, fake_value
from attnopt.shadow_effects import reads

aten = torch.ops.aten

#: Operators around other graphs that leave the gradients of what is inside as they are.
_TRANSPARENT = frozenset(
    {
        "tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "wrap_with_autocast", "invoke_subgraph",
        "inductor_compiled_code", "hints_wrapper", "run_const_graph", "scan",
    }
)  # fmt: skip


def check_gradients(shadow: Shadow, site: Site) -> None:
    """Raises Reject if part of the site gets another gradient than the formula says.

    That is so where part of it runs under `torch.no_grad()` and part of it does not, where a value passes through
    a hook or a `torch.autograd.Function`, whose backward is its own, where an operand is detached in place after it
    was used, or where an input gets zeros from the graph, and no gradient from the formula.
    """
    replay = Replay.of(shadow, site)
    for node, origin in _foreign(shadow):
        if node in replay.nodes or (node in replay.leaves and _lies_before(shadow, node, origin)):
            raise Reject(
                f"part of the attention passes through {origin.target}, which has a gradient of its own", node
            )
    for node in emit.leaves(site):
        if late := next(_detachments(node, site.root), None):
            raise Reject(f"{node.name} is detached in place ({late.name}) before the call would use it", late)
    modes = grad_modes(shadow)
    for node in _with_gradient(replay):
        if modes[node] != modes[site.root]:
            raise Reject("part of the attention is computed under torch.no_grad(), and part is not", node)
    _check_inputs(shadow, site, replay, modes)


def _detachments(node: Node, end: Node) -> Iterator[Node]:
    """What changes between `node` and `end` whether a tensor with its memory has a gradient, and no element of it."""
    for alias in sharing(node):
        for user in alias.users:
            if node < user < end and user.target in (aten.detach_.default, aten.requires_grad_.default):
                yield user


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


def _check_inputs(shadow: Shadow, site: Site, replay: Replay, modes: Mapping[Node, bool]) -> None:
    """Raises Reject if an input that is trained enters the site, and none of the operands.

    The reading has shown that the result does not depend on it, as on what is subtracted above a softmax and below: it
    has a gradient, of zeros, and would have none.
    """
    if not site.body and not any(_is_trained(shadow, node) for node in replay.nodes):
        return
    operands = emit.leaves(site)
    above = _Above(shadow, modes, site.root)
    entering = above.trained([site.root], operands)
    if missed := entering and entering - above.trained(operands):
        node = min(missed, key=shadow.order.__getitem__)
        name = shadow.value_of.get(node, node).name
        raise Reject(
            f"{name} gets a gradient of zeros, since the attention does not depend on it, and would get none from a "
            "call that does not read it; detach it there, or leave it out",
            node,
        )


@dataclass(frozen=True, slots=True)
class _Above:
    """modes: those of `grad_modes`. end: what is written to a tensor later than this does not count."""

    shadow: Shadow
    modes: Mapping[Node, bool]
    end: Node

    def trained(self, starts: Iterable[Node], known: Iterable[Node] = ()) -> set[Node]:
        """The trained inputs to which a gradient of `starts` goes, but not by way of one that is `known`."""
        found: set[Node] = set()
        seen, pending = {*known}, list(starts)
        while pending:
            node = pending.pop()
            if node in seen or not _has_floats(node):
                continue
            seen.add(node)
            if _is_trained(self.shadow, node):
                found.add(node)
            pending.extend((*self._sources(node), *writes_after(node, self.end)))
        return found

    def _sources(self, node: Node) -> list[Node]:
        """The arguments that get a gradient from the node."""
        if not self.modes[node] or node.target == aten.detach.default:
            return []
        return [source for source in node.all_input_nodes if reads(node, source)]


def _is_trained(shadow: Shadow, node: Node) -> bool:
    """Whether the node is an input of the graph, or a tensor that it holds, which is to have a gradient."""
    if node.op == "placeholder" and node in shadow.value_of:
        value = fake_value(shadow.value_of[node])
    elif node.op == "get_attr":
        value = getattr(shadow.module, str(node.target), None)
    else:
        return False
    return isinstance(value, Tensor) and value.requires_grad


def _has_floats(node: Node) -> bool:
    """Whether what the node makes is floating point, or some of it is."""
    made = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in made)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
