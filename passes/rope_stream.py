"""A full causal site cut to sinks and a window, exact in its positions (StreamingLLM, arXiv 2309.17453)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from attnopt.buffers import BUFFER
from attnopt.mask import BOTTOM_RIGHT, FULL, Band, Causal, First, Mask, Window, band
from attnopt.passes import emit
from attnopt.passes.layout import Dims, Space, step_up
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.rope import Known, Rotation, Slices, read_rotation, slices_of, tables_of
from attnopt.passes.rope_elsewhere import given_values
from attnopt.passes.rope_moved import Along, Growth, moved_back, offset_of
from attnopt.passes.rope_tables import Unchanged
from attnopt.passes.rope_trial import bare
from attnopt.passes.site import Operand
from attnopt.passes.sizes import is_one, same, shape_of
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow
from attnopt.spec import Stream


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept: the first `sinks` keys, and the last `window`, the query's own included."""

    sinks: int
    window: int

    def mask(self, causal: Causal) -> Mask:
        """As a mask; `causal` says where the queries stand."""
        recent = Window(self.window, causal.offset)
        return causal & (First(self.sinks) | recent if self.sinks else recent)


def streamed(
    shadow: Shadow, site: Site, cut: Cut, before: frozenset[Node] = frozenset(), known: Known | None = None
) -> Site:
    """The site as streaming attention, with new nodes in the shadow for the query to the sinks.

    before, known: as in `read_rotation`.

    Reject where the site is no full causal attention, or its positions are not understood.
    """
    spec = site.spec
    causal = _plain_causal(site)
    slices = slices_of(shadow, site)
    rotation = read_rotation(shadow, site, before, known, slices)
    turned = rotation is not None and cut.sinks > 0
    stream = Stream(cut.sinks, cut.window, causal.offset, turned)
    needed = turned or (spec.alibi is not None and cut.sinks > 0)
    spec = replace(spec, mask=cut.mask(causal), stream=stream if needed else None)
    operands = dict(site.operands)
    if turned and rotation is not None:
        operands["far"] = _far(shadow, site, rotation, stream, slices)
    assumed = _assumed(shadow, slices) if turned else {}
    held = {**site.assumed, **assumed}
    remark = _remark(shadow, site, rotation, slices)
    return replace(site, spec=spec, operands=operands, otherwise=(), assumed=held, remark=remark)


def _remark(shadow: Shadow, site: Site, rotation: Rotation | None, slices: Slices) -> str:
    """What was taken on trust."""
    if rotation is not None and not rotation.counted:
        names = ", ".join(shadow.value_of.get(node, node).name for node in rotation.positions)
        return f"its positions ({names}) are an input, and taken to count up by one"
    if rotation is not None or site.spec.alibi is not None:
        return ""
    name = given_values(shadow, [node for cut in slices.values() for node in cut.data])
    return (
        f"no positions were seen, but {name} is an input of this graph: they may have entered before"
        if name
        else ""
    )


def _assumed(shadow: Shadow, slices: Slices) -> dict[Node, Unchanged]:
    """Tables that a module holds are looked at whenever the graph runs; those of a program cannot change."""
    tables = tables_of(shadow, slices)
    return {
        node: Unchanged(node, value.detach().clone())
        for node, value in tables.items()
        if BUFFER in shadow.value_of.get(node, node).meta
    }


def _plain_causal(site: Site) -> Causal:
    """The diagonal of a mask that hides what is ahead, and nothing else."""
    spec, form = site.spec, band(site.spec.mask)
    if spec.mask == FULL and _is_decoding(site):
        form = Band(offset=BOTTOM_RIGHT)
    if form is None or form.offset is None or form.prefix:
        raise Reject(f"its mask is not plainly causal ({spec.mask})", site.root)
    if form.window is not None:
        raise Reject(f"it has a window already ({spec.mask})", site.root)
    if _hides_by_data(form):
        raise Reject(
            f"tensors hide some of its keys ({spec.mask}), so that the first ones need "
            "not be what its queries see first; leave padding and attention_mask out",
            site.root,
        )
    if spec.bias:
        raise Reject(
            "a tensor is added to its scores, and nothing says how it depends on the position",
            site.root,
        )
    if spec.alibi is not None and spec.alibi.symmetric and spec.alibi.offset != form.offset:
        raise Reject("its bias turns round elsewhere than at the query", site.root)
    return Causal(form.offset)


def _is_decoding(site: Site) -> bool:
    """Whether a single query attends to a cache and to its own key, which is the last: all others lie before it."""
    roles, k = emit.result_of(site).roles, bare(site.operands["k"])
    node, dims = _uncovered(k.node, k.dims)
    if roles.query or roles.key not in dims or operation(node) not in {"cat", "concat"}:
        return False
    held = arguments(node)
    dim, pieces = int(held.get("dim", 0)) % len(dims), list(held["tensors"])
    own = shape_of(pieces[-1])
    return dims.index(roles.key) == dim and len(own) == len(dims) and is_one(own[dim])


def _uncovered(node: Node, dims: Dims) -> tuple[Node, Dims]:
    """What lies above views of all elements, with its dimensions."""
    space = Space()
    while True:
        above = node.all_input_nodes[:1]
        is_whole = operation(node) == "slice" and all(map(same, shape_of(node), shape_of(above[0])))
        moved = (above[0], dims) if is_whole else step_up(space, node, dims)
        if moved is None:
            return node, dims
        node, dims = moved


def _hides_by_data(form: Band) -> bool:
    return form.padding is not None or bool(form.opaque)


def _far(shadow: Shadow, site: Site, rotation: Rotation, stream: Stream, slices: Slices) -> Operand:
    """The query, of which only the positions are others."""
    roles = emit.result_of(site).roles
    q, k = bare(site.operands["q"]), bare(site.operands["k"])
    growth = Growth(shadow.module.graph, site.root)
    offset = offset_of(
        growth, stream.offset, Along(q.node, q.dims, roles.query), Along(k.node, k.dims, roles.key)
    )
    moved = moved_back(growth, slices["q"], rotation.positions, stream.last, offset)
    held = site.operands["q"]
    if not isinstance(held, Operand):
        raise Reject("queries that no tensor of the graph holds", site.root)
    return _at(held, moved)


def _at(operand: Operand, moved: Mapping[Node, Node]) -> Operand:
    """The same operand of other nodes; what is multiplied onto it stays."""
    beside = tuple(_at(part, moved) for part in operand.beside)
    return replace(operand, node=moved.get(operand.node, operand.node), beside=beside)
