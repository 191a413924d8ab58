"""Streaming as a kernel for softmax sites: exact for any mask that is a band, skipping the blocks that nobody sees."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import add, and_
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels.streaming.checks import DTYPES, WIDEST
from attnopt.kernels.streaming.hidden import hidden_keys, join
from attnopt.kernels.streaming.op import attend, four_dimensional
from attnopt.kernels.streaming.places import Placed, attend_in_places
from attnopt.kernels.streaming.reach import reach
from attnopt.mask import Band, Causal, band
from attnopt.rule import Cost, SiteMeta
from attnopt.spec import MEANS, AttentionSpec, EmptyRow, Stream

#: What the op calls each meaning of a row without keys; without gradients, the two means are one.
_EMPTY_ROWS = {
    EmptyRow.NEVER: "nan",
    EmptyRow.NAN: "nan",
    EmptyRow.ZERO: "zero",
    EmptyRow.UNIFORM: "uniform",
    EmptyRow.ABSORBED: "uniform",
}

#: Queries in a block, for the estimate of the pairs that are touched.
BLOCK = 64


class StreamingKernel:
    """Softmax attention under causal, window, sinks, prefix, padding and dense masks (arXiv 2309.17453, 2307.08691)."""

    name = "streaming"
    family: Literal["softmax", "linear"] = "softmax"
    exact = True
    reads = frozenset(
        {"scale", "heads", "mask", "empty_row", "hidden_logit", "bias", "alibi", "softcap", "sink_logits", "stream"}
    )  # fmt: skip

    def refuse(self, site: SiteMeta) -> str | None:
        """Serves one float dtype, heads of at most 256 channels, and masks that are bands."""
        if band(site.spec.mask) is None:
            return (
                f"mask {site.spec.mask} is not a band (causal, window, sinks, prefix, padding, dense tensors)"
            )
        dtypes = {site.operands[name].dtype for name in "qkv"}
        if len(dtypes) != 1 or not dtypes <= set(DTYPES):
            return f"q, k and v are {', '.join(sorted(map(str, dtypes)))}: wanted one floating dtype"
        if not 1 <= site.sizes.d <= WIDEST or site.sizes.dv > WIDEST:
            return f"D = {site.sizes.d}, Dv = {site.sizes.dv}: wanted 1 to {WIDEST}"
        if site.gradient and site.spec.empty_row is EmptyRow.ABSORBED:
            return "rows without keys pass no gradient on, and here they have to: add -inf instead of a finite number"
        if site.spec.sink_logits and site.spec.empty_row in MEANS:
            return "with learned sinks a row without keys is zero, not the mean of the values"
        if site.spec.hidden_logit is not None and site.spec.stream is not None:
            return "hidden keys keep a logit that may weigh; fill with -inf before keys are dropped"
        return None

    def cost(self, site: SiteMeta) -> Cost:
        """The pairs that blocks of queries touch; dense masks and biases are read once per head."""
        s, form = site.sizes, _form(site.spec)
        pairs = s.batch * s.heads * _pairs(form, s.sq, s.sk)
        dense = len(form.opaque) + len(site.spec.bias)
        if site.spec.hidden_logit is not None and not isinstance(site.spec.mask, Causal):
            pairs, dense = pairs + s.batch * s.heads * s.sq * s.sk, dense + 1
        rows = s.batch * (s.heads * s.sq + s.kv_heads * s.sk) * (s.d + s.dv)
        width = site.operands["q"].dtype.itemsize
        return Cost(float(rows * width + dense * pairs), 2.0 * pairs * (s.d + s.dv), _efficiency(site, dense))

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        """One call of the op; several dense masks become one, several biases their sum."""
        q, k, v = (operands[name] for name in "qkv")
        form = _form(spec)
        if spec.stream is not None:
            return attend_in_places(_placed(spec, spec.stream, form, operands))
        o, lse, _ = attend(
            *(q, k, v, _bias(spec, operands), _mask(form, operands), _padding(form, operands, q, k)),
            operands["sink_logits"] if spec.sink_logits else None,
            scale=spec.scale,
            offset=None if form.offset is None else form.offset.at(q.shape[2], k.shape[2]),
            window=form.window,
            sinks=form.sinks,
            prefix=form.prefix,
            softcap=spec.softcap,
            empty_row="zero" if spec.hidden_logit is not None else _EMPTY_ROWS[spec.empty_row],
            **_line(spec, operands),
        )
        if spec.hidden_logit is None:
            return o
        return join(o, lse, hidden_keys(spec.mask, operands, q, v), spec.hidden_logit)


def _placed(spec: AttentionSpec, stream: Stream, form: Band, operands: Mapping[str, Tensor]) -> Placed:
    """What is left of a site whose positions are places: a causal mask, cut."""
    q, k, v = (operands[name] for name in "qkv")
    return Placed(
        *(q, operands["far"] if stream.turned else q, k, v),
        scale=spec.scale,
        offset=stream.offset.at(q.shape[2], k.shape[2]),
        sinks=stream.sinks,
        window=stream.window,
        bias=_bias(spec, operands),
        kept=_padding(form, operands, q, k),
        sink_logits=operands["sink_logits"] if spec.sink_logits else None,
        softcap=spec.softcap,
        slopes=_line(spec, operands)["slopes"],
    )


def _form(spec: AttentionSpec) -> Band:
    form = band(spec.mask)
    if form is None:
        raise UnsupportedError(f"mask {spec.mask} is not a band; ask `refuse` before")
    if spec.stream is None or not spec.stream.kept:
        return form
    return replace(form, window=spec.stream.window, sinks=spec.stream.sinks)


def _pairs(form: Band, sq: int, sk: int) -> int:
    offset = None if form.offset is None else form.offset.at(sq, sk)
    where = reach(
        offset=offset, window=form.window, sinks=form.sinks, prefix=form.prefix, rows=sq, columns=sk
    )
    return where.pairs(BLOCK)


def _efficiency(site: SiteMeta, dense: int) -> float:
    """Beside the library's own kernels: measured in benchmarks/streaming_cpu.py and streaming_gpu.py."""
    if dense:
        return 0.25
    return 0.3 if site.device.type == "cuda" else 0.45


def _bias(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor | None:
    """The sum of all biases, if there are several in at least fp32 and q's dtype: two lowest numbers are more there."""
    found = [four_dimensional(operands[name]) for name in spec.bias]
    if len(found) < 2:
        return found[0] if found else None
    wide = torch.promote_types(operands["q"].dtype, torch.float32)
    return reduce(add, (x.to(torch.promote_types(x.dtype, wide)) for x in found))


def _line(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> dict[str, Any]:
    """The bias that is linear in the distance: slopes (B or 1, H), in at least fp32, and from where it counts."""
    if spec.alibi is None:
        return {"slopes": None, "diagonal": 0, "symmetric": False}
    q, k, slopes = operands["q"], operands["k"], operands["slopes"]
    return {
        "slopes": slopes.to(torch.promote_types(slopes.dtype, torch.float32)).reshape(-1, q.shape[1]),
        "diagonal": spec.alibi.offset.at(q.shape[2], k.shape[2]),
        "symmetric": spec.alibi.symmetric,
    }


def _mask(form: Band, operands: Mapping[str, Tensor]) -> Tensor | None:
    found = [four_dimensional(operands[name]) for name in form.opaque]
    return reduce(and_, found) if found else None


def _padding(form: Band, operands: Mapping[str, Tensor], q: Tensor, k: Tensor) -> Tensor | None:
    return None if form.padding is None else operands[form.padding].expand(q.shape[0], k.shape[2])


KERNEL = StreamingKernel()
