"""Positions that enter a site otherwise than by turning queries and keys: learned ones, added ones, from outside."""

from collections.abc import Iterable, Iterator

from torch.fx import Node

from attnopt.buffers import is_held
from attnopt.passes.constants import uniform
from attnopt.passes.mask_writes import operation
from attnopt.passes.rope_slice import Slice, is_float, is_tensor, is_whole
from attnopt.passes.sizes import Size, is_one, same, shape_of
from attnopt.rule import Reject
from attnopt.shadow import Shadow
from attnopt.shadow_effects import reads

#: What takes a run of rows of a tensor.
ROWS = frozenset({"slice", "narrow", "select"})
#: What adds or multiplies element by element.
ADDS, MULTIPLIES = frozenset({"add", "sub", "rsub"}), frozenset({"mul", "multiply", "addcmul", "complex"})
#: What moves rows of a tensor to and fro.
MOVES_ROWS = frozenset(
    {"index", "index_select", "gather", "index_add", "index_put", "index_copy", "scatter", "scatter_add"}
)
#: What hands elements on.
HANDS_ON = (
    frozenset(
        {
            "to",
            "_to_copy",
            "type_as",
            "clone",
            "contiguous",
            "expand",
            "unsqueeze",
            "view",
            "reshape",
            "detach",
            "alias",
        }
    )
    | ROWS
)


def check_values(shadow: Shadow, start: Iterable[Node], ends: frozenset[Node], length: Size) -> None:
    """Reject where what `start` is computed from counts positions, on the way up to `ends`: attentions before it.

    length: of the sequence, which a table of learned positions has, too.
    """
    whole: list[Node] = []
    for node in _computed_from(shadow, start, ends):
        if operation(node) in {"arange", "linspace"} or _counts_tokens(shadow, node):
            raise Reject(_reason(shadow, node), node)
        if operation(node) in ADDS and (table := _table_added(shadow, node, length)) is not None:
            raise Reject(_reason(shadow, table), node)
        if node.op != "call_function" and is_whole(node):
            if not _is_held(shadow, node):
                whole.append(node)
            elif any(not is_one(size) for size in shape_of(node)):  # a single number counts no tokens
                raise Reject(_reason(shadow, node), node)
    if len(whole) > 1:
        raise Reject(_reason(shadow, whole[-1]), whole[-1])


def given_values(shadow: Shadow, start: Iterable[Node]) -> str:
    """The name of an input of real numbers that `start` is computed from, and that is no parameter; "" for none."""
    for node in _computed_from(shadow, start, frozenset()):
        if node.op == "placeholder" and is_float(node) and _is_wide(node) and not _is_held(shadow, node):
            return shadow.value_of.get(node, node).name
    return ""


def _counts_tokens(shadow: Shadow, node: Node) -> bool:
    """Whether the node is a running sum of ones, or of a padding mask."""
    if operation(node) != "cumsum":
        return False
    here = node.all_input_nodes[0]
    if uniform(here) is not None:
        return True
    while operation(here) in HANDS_ON | {"ne", "eq", "gt"} and here.all_input_nodes:
        here = here.all_input_nodes[0]
    return here.op == "placeholder" and not _is_held(shadow, here) and not is_float(here)


def _reason(shadow: Shadow, node: Node) -> str:
    name = shadow.value_of.get(node, node).name
    return (
        f"positions may enter its queries, keys or values otherwise than by turning them, through {name} "
        "(learned, added or scaled positions): they cannot be moved. Wanted rotations (RoPE), ALiBi or no positions"
    )


def _computed_from(shadow: Shadow, start: Iterable[Node], ends: frozenset[Node]) -> Iterator[Node]:
    """All that the values of `start` depend on; not what says which rows of computed values go where, as of experts."""
    seen, pending = set[Node](), [*start]
    while pending:
        node = pending.pop()
        if node in seen or node in ends:
            continue
        seen.add(node)
        yield node
        above = (n for n in node.all_input_nodes if reads(node, n) and is_tensor(n))
        pending.extend(n for n in above if not _chooses(shadow, node, n))


def _chooses(shadow: Shadow, node: Node, above: Node) -> bool:
    """Whether `above` only tells which rows of something made of the graph's inputs are taken, or where they go."""
    if operation(node) not in MOVES_ROWS or not is_whole(above):
        return False
    moved = node.all_input_nodes[0]
    return above is not moved and is_float(moved) and _is_made_of_inputs(shadow, moved)


def _is_made_of_inputs(shadow: Shadow, node: Node) -> bool:
    """Whether some input that is no parameter or buffer lies above."""
    seen, pending = set[Node](), [node]
    while pending:
        here = pending.pop()
        if here.op == "placeholder" and is_tensor(here) and not _is_held(shadow, here):
            return True
        if here not in seen:
            seen.add(here)
            pending.extend(here.all_input_nodes)
    return False


def _table_added(shadow: Shadow, node: Node, length: Size) -> Node | None:
    """A parameter or buffer of which rows, or as many as there are tokens, are added."""
    for above in node.all_input_nodes:
        rows, here = False, above
        while operation(here) in HANDS_ON and here.all_input_nodes:
            rows, here = rows or operation(here) in ROWS, here.all_input_nodes[0]
        shape = shape_of(here)
        is_table = is_float(here) and len(shape) > 1 and _is_held(shadow, here)
        if is_table and (rows or any(same(size, length) for size in shape[:-1])):
            return here
    return None


def check_tables(shadow: Shadow, cut: Slice) -> None:
    """Reject where queries or keys are multiplied by an input of the graph, which may be a table of positions."""
    given = {leaf: {leaf} for leaf in cut.data}
    for node in cut.nodes:
        parts = [given.get(above, set()) for above in node.all_input_nodes]
        given[node] = set().union(*parts)
        if operation(node) in MULTIPLIES and len(parts) > 1:
            for part in sorted(parts, key=_rank):
                _check_factor(shadow, part, [other for other in parts if other is not part])


def _rank(leaves: set[Node]) -> int:
    return max((len(shape_of(leaf)) for leaf in leaves), default=0)


def _check_factor(shadow: Shadow, part: set[Node], others: list[set[Node]]) -> None:
    suspects = {n for n in part if n.op == "placeholder" and not _is_held(shadow, n) and _is_wide(n)}
    if not suspects or not _inputs(shadow, set().union(*others)) - _inputs(shadow, part):
        return
    leaf = min(suspects, key=lambda n: n.name)
    raise Reject(
        f"its queries or keys are multiplied by {shadow.value_of.get(leaf, leaf).name}, an input of this graph, which "
        "may be a table of positions: wanted positions that the graph turns into a rotation itself (is there a graph "
        "break?)",
        leaf,
    )


def _inputs(shadow: Shadow, nodes: Iterable[Node]) -> set[Node]:
    """The inputs of the graph that some of `nodes` are computed from, but for parameters and buffers."""
    found = _computed_from(shadow, nodes, frozenset())
    return {n for n in found if n.op == "placeholder" and not _is_held(shadow, n) and _is_wide(n)}


def _is_wide(node: Node) -> bool:
    return is_whole(node) or sum(size != 1 for size in shape_of(node)) > 1


def _is_held(shadow: Shadow, node: Node) -> bool:
    """Whether a leaf is a parameter or a buffer."""
    return node.op == "get_attr" or is_held(shadow.value_of.get(node, node).meta)
