"""Asks every rule at every anchor of a shadow, and settles who is right where they overlap."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from attnopt.rule import Reject, Rule, Site
from attnopt.shadow import Shadow


@dataclass(frozen=True, slots=True)
class Found:
    """An anchor with the site that was read there, or why none was: the rule that got furthest."""

    anchor: Node
    site: Site | None
    reject: Reject | None = None
    rule: str = ""


def read(shadow: Shadow, rules: Sequence[Rule]) -> Iterator[Found]:
    """Every anchor of every rule, in the order of the graph; nodes of sub-graphs belong to their own shadow.

    A product inside an attention that was read is no attention of its own, whatever else it looks like.
    """
    found = list(_read_all(shadow, rules))
    softmax = [f.site for f in found if f.site is not None and f.site.spec.family == "softmax"]
    inside = {node for site in softmax for node in (*site.interior, site.root)}
    yield from _whole([f for f in found if _is_softmax(f) or not _nodes(f) & inside])


def _whole(found: Sequence[Found]) -> Iterator[Found]:
    """Without the products inside a loop that was read, and without what was read of a loop only to be refused."""
    loops = {n for f in found if f.site is not None and f.site.body for n in _nodes(f)}
    kept = [f for f in found if (f.site is not None and f.site.body) or not _nodes(f) & loops]
    sites = {n for f in kept if f.site is not None for n in _nodes(f)}
    refused = {n for f in kept if f.reject is not None for n in f.reject.inside}
    left: list[Found] = []
    for each in kept:
        parts = each.reject.inside if each.reject is not None else frozenset()
        if each.site is not None or (not parts & sites if parts else each.anchor not in refused):
            left.append(each)
    yield from (each for each in left if not _is_outdone(each, left))


def _is_outdone(found: Found, others: Sequence[Found]) -> bool:
    """Whether a refused site is part of another one of which more was established."""
    mine = found.reject
    if mine is None:
        return False
    nodes = {found.anchor, *mine.inside}
    deeper = [f.reject for f in others if f.reject is not None and f.reject.depth > mine.depth]
    return any(nodes & reject.inside for reject in deeper)


def _is_softmax(found: Found) -> bool:
    return found.site is not None and found.site.spec.family == "softmax"


def _nodes(found: Found) -> set[Node]:
    return {found.anchor} if found.site is None else {*found.site.interior, found.site.root}


def _read_all(shadow: Shadow, rules: Sequence[Rule]) -> Iterator[Found]:
    for node in shadow.nodes:
        if node.op != "call_function" or node not in shadow.live or shadow.inlined(node):
            continue
        asked = [rule for rule in rules if node.target in rule.anchors]
        if asked:
            found = _read_one(node, shadow, asked)
            if found is not None:
                yield found


def _read_one(node: Node, shadow: Shadow, asked: Sequence[Rule]) -> Found | None:
    sites: list[Site] = []
    rejects: list[tuple[Reject, str]] = []
    for rule in asked:
        try:
            sites.append(_outside(shadow, rule.read(node, shadow)))
        except Reject as reject:
            rejects.append((reject, rule.name))
    sites = [
        s for s in sites if not s.body
    ] or sites  # a product that is read as such needs no reading as a loop
    if len({(s.root, s.spec) for s in sites}) > 1:
        clash = Reject(f"rules {', '.join(s.rule for s in sites)} read it differently", node, depth=99)
        return Found(node, None, clash, sites[0].rule)
    if sites:
        return Found(node, sites[0])
    furthest, name = max(rejects, key=lambda pair: pair[0].depth)
    return None if furthest.depth < 0 else Found(node, None, furthest, name)


def _outside(shadow: Shadow, site: Site) -> Site:
    """The site, unless it would have to be put where torch.vmap runs: what is computed there belongs to it."""
    inside = {site.root, *site.interior} if site.body else {site.root}
    if not inside & shadow.vmapped:
        return site
    raise Reject(
        "it is computed inside torch.vmap, whose values no call can take; write the batch as a dimension, or compile "
        "the function that torch.vmap runs",
        site.root,
        depth=99,
    )
