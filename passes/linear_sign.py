"""Whether a tensor can be the base of a decay: its logarithm is what a kernel gets."""

from collections.abc import Iterator

from torch.fx import Node

from attnopt.passes.mask_writes import arguments, operation

#: Operations that give nothing below zero, whatever they are given.
_NEVER_NEGATIVE = frozenset(
    {"sigmoid", "exp", "exp2", "softplus", "relu", "softmax", "abs", "square", "sqrt", "rsqrt"}
)
#: Operations that give nothing below zero if all that they are given is so.
_KEEP = frozenset(
    {
        "mul", "div", "add", "sum", "mean", "cumsum", "cumprod", "prod", "amax", "amin", "maximum", "minimum", "max",
        "min", "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "permute", "transpose", "mT", "t",
        "slice", "select", "unflatten", "flatten", "flip", "roll", "repeat", "repeat_interleave", "index", "clone",
        "contiguous", "to", "_to_copy", "detach", "alias", "cat", "stack", "movedim", "pow", "lift_fresh_copy", "float",
        "double", "type_as", "split", "chunk", "unbind", "index_select", "gather", "nan_to_num", "where", "masked_fill",
    }
)  # fmt: skip
#: Operations that hand elements on, perhaps rounded.
_SAME = frozenset(
    {
        "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "expand", "permute", "transpose", "mT", "t", "slice",
        "select", "unflatten", "flatten", "clone", "contiguous", "to", "_to_copy", "detach", "alias", "float", "double",
    }
)  # fmt: skip
_WHOLE = frozenset({"floor", "ceil", "round", "trunc", "sign"})
#: Numbers that these take are part of what they compute with.
_NUMBERS = ("self", "other", "value", "alpha")
#: A longer way is not followed.
_MOST = 64


def may_be_a_base(node: Node) -> bool:
    """Whether a tensor is known not to be negative, or comes in from outside as a table of bases.

    What a model keeps, one number a head, is taken to be a base if it is used as one. What is computed must show it.
    """
    return (node.op != "call_function" and len(_long(node)) <= 1) or is_never_negative(node)


def is_log_of_whole_numbers(node: Node) -> bool:
    """Whether all elements are logarithms of whole numbers: 0, or infinite, which times a distance of 0 is NaN."""
    log = next((n for n in _handed_on(node) if operation(n) == "log"), None)
    return log is not None and any(map(_is_whole, _handed_on(log.all_input_nodes[0])))


def _handed_on(node: Node) -> Iterator[Node]:
    """The node, and upwards what holds the same elements in another shape or type."""
    yield node
    for _ in range(_MOST):
        if operation(node) not in _SAME:
            return
        node = node.all_input_nodes[0]
        yield node


def _is_whole(node: Node) -> bool:
    return operation(node) in _WHOLE or not node.meta["val"].is_floating_point()


def _long(node: Node) -> list[object]:
    return [size for size in node.meta["val"].shape if size != 1]


def is_never_negative(node: Node, steps: int = 0) -> bool:
    """Whether no element can be below zero, as far as the operations that make it tell."""
    name, call = operation(node), arguments(node)
    if node.op != "call_function" or steps > _MOST:
        return False
    if name in _NEVER_NEGATIVE:
        return True
    if name in ("clamp", "clamp_min") and _is_number(call.get("min")):
        return bool(call["min"] >= 0)
    if name == "rsub":  # 1 - sigmoid(x)
        return call.get("other") == 1 and _is_at_most_one(call.get("self"))
    numbers = [call[key] for key in _NUMBERS if _is_number(call.get(key))]
    given = [n for n in node.all_input_nodes if n.meta["val"].is_floating_point()]
    sound = name in _KEEP and bool(given) and all(number >= 0 for number in numbers)
    return sound and all(is_never_negative(n, steps + 1) for n in given)


def _is_at_most_one(value: object) -> bool:
    return isinstance(value, Node) and operation(value) in ("sigmoid", "softmax")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
