"""SparQ at a decoding site: which cache the site reads, and whether reading it so would pay."""

from dataclasses import dataclass, replace

from torch import Tensor

from attnopt.options import Options
from attnopt.passes.cached import Origin, held
from attnopt.passes.sizes import hint
from attnopt.report import SiteReport
from attnopt.rule import Site, SiteMeta, TensorMeta

#: Bytes that memory moves at once: what one channel of one key costs at least.
SECTOR = {"cuda": 32, "cpu": 64}
#: Share of the bandwidth that reading scattered channels reaches: an estimate.
STRIDED = 0.75
#: A step has a few launches more than dense attention; so many bytes could be read meanwhile.
LAUNCHES = {"cuda": 2.0**24}
#: SparQ pays if its estimate is at most this share of dense attention's.
PAYS = 0.8


@dataclass(frozen=True, slots=True)
class Offer:
    """A site as SparQ may read it, for `policy.choose`: with what a cache holds beside k and v, or with why not."""

    site: Site
    meta: SiteMeta
    options: Options
    note: str = ""

    def noted(self, report: SiteReport) -> SiteReport:
        """The report with the reason why the site stays exact."""
        return replace(report, reason="; ".join(filter(None, (self.note, report.reason))))


def offered(site: Site, meta: SiteMeta, options: Options) -> Offer:
    """The site, unchanged unless SparQ was named and the site has one query.

    Over a cache of SparQ's it gets the second key layout and the mean value. Over another one the options lose
    `softmax="sparq"` where the step would not pay, unless the user allows that kernel by name.
    """
    plain = Offer(site, meta, options)
    if options.softmax != "sparq" or site.spec.family != "softmax" or meta.sizes.sq != 1:
        return plain
    found = held(site)
    if found.beside:
        more = replace(site, operands={**site.operands, **found.beside})
        metas = {name: _meta(operand.node.meta["val"]) for name, operand in found.beside.items()}
        return replace(plain, site=more, meta=replace(meta, operands={**meta.operands, **metas}))
    if "sparq" in options.allow:
        return plain
    reason = refusal(meta, options, found.origin)
    return replace(plain, options=replace(options, softmax="exact"), note=reason) if reason else plain


def _meta(value: Tensor) -> TensorMeta:
    return TensorMeta(tuple(hint(n) for n in value.shape), value.dtype, value.device)


def refusal(meta: SiteMeta, options: Options, origin: Origin) -> str:
    """Why SparQ would not pay over a cache that holds its keys by rows alone, or ""."""
    dense, sparq = dense_bytes(meta), sparq_bytes(meta, options)
    copied = 0.0
    if origin == "copied":  # the graph reads and writes the whole cache before anyone attends to it
        copied = 2 * dense
    if sparq + copied <= PAYS * (dense + copied):
        return ""
    why = " and the graph copies the whole cache for each token" if copied else ""
    return (
        f"left exact, SparQ would not pay here: without a second key layout a step costs as much as reading "
        f"{(sparq + copied) / 1e6:.3g} MB, exact attention {(dense + copied) / 1e6:.3g} MB{why}; decode over "
        "attnopt.caches.sparq, or say allow=('sparq',)"
    )


def dense_bytes(meta: SiteMeta) -> float:
    """What exact attention reads: all keys and values."""
    s = meta.sizes
    return float(s.batch * s.kv_heads * s.sk * (s.d + s.dv) * _width(meta))


def sparq_bytes(meta: SiteMeta, options: Options) -> float:
    """What a step costs without a second layout, in bytes read at full bandwidth.

    The chosen channels lie in every row: of the sectors of a row at least one in two is touched as soon as a few
    channels are. With as many kv heads as query heads all values are read for their mean.
    """
    s, width, device = meta.sizes, _width(meta), meta.device.type
    sectors = max(1.0, s.d * width / SECTOR.get(device, 32))
    touched = 1 - (1 - 1 / sectors) ** min(options.rank, s.d)
    keys = s.sk * s.d * touched / STRIDED
    mean = s.sk * s.dv if s.heads == s.kv_heads else 0
    chosen = min(options.topk, s.sk) * (s.d + s.dv)
    return float(s.batch * s.kv_heads * (keys + mean + chosen) * width) + LAUNCHES.get(device, 0.0)


def _width(meta: SiteMeta) -> int:
    return meta.operands["k"].dtype.itemsize
