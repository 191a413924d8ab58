"""SparQ decoding on a GPU against its definition in fp64: the shapes, their random buffers, and what is right."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.sparq.plain import Decision, approximate, attend_to, decide
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, choose_tiles, power_of_two, weight_block
from attnopt.kernels.sparq.triton_decode import choose, decode, score_positions, served
from attnopt.kernels.sparq.triton_start import Token, choose_channels

Row = dict[str, Any]

#: Bits that one rounding of the output leaves, and twice that is allowed.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}


#: Groups of a case that are judged, spread over the batch: the definition sorts in Python.
JUDGED = 4


@dataclass(frozen=True)
class Shape:
    """One decoding step into the last of `sk` positions; `kept` is the share of positions that are not padding.

    A cache with `ends` counts from a fifth to four fifths of its buffers in its second row, and on in the next ones.
    """

    batch: int
    heads: int
    kv_heads: int
    sk: int
    d: int = 128
    kept: float = 1.0
    topk: int = 128
    ends: bool = False

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} KV{self.kv_heads} S{self.sk} D{self.d}"


CHECKED = [
    Shape(2, 8, 8, 1000),
    Shape(1, 32, 8, 4096),
    Shape(2, 8, 2, 3001, kept=0.7),
    Shape(1, 8, 1, 2500, d=80),
    Shape(1, 4, 4, 2000, d=256, topk=600),
    Shape(3, 12, 4, 777, d=64, kept=0.1),
    Shape(1, 8, 8, 100),
    Shape(3, 8, 8, 5000, ends=True),
    Shape(3, 16, 4, 3000, ends=True),
    Shape(2, 32, 2, 3000, ends=True),
    Shape(1, 2, 1, 200_000),
    Shape(1, 1, 1, 1_000_000),
    Shape(2, 8, 2, 131_072),
    Shape(2, 16, 4, 70_000, topk=64, ends=True),
    Shape(1, 8, 1, 60_000, d=64, kept=0.5, topk=64),
]


def request_of(shape: Shape, dtype: torch.dtype) -> Request:
    """Random buffers on the GPU with both key layouts and the mean value, into which one more token is to go."""
    s, kv = shape, (shape.batch, shape.kv_heads)
    q = torch.randn(s.batch, s.heads, 1, s.d, dtype=dtype, device="cuda")
    k, v = (torch.randn(*kv, s.sk, s.d, dtype=dtype, device="cuda") for _ in range(2))
    kept = torch.rand(s.batch, s.sk, device="cuda") < s.kept if s.kept < 1 else None
    row = torch.arange(s.batch, device="cuda")
    lengths = torch.full_like(row, s.sk - 1) if not s.ends else s.sk - 1 - row * (s.sk // 5)
    starts = None if not s.ends else row * (s.sk // 5)
    is_blended = s.heads == s.kv_heads
    choices = (32, s.topk, min(32, s.topk), s.d**-0.5, is_blended)
    request = Request(q, k, v, k.mT.contiguous(), None, kept, *choices, starts, lengths, grown=0)
    mean = torch.stack([_mean(request, b) for b in range(s.batch)])
    return replace(request, v_mean=mean if kept is None else None, grown=1)


def _mean(request: Request, b: int) -> Tensor:
    """(Hkv, Dv) fp32: the mean of what row b counts, without a mask."""
    first = 0 if request.starts is None else int(request.starts[b])
    return request.v[b, :, first : int(lengths_of(request)[b])].mean(1, dtype=torch.float32)


def lengths_of(request: Request) -> Tensor:
    """The lengths that `request_of` gave."""
    return torch.tensor(0) if request.lengths is None else request.lengths


def token_of(request: Request) -> Token:
    """A random token for the buffers of a request."""
    return Token(torch.randn_like(request.k[:, :, :1]), torch.randn_like(request.v[:, :, :1]))


def versions(request: Request) -> dict[str, Tiles]:
    """The ways to make a step that are compared: logits written or bounds of them; launches apart, early, or joined."""
    apart = {"bounded": False, "early": False, "start_joined": False, "end_joined": False, "ticket": False}
    usual = choose_tiles(request)
    found = {"stored": replace(usual, weight_block=weight_block(power_of_two(request.group)), **apart)}
    joined = {"joined, early": replace(found["stored"], start_joined=True, end_joined=True, early=True)}
    if request.group > 1:
        joined["ticket, early"] = replace(usual, bounded=False, start_joined=True, ticket=True, early=True)
    if request.group > 1 and not request.mean_value:
        found["bounded"] = replace(found["stored"], bounded=True)
    return found | {f"{name}, early": replace(tiles, early=True) for name, tiles in found.items()} | joined


def check(shape: Shape, dtype: torch.dtype) -> Row:
    """The worst row error against fp64, in units of what is allowed, and the share of choices that fp64 makes too."""
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    request = request_of(shape, dtype)
    token = token_of(request)
    got = decode(request, token=token)
    in_step = _is_in_step(request, token)
    found = [_judged(request, choose_tiles(request), got)]
    for tiles in versions(request).values():
        other = decode(request, tiles)
        if not torch.equal(other, got):
            found.append(_judged(request, tiles, other))
    worst, agreed = max(row[0] for row in found), min(row[1] for row in found)
    limit = 2 * 2.0 ** -BITS[dtype]
    return {
        "shape": str(shape), "kept": shape.kept, "topk": shape.topk, "dtype": str(dtype).removeprefix("torch."),
        "worst_row": worst / limit, "same_choice": agreed, "in_step": in_step, "other_bits": len(found) - 1,
        "passed": worst <= limit and agreed > 0.99 and in_step,
    }  # fmt: skip


def _judged(request: Request, tiles: Tiles, got: Tensor) -> tuple[float, float]:
    """The largest relative row error of some groups, and the share of their choices that the definition makes too."""
    request = served(request, tiles)
    positions = _positions(request, tiles)
    request = request.masked()
    groups = request.k.shape[0] * request.k.shape[1]
    rows = [_judge(request, positions, got.double(), i) for i in range(0, groups, -(-groups // JUDGED))]
    return max(row[0] for row in rows), sum(row[1] for row in rows) / len(rows)


def _is_in_step(request: Request, token: Token) -> bool:
    """Whether the token stands in all buffers, and the mean is that of the values."""
    for b, at in enumerate(lengths_of(request).tolist()):
        rows = (request.k[b, :, at], request.keys_by_channel[b, :, :, at], request.v[b, :, at])
        news = (token.k[b, :, 0], token.k[b, :, 0], token.v[b, :, 0])
        if not all(torch.equal(row, new) for row, new in zip(rows, news, strict=True)):
            return False
        first = 0 if request.starts is None else int(request.starts[b])
        mean = request.v[b, :, first : at + 1].mean(1, dtype=torch.float32)
        if request.v_mean is not None and not torch.allclose(request.v_mean[b], mean, rtol=1e-4, atol=1e-5):
            return False
    return True


def _positions(request: Request, tiles: Tiles) -> Tensor:
    if request.is_exact:
        everything = torch.arange(request.k.shape[2])
        return everything.expand(request.k.shape[0] * request.k.shape[1], -1)
    _, weights = score_positions(request, choose_channels(request), tiles)
    return choose(request, weights, tiles).positions.cpu()


def _judge(request: Request, positions: Tensor, got: Tensor, group: int) -> tuple[float, float]:
    """Largest relative row error of one group by the definition with the kernel's positions, and how many it shares."""
    b, h = divmod(group, request.k.shape[1])
    heads = slice(h * request.group, (h + 1) * request.group)
    q, k, v = (x.double() for x in (request.q[b, heads, 0], request.k[b, h], request.v[b, h]))
    kept = k.new_ones(len(k), dtype=torch.bool) if request.kept is None else request.kept[b]
    literal = decide(
        q, k, kept, rank=request.rank, topk=request.topk, local=request.local, scale=request.scale
    )
    there = set(kept.nonzero().flatten().tolist())
    mine = [p for p in positions[group].tolist() if p in there]
    scores = torch.stack([approximate(row, k, literal.channels, kept, request.scale) for row in q])
    mean = v[kept].mean(0) if request.mean_value and len(mine) < int(kept.sum()) else None
    want = attend_to(q, k, v, Decision(literal.channels, mine, scores), request.scale, mean)
    error = (got[b, heads, 0] - want).norm(dim=-1) / want.norm(dim=-1)
    return float(error.max()), len(set(mine) & set(literal.positions)) / len(literal.positions)
