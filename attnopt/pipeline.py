"""One graph through all passes: shadow, read, choose, validate, splice. Shared by the backend and `attnopt.rewrite`."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt import locate, policy, verify
from attnopt.approximation_sparq import Offer, offered
from attnopt.options import Options
from attnopt.passes import emit, splice
from attnopt.passes.autograd import check_gradients
from attnopt.passes.rope import Known
from attnopt.passes.rope_stream import Cut, streamed
from attnopt.passes.settle import settle
from attnopt.passes.sizes import hint
from attnopt.reading import Found, read
from attnopt.registry import expansions, kernels, rules
from attnopt.report import Family, GraphReport, SiteReport, Verdict
from attnopt.rule import Kernel, Reject, Site, SiteMeta, TensorMeta
from attnopt.shadow import Shadow, sub_graphs, trace
from attnopt.shadow_bodies import NOTHING, Around, surroundings
from attnopt.shadow_triage import may_hold_attention
from attnopt.spec import AttentionSpec
from attnopt.wording import spec_text


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the passes did to one graph and the graphs inside it."""

    sites: tuple[SiteReport, ...]
    graphs: tuple[GraphReport, ...]
    edits: "tuple[Edit, ...]" = ()


@dataclass(frozen=True, slots=True)
class Edit:
    """One rewritten site: enough to measure, later, what an approximation costs on real inputs."""

    shadow: Shadow
    site: Site
    spec: AttentionSpec
    kernel: Kernel
    report: int  # index in Outcome.sites


@dataclass(slots=True)
class Clock:
    """Seconds by pass."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the named pass."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def optimise(
    module: GraphModule,
    options: Options,
    *,
    gradient: bool,
    done: verify.Checks | None = None,
    around: Around = NOTHING,
) -> Outcome:
    """Rewrites `module` in place, the sub-graphs first. `gradient`: whether autograd will follow."""
    if not may_hold_attention(module):
        count = len(module.graph.nodes)
        return Outcome((), (GraphReport(nodes_before=count, nodes_after=count),))
    work = _Pass(options, gradient, {} if done is None else done, Clock())
    shadow = work.shadow(module, around)
    inner = [
        optimise(body, options, gradient=gradient, done=work.done, around=surroundings(shadow, body))
        for body in sub_graphs(module)
    ]
    return _join([*inner, work.run(module, shadow)])


def _join(outcomes: Sequence[Outcome]) -> Outcome:
    joined = Outcome((), ())
    for other in outcomes:
        graphs, sites = len(joined.graphs), len(joined.sites)
        joined = Outcome(
            joined.sites + tuple(replace(s, origin=s.origin + graphs) for s in other.sites),
            joined.graphs + other.graphs,
            joined.edits + tuple(replace(e, report=e.report + sites) for e in other.edits),
        )
    return joined


@dataclass(frozen=True, slots=True)
class _Pass:
    options: Options
    gradient: bool
    done: verify.Checks
    clock: Clock
    attentions: frozenset[Node] = frozenset()  # of the graph at hand: where each starts to be read, and ends
    turns: Known = field(default_factory=dict)  # what is known of rotations in it

    def shadow(self, module: GraphModule, around: Around) -> Shadow:
        with self.clock.measure("shadow"):
            return trace(module, expansions(), around)

    def run(self, module: GraphModule, shadow: Shadow) -> Outcome:
        before = len(module.graph.nodes)
        with self.clock.measure("read"):
            found = list(read(shadow, rules()))
        edits: list[Edit] = []
        values = dict(shadow.value_of)
        informed = replace(self, attentions=frozenset(_ends(found)))
        reports = [informed._decide(shadow, each, edits, n, values) for n, each in enumerate(found)]
        with self.clock.measure("splice"):
            splice.finish(shadow, [edit.site for edit in edits])
            module.graph.lint()
            module.recompile()
        graph = GraphReport(
            nodes_before=before, nodes_after=len(module.graph.nodes), seconds=dict(self.clock.seconds)
        )
        return Outcome(tuple(reports), (graph,), tuple(edits))

    def _decide(
        self, shadow: Shadow, found: Found, edits: list[Edit], number: int, values: dict[Node, Node]
    ) -> SiteReport:
        """The verdict on one anchor; a rewritten site is spliced in. `values` as in `splice.splice`."""
        if found.site is None:
            return _left_alone(shadow, found)
        site = found.site
        try:
            meta = self._described(shadow, site)
        except Reject as reject:
            return _left_alone(shadow, Found(found.anchor, None, reject, site.rule))
        offer, choice, site = self._choose(shadow, site, meta)
        report = offer.noted(_draft(found.site, offer.meta, choice))
        if choice.kernel is None:
            verdict: Verdict = "quarantined" if "quarantined" in choice.reason else "refused"
            return replace(report, verdict=verdict, reason=choice.reason)
        if choice.exact and choice.kernel.name == "sdpa" and is_same_call(site, choice.spec):
            reason = offer.note or choice.reason or "the call is the best there is for it already"
            return replace(report, verdict="kept", reason=reason)
        with self.clock.measure("validate"):
            check = self._check(shadow, found.site)  # in the words that say most
        if check.error is not None and not check.agrees:
            return replace(report, verdict="refused", reason=check.reason, error=check.error, kernel=None)
        if site.needless:
            return replace(report, verdict="kept", reason=site.needless, error=check.error, kernel=None)
        try:
            with self.clock.measure("splice"):
                traced = splice.trace_call(shadow, site, choice.spec, choice.kernel.run)
                settle(shadow, found.site, site)
                splice.splice(shadow, site, traced, values)
        except Reject as reject:
            return replace(report, verdict="refused", reason=reject.reason, kernel=None)
        edited = site if choice.exact else replace(site, spec=found.site.spec)
        edits.append(Edit(shadow, edited, choice.spec, choice.kernel, number))
        said = (report.reason, _note(site), f"unverified: {check.reason}" if check.error is None else "")
        notes = "; ".join(filter(None, said))
        return replace(report, verdict="rewritten", error=check.error, reason=notes)

    def _choose(self, shadow: Shadow, site: Site, meta: SiteMeta) -> tuple[Offer, policy.Choice, Site]:
        """The choice, the site in the words of the choice, and what was offered to choose from."""
        with self.clock.measure("choose"):
            near = self._streamed(shadow, site)
            meta = replace(meta, streamed=near if isinstance(near, str) else self._described(shadow, near))
            offer = offered(site, meta, self.options)
            choice = policy.choose(offer.meta, kernels(), offer.options)
        words = site.otherwise if choice.exact or isinstance(near, str) else (near,)
        site = next((other for other in words if other.spec == choice.spec), site)
        return offer, choice, site if choice.spec.sparse is None else offer.site

    def _described(self, shadow: Shadow, site: Site) -> SiteMeta:
        if self.gradient:
            check_gradients(shadow, site)
            if site.forward_only:
                raise Reject(site.forward_only, site.root)
        return describe(site, gradient=self.gradient)

    def _streamed(self, shadow: Shadow, site: Site) -> Site | str:
        """The site as streaming attention where that was asked for, or why it cannot be."""
        if self.options.softmax != "streaming" or site.spec.family != "softmax":
            return ""
        if self.options.assume_causal:
            site = replace(site, spec=policy.waived(site.spec))
        try:
            cut = Cut(self.options.sinks, self.options.window)
            return streamed(shadow, site, cut, self.attentions, self.turns)
        except Reject as reject:
            return f"not cut to sinks and a window: {reject.reason}"

    def _check(self, shadow: Shadow, site: Site) -> verify.Check:
        if self.options.verify == "off":
            return verify.Check(None, "verify=off")
        return verify.validate(shadow, site, self.done)


def _ends(found: Iterable[Found]) -> Iterator[Node]:
    for each in found:
        yield each.anchor
        yield from () if each.site is None else emit.ends(each.site)


def _note(site: Site) -> str:
    """What changes although the meaning does not."""
    if site.remark:
        return site.remark
    if site.unshifted:
        return "the graph takes exp of the scores as they are, and overflows where the call does not"
    if site.spec.dropout:
        return f"dropout {site.spec.dropout:g} stays, with other random numbers than before"
    return ""


def describe(site: Site, *, gradient: bool) -> SiteMeta:
    """What a kernel may know: canonical shapes, dtypes and devices; symbolic sizes by their hints."""
    values = [_hinted(node.meta["val"]) for node in emit.leaves(site)]
    held = emit.operands(site, site.spec, values, emit.lengths(site, values))
    device = emit.leaves(site)[0].meta["val"].device
    metas = {name: TensorMeta(tuple(t.shape), t.dtype, device) for name, t in held.items()}
    otherwise = tuple(describe(other, gradient=gradient) for other in site.otherwise)
    return SiteMeta(site.spec, metas, gradient, otherwise, library=site.rule == "sdpa")


def _hinted(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return 1.0
    return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device="meta")


def is_same_call(site: Site, spec: AttentionSpec) -> bool:
    """Whether an SDPA node would be replaced by the same SDPA call: no mask to begin with, or one that stays."""
    if site.rule != "sdpa":
        return False
    arguments = [*site.root.args[3:4], site.root.kwargs.get("attn_mask")]
    had_mask = any(isinstance(a, Node) for a in arguments)
    return not had_mask or bool(spec.bias or spec.mask.operand_names())


def _draft(site: Site, meta: SiteMeta, choice: policy.Choice) -> SiteReport:
    before = eager_cost(meta)
    after = choice.kernel.cost(replace(meta, spec=choice.spec)) if choice.kernel else None
    return SiteReport(
        family=site.spec.family, verdict="refused", spec=spec_text(site, site.spec if choice.exact else choice.spec),
        kernel=getattr(choice.kernel, "name", None),
        exact=choice.exact, reason=choice.reason, nearest_rule=site.rule, bytes_before=before["bytes"],
        flops_before=before["flops"], bytes_after=after.bytes if after else None,
        flops_after=after.flops if after else None, **locate.where(site.root),
    )  # fmt: skip


def eager_cost(meta: SiteMeta) -> Mapping[str, float]:
    """What the plain spelling moves and computes: all pairs, scores and weights written and read once each."""
    s, width = meta.sizes, meta.operands["q"].dtype.itemsize
    rows = s.batch * (s.heads * s.sq * (s.d + s.dv) + s.kv_heads * s.sk * (s.d + s.dv))
    pairs = float(s.batch * s.heads * s.sq * s.sk)
    return {"bytes": (rows + 4 * pairs) * width, "flops": 2 * pairs * (s.d + s.dv)}


def _left_alone(shadow: Shadow, found: Found) -> SiteReport:
    reject = found.reject or Reject("it was not read", found.anchor)
    linear = found.rule.startswith("linear")  # its rule stays silent about products that are no attention
    shaped = linear or locate.is_attention_shaped(shadow, found.anchor)
    family: Family = "linear" if linear else "softmax" if shaped else "other"
    node = reject.node or found.anchor
    return SiteReport(
        family=family, verdict="refused" if shaped else "rejected", reason=reject.reason,
        nearest_rule=found.rule, node=node.format_node() or node.name, **locate.where(node, found.anchor),
    )  # fmt: skip
