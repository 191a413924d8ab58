"""Other names of a site's output: nodes of the original graph that hold the tensor, or the memory, of its root.

In the shadow whatever comes after an operation in place uses its result. The original graph need not: after
`r = out.div_(total)` it may go on with `out`, which is the same tensor, and which the call has to replace as well.
"""

from collections.abc import Iterator

from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.passes.mask_writes import sharing, written_by
from attnopt.rule import Reject
from attnopt.shadow import Shadow


def other_names(shadow: Shadow, root: Node, place: Node) -> list[Node]:
    """Original nodes before `place`, where `root` is computed, that are its very tensor from then on.

    Raises Reject where a node that only shares its memory, such as a view, is used after `place`.
    """
    before = {node for node in sharing(root) if node < root}
    if not before:
        return []
    same = set(_handed_on(root))
    named = [(name, _leaves(value) & before) for name, value in shadow.outputs.items()]
    for name, held in named:
        late = next((user for user in name.users if place < user), None)
        if late is not None and held - same:
            raise Reject(
                f"the output is written over {name.name}, which {late.name} reads afterwards; "
                f"let {late.name} read the result of the operation in place",
                root,
            )
    return [name for name, held in named if held and shadow.outputs[name] in same]


def _handed_on(node: Node) -> Iterator[Node]:
    """What operations in place, up from `node`, were given: they return the very tensor."""
    source = written_by(node)
    while source is not None and _returns_it(node):
        yield source
        node, source = source, written_by(source)


def _returns_it(node: Node) -> bool:
    returned = node.target._schema.returns  # type: ignore[union-attr]
    return len(returned) == 1 and returned[0].alias_info is not None and returned[0].alias_info.is_write


def _leaves(value: object) -> set[Node]:
    return {leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node)}
