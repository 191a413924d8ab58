"""A full causal site cut to sinks and a window, exact in its positions (StreamingLLM, arXiv 2309.17453)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.fx import Node

from attnopt.buffers import BUFFER
from attnopt.mask import BOTTOM_RIGHT, FULL, And, Causal, First, KeyPadding, Mask, Opaque, Window, band
from attnopt.passes import emit
from attnopt.passes.rope import Known, Rotation, Slices, read_rotation, slices_of, tables_of
from attnopt.passes.rope_cache import is_appended, is_written, with_own_keys
from attnopt.passes.rope_elsewhere import given_values
from attnopt.passes.rope_kept import Stand, beyond, beyond_among_kept, joined
from attnopt.passes.rope_moved import Along, Growth, moved_back, offset_of
from attnopt.passes.rope_tables import Unchanged
from attnopt.passes.rope_trial import bare
from attnopt.passes.site import Operand
from attnopt.passes.sizes import product
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow
from attnopt.spec import EmptyRow, Stream

#: Why padding is refused where a table of rotations, or a list of positions, serves all sequences.
SHARED = (
    "its sequences are padded, and its positions cannot be moved for each of them by itself: give each sequence a row "
    "of its own, (B, N), such as position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)"
)

#: Why several queries over a static cache are refused, and what to do about it.
WRITTEN = (
    "and the graph has written its keys into a static cache at places that only data tell: with such a cache only "
    "prompts without padding and steps of one token are cut. Run the prompt with a DynamicCache, or use "
    "attnopt.caches.streaming(model)"
)
#: What is taken for granted of a static cache.
LYING = "the keys in its cache are taken to lie in the order of their positions"


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept: the first `sinks` keys, and the last `window`, the query's own included."""

    sinks: int
    window: int

    def mask(self, causal: Causal) -> Mask:
        """As a mask; `causal` says where the queries stand."""
        recent = Window(self.window, causal.offset)
        return causal & (First(self.sinks) | recent if self.sinks else recent)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a site sees before it is cut: all keys up to the query's own, of those that `kept` keeps (None: of all).

    trusted: what was taken for granted of the cache, for the report.
    """

    causal: Causal
    kept: Operand | None = None
    trusted: str = ""


#: The operand that says which keys count.
KEPT = "padding"


def streamed(
    shadow: Shadow, site: Site, cut: Cut, before: frozenset[Node] = frozenset(), known: Known | None = None
) -> Site:
    """The site as streaming attention, with new nodes in the shadow for the query to the sinks.

    before, known: as in `read_rotation`.

    Reject where the site is no full causal attention, or its positions are not understood.
    """
    seen = _seen(shadow, site)
    site, spec = _with_kept(site, seen), site.spec
    turning = with_own_keys(site)
    slices = slices_of(shadow, turning)
    rotation = read_rotation(shadow, turning, before, known, slices)
    turned = rotation is not None and cut.sinks > 0
    stream = Stream(cut.sinks, cut.window, seen.causal.offset, turned, KEPT if seen.kept else "")
    needed = turned or (spec.alibi is not None and cut.sinks > 0) or seen.kept is not None
    if seen.kept is None:
        spec = replace(spec, mask=cut.mask(seen.causal))
    else:  # places say what is cut; rows that see no key are padding
        spec = replace(spec, mask=seen.causal & KeyPadding(KEPT), empty_row=EmptyRow.ZERO)
    operands = dict(site.operands)
    if turned and rotation is not None:
        operands["far"] = _far(shadow, site, rotation, stream, slices)
    assumed = _assumed(shadow, slices) if turned else {}
    return replace(
        site,
        spec=replace(spec, stream=stream if needed else None),
        operands=operands,
        otherwise=(),
        assumed={**site.assumed, **assumed},
        remark="; ".join(filter(None, (_remark(shadow, site, rotation, slices), seen.trusted))),
    )


def _remark(shadow: Shadow, site: Site, rotation: Rotation | None, slices: Slices) -> str:
    """What was taken on trust."""
    if rotation is not None and not rotation.counted:
        held = [shadow.value_of.get(node, node) for node in rotation.positions]
        made = "an input, and" if all(node.op == "placeholder" for node in held) else "a running sum, and"
        return f"its positions ({', '.join(n.name for n in held)}) are {made} taken to count up by one"
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


def _with_kept(site: Site, seen: Seen) -> Site:
    return site if seen.kept is None else replace(site, operands={**site.operands, KEPT: seen.kept})


def _seen(shadow: Shadow, site: Site) -> Seen:
    """The diagonal of a mask that hides what is ahead, and padding. Reject where it hides anything else."""
    spec = site.spec
    seen = _of_step(shadow, site) or _of_many(site)
    if spec.bias:
        raise Reject(
            "a tensor is added to its scores, and nothing says how it depends on the position",
            site.root,
        )
    if spec.alibi is not None and spec.alibi.symmetric and spec.alibi.offset != seen.causal.offset:
        raise Reject("its bias turns round elsewhere than at the query", site.root)
    return seen


def _of_many(site: Site) -> Seen:
    """Where the queries stand, by the mask."""
    spec, form = site.spec, band(site.spec.mask)
    if form is not None and form.opaque:
        raise Reject(_unread(site), site.root)
    if form is None or form.offset is None or form.prefix:
        raise Reject(f"its mask is not plainly causal ({spec.mask})", site.root)
    if form.window is not None:
        raise Reject(f"it has a window already ({spec.mask})", site.root)
    kept = None if form.padding is None else site.operands[form.padding]
    if not isinstance(kept, Operand | None):
        raise Reject("its padding is no tensor of the graph", site.root)
    held = is_written(site)
    if held and form.offset == BOTTOM_RIGHT:
        raise Reject(
            f"its last query stands at the end of a static cache ({spec.mask}), {WRITTEN}", site.root
        )
    return Seen(Causal(form.offset), kept, LYING if held else "")


def _of_step(shadow: Shadow, site: Site) -> Seen | None:
    """A single query stands at its own key, which the graph has put behind the others; None where this is none."""
    mask = site.spec.mask
    parts = mask.parts if isinstance(mask, And) else () if mask == FULL else (mask,)
    if emit.result_of(site).roles.query or not all(isinstance(p, KeyPadding | Opaque | First) for p in parts):
        return None
    appended = is_appended(site)
    if not appended and not (parts and is_written(site)):
        return None
    kept = joined(Growth(shadow.module.graph, site.root), site, parts) if parts else None
    if parts and kept is None:
        return None
    return Seen(
        Causal(BOTTOM_RIGHT), kept, "" if appended else f"{LYING}, and its mask to end at the query's own"
    )


def _unread(site: Site) -> str:
    """Why a mask of unknown form is refused, and what to do about it."""
    reason = f"a tensor of unknown form hides some of its keys ({site.spec.mask})"
    if is_written(site):
        return f"{reason}, {WRITTEN}"
    return (
        f"{reason}: wanted causality and padding alone. Hand the model its 2-D attention_mask (B, Sk) instead of a "
        "mask over pairs"
    )


def _far(shadow: Shadow, site: Site, rotation: Rotation, stream: Stream, slices: Slices) -> Operand:
    """The query, of which only the positions are others."""
    roles = emit.result_of(site).roles
    q, k = bare(site.operands["q"]), bare(site.operands["k"])
    growth = Growth(shadow.module.graph, site.root)
    query = Along(q.node, q.dims, roles.query)
    offset = offset_of(growth, stream.offset, query, Along(k.node, k.dims, roles.key))
    stand, held = Stand(query, offset, stream.last), site.operands["q"]
    kept = site.operands[stream.kept] if stream.kept else None
    where = (
        beyond_among_kept(growth, stand, kept, roles) if isinstance(kept, Operand) else beyond(growth, stand)
    )
    if where.is_apart and not rotation.apart:
        raise Reject(SHARED, rotation.positions[0])
    if not isinstance(held, Operand):
        raise Reject("queries that no tensor of the graph holds", site.root)
    counts = [product(a.size for a in axes) for axes in (roles.query, roles.key)]
    return _at(held, moved_back(growth, slices["q"], rotation.positions, where, counts))


def _at(operand: Operand, moved: Mapping[Node, Node]) -> Operand:
    """The same operand of other nodes; what is multiplied onto it stays."""
    beside = tuple(_at(part, moved) for part in operand.beside)
    return replace(operand, node=moved.get(operand.node, operand.node), beside=beside)
