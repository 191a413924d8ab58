"""SparQ tests share these: random decoding steps, their fp64 oracle, and how two choices are compared."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.plain import Decision, approximate, attend_to, decide
from attnopt.kernels.sparq.request import Request

LAYOUTS = ("plain", "transposed", "sliced", "expanded")


@dataclass(frozen=True)
class Case:
    """Sizes and choices of one decoding step; `padding` is the share of padded positions."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    sk: int = 50
    d: int = 16
    dv: int = 16
    rank: int = 5
    topk: int = 12
    local: int = 3
    padding: float = 0.0
    mean_value: bool = True
    has_k_t: bool = True
    layout: str = "plain"
    scale: float = 0.3
    spread: float = 1.0
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn, *, longest: int = 60, widest: int = 40) -> Case:
    topk = draw(st.integers(1, longest + 10))
    return Case(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 5)),
        sk=draw(st.integers(1, longest)),
        d=draw(st.integers(1, widest)),
        dv=draw(st.integers(1, widest)),
        rank=draw(st.integers(1, widest + 5)),
        topk=topk,
        local=draw(st.integers(0, topk)),
        padding=draw(st.sampled_from([0.0, 0.3, 0.9])),
        mean_value=draw(st.booleans()),
        has_k_t=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        scale=draw(st.sampled_from([0.3, 1.0, -0.5, 0.0])),
        spread=draw(st.sampled_from([1.0, 8.0])),
        seed=draw(st.integers(0, 99)),
    )


def request_of(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Request:
    """Random operands for a case, the same on every device; padded keys and values hold NaN and infinity.

    Few values in a row are drawn around 2: a row that cancels to nothing has no error to be compared with.
    """
    torch.manual_seed(case.seed)
    c, kv = case, (case.batch, case.kv_heads)
    q = (torch.randn(c.batch, c.kv_heads * c.group, 1, c.d) * c.spread).to(dtype)
    k = torch.randn(*kv, c.sk, c.d).to(dtype)
    v = (torch.randn(*kv, c.sk, c.dv) + (2.0 if c.dv < 8 else 0.0)).to(dtype)
    kept = torch.rand(c.batch, c.sk) >= c.padding if c.padding else None
    if kept is not None:
        k[~kept[:, None].expand(k.shape[:3])] = torch.nan
        v[~kept[:, None].expand(v.shape[:3])] = torch.inf
    if c.layout == "expanded":
        k, v = k[:, :1].expand(k.shape), v[:, :1].expand(v.shape)
    k_t = laid_out(k.mT.to(device), c.layout) if c.has_k_t else None
    q, k, v = (laid_out(x.to(device), c.layout) for x in (q, k, v))
    kept = None if kept is None else kept.to(device)
    return Request(q, k, v, k_t, None, kept, c.rank, c.topk, c.local, c.scale, c.mean_value)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x if layout == "expanded" else x.contiguous()


def attention(request: Request) -> Tensor:
    """The public function on a request."""
    r = request
    return sparq_attention(
        r.q, r.k, r.v, rank=r.rank, topk=r.topk, local=r.local, k_t=r.k_t, v_mean=r.v_mean,
        scale=r.scale, key_padding=r.kept, mean_value=r.mean_value,
    )  # fmt: skip


def kept_rows(request: Request) -> Tensor:
    """(B, Sk) bool on the CPU, whatever the request holds."""
    everything = torch.ones(request.k.shape[0], request.k.shape[2], dtype=torch.bool)
    return everything if request.kept is None else request.kept.cpu()


def decisions(request: Request) -> list[Decision | None]:
    """What the definition decides in fp64, for each batch row and kv head in turn; None where nothing is kept."""
    q, k, kept = request.q.double().cpu(), request.k.double().cpu(), kept_rows(request)
    q = q.reshape(q.shape[0], k.shape[1], request.group, q.shape[3])
    choices = {"rank": request.rank, "topk": request.topk, "local": request.local, "scale": request.scale}
    return [
        decide(q[b, h], k[b, h], kept[b], **choices) if kept[b].any() else None
        for b in range(k.shape[0])
        for h in range(k.shape[1])
    ]


def answer(request: Request, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, H, 1, Dv) by the definition in `dtype`, but with these positions (B, Hkv, n); all of them when None."""
    q, k, v = (x.to(dtype).cpu() for x in (request.q, request.k, request.v))
    kept, (batch, kv_heads, sk, _) = kept_rows(request), k.shape
    out = q.new_zeros(batch, kv_heads, request.group, v.shape[3])
    q = q.reshape(batch, kv_heads, request.group, q.shape[3])
    for i, decision in enumerate(decisions(request)):
        b, h = divmod(i, kv_heads)
        if decision is None:
            continue
        chosen = range(sk) if positions is None else positions[b, h].tolist()
        scores = torch.stack(
            [approximate(x, k[b, h], decision.channels, kept[b], request.scale) for x in q[b, h]]
        )
        mine = Decision(decision.channels, [p for p in chosen if kept[b, p]], scores)
        is_blended = request.mean_value and len(mine.positions) < int(kept[b].sum())
        mean = v[b, h][kept[b]].double().mean(0).to(dtype) if is_blended else None
        out[b, h] = attend_to(q[b, h], k[b, h], v[b, h], mine, request.scale, mean)
    return out.reshape(batch, -1, 1, v.shape[3])


def yardstick(request: Request, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What eager torch makes of the same definition in `dtype`, row by row the worst of three orders of summation.

    The error of one order may be small by luck; how much the dtype loses shows in the worst.
    """
    want = answer(request, positions, torch.float64)
    turned = replace(request, q=request.q.flip(-1), k=request.k.flip(-1), k_t=None)
    backwards = (torch.arange(request.k.shape[2]) if positions is None else positions).flip(-1)
    backwards = backwards.expand(*request.k.shape[:2], -1)
    drawn = [
        answer(request, positions, dtype),
        answer(turned, positions, dtype),
        answer(request, backwards, dtype),
    ]
    worst = torch.stack([(x - want).norm(dim=-1) for x in drawn]).argmax(0)
    return torch.stack(drawn).gather(0, worst[None, ..., None].expand(1, *want.shape))[0]


def score_error(request: Request) -> list[float]:
    """For each batch row and kv head: how far off, relatively, fp32 may compute a score.

    A dot product of r terms is off by at most r roundings of the sum of its sizes; an exponential turns that into a
    relative error, a softmax takes it twice (in a score and in the sum), and its own steps lose a few roundings more.
    """
    q, k, kept = request.q.double().cpu(), request.k.double().cpu().abs(), kept_rows(request)
    q = q.reshape(q.shape[0], k.shape[1], request.group, q.shape[3]).abs()
    errors = []
    for i, decision in enumerate(decisions(request)):
        b, h = divmod(i, k.shape[1])
        if decision is None:
            errors.append(0.0)
            continue
        part = q[b, h][:, decision.channels]
        heat = (q[b, h].sum(-1) / part.sum(-1)).sqrt().nan_to_num(0.0)
        sizes = (part @ k[b, h][kept[b]][:, decision.channels].T).amax(-1) * heat * abs(request.scale)
        errors.append(float(sizes.max()) * 2 * (len(decision.channels) + 4) * 2.0**-24 + 2.0**-20)
    return errors


def assert_scores(request: Request, scores: Tensor) -> None:
    """The approximate scores (B, Hkv, G, Sk) are those of the definition, as well as fp32 can have them."""
    errors, rows = score_error(request), scores.flatten(0, 1).cpu()
    for mine, decision, error in zip(rows, decisions(request), errors, strict=True):
        want = torch.zeros_like(mine).double() if decision is None else decision.scores
        torch.testing.assert_close(mine.double(), want, rtol=error, atol=1e-37)


def assert_legal(request: Request, positions: Tensor) -> None:
    """The chosen positions (B, Hkv, topk) differ, hold all that is local, and the best that is kept as fp32 sees it."""
    kept = kept_rows(request).repeat_interleave(positions.shape[1], 0)
    chosen = positions.flatten(0, 1).cpu()
    for decision, mine, seen, error in zip(
        decisions(request), chosen, kept, score_error(request), strict=True
    ):
        assert len(set(mine.tolist())) == len(mine) == request.topk
        if decision is None:
            continue
        local = seen.nonzero().flatten()[max(0, int(seen.sum()) - request.local) :]
        assert set(local.tolist()) <= set(mine.tolist())
        weight = decision.scores.sum(0)
        got, want = weight[mine[seen[mine]]].sort().values, weight[decision.positions].sort().values
        torch.testing.assert_close(got, want, rtol=2 * error, atol=1e-37)
