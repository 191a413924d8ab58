"""One call of SparQ attention: its operands, its choices, and what must hold between them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import OptionError, ShapeError, UnsupportedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Everything that one decoding step reads.

    q (B, H, 1, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), k_t (B, Hkv, D, Sk): one floating dtype.
    v_mean (B, Hkv, Dv): floating. kept (B, Sk): bool, True where the position counts.
    rank, topk, local: channels, positions in all, and last positions that are always among them.
    starts, lengths (B,): int32 or int64, on the device; positions from starts to lengths + grown - 1 count.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_t: Tensor | None
    v_mean: Tensor | None
    kept: Tensor | None
    rank: int
    topk: int
    local: int
    scale: float
    mean_value: bool
    starts: Tensor | None = None
    lengths: Tensor | None = None
    grown: int = 0

    @property
    def has_range(self) -> bool:
        """Whether a part of the buffers counts, told by its ends."""
        return self.starts is not None or self.lengths is not None

    def masked(self) -> "Request":
        """The same request with the range of positions that count as a part of the mask `kept`."""
        if not self.has_range:
            return self
        position = torch.arange(self.k.shape[2], device=self.k.device)
        inside = position.new_ones(self.k.shape[0], len(position), dtype=torch.bool)
        if self.starts is not None:
            inside = inside & (position >= self.starts[:, None])
        if self.lengths is not None:
            inside = inside & (position < self.lengths[:, None] + self.grown)
        kept = inside if self.kept is None else inside & self.kept
        return replace(self, kept=kept, starts=None, lengths=None, grown=0)

    @property
    def group(self) -> int:
        """G: query heads to one key/value head."""
        return self.q.shape[1] // max(1, self.k.shape[1])

    @property
    def channels(self) -> int:
        """How many channels of the query are read: the rank, at most D."""
        return min(self.rank, self.q.shape[-1])

    @property
    def is_exact(self) -> bool:
        """Whether every position is chosen, so that nothing is approximated."""
        return self.topk >= self.k.shape[2]

    @property
    def is_empty(self) -> bool:
        """Whether the output has no elements, or there is no key to attend to (the answer is then zero)."""
        return 0 in (*self.q.shape[:2], self.k.shape[2], self.v.shape[3])

    def output(self) -> Tensor:
        """An unwritten (B, H, 1, Dv) in q's dtype."""
        return self.q.new_empty(*self.q.shape[:3], self.v.shape[3])

    @property
    def keys_by_channel(self) -> Tensor:
        """(B, Hkv, D, Sk): the channel-major copy, or a transposed view of k where there is none."""
        return self.k.transpose(-1, -2) if self.k_t is None else self.k_t


def check(request: Request) -> None:
    """Raises ShapeError, OptionError or UnsupportedError, with what to do, unless the request can be served."""
    check_operands(request.q, request.k, request.v)
    _check_choices(request)
    _check_optional(request)


def check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ShapeError or UnsupportedError unless q, k, v fit together as one decoding step."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; wanted (batch, heads, length, dim)")
    if q.shape[2] != 1:
        raise UnsupportedError(
            f"SparQ decodes one query token at a time, q has {q.shape[2]}; "
            "prefill is dense: use scaled_dot_product_attention for it"
        )
    if q.dtype not in DTYPES:
        raise ShapeError(f"q is {q.dtype}; wanted one of {', '.join(map(str, DTYPES))}")
    if q.shape[3] == 0:
        raise ShapeError("q has no channels (D = 0); wanted D >= 1")
    _check_like(q, k, "k", (q.shape[0], k.shape[1], k.shape[2], q.shape[3]))
    _check_like(q, v, "v", (q.shape[0], k.shape[1], k.shape[2], v.shape[3]))
    _check_heads(q.shape[1], k.shape[1])


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads == kv_heads or (kv_heads != 0 and heads % kv_heads == 0):
        return
    raise ShapeError(f"{heads} query heads cannot share {kv_heads} key/value heads; wanted a multiple")


def _check_choices(request: Request) -> None:
    if request.rank < 1:
        raise OptionError(f"rank is {request.rank}; wanted at least 1 channel")
    if request.topk < 1:
        raise OptionError(f"topk is {request.topk}; wanted at least 1 position")
    if not 0 <= request.local <= request.topk:
        raise OptionError(
            f"local is {request.local}; wanted 0 to topk ({request.topk}): local positions count within topk"
        )


def _check_optional(request: Request) -> None:
    (batch, kv_heads, sk, d), dv = request.k.shape, request.v.shape[3]
    if request.k_t is not None:
        _check_like(request.q, request.k_t, "k_t", (batch, kv_heads, d, sk))
    if request.v_mean is not None:
        if not request.v_mean.is_floating_point():
            raise ShapeError(f"v_mean is {request.v_mean.dtype}; wanted a float dtype, best fp32")
        _check_placed(request.q, request.v_mean, "v_mean", (batch, kv_heads, dv))
    if request.kept is not None:
        if request.kept.dtype != torch.bool:
            raise ShapeError(
                f"key_padding is {request.kept.dtype}; wanted torch.bool, True where the key is kept"
            )
        _check_placed(request.q, request.kept, "key_padding", (batch, sk))
    check_range(request.q, request.starts, request.lengths)


def check_range(q: Tensor, starts: Tensor | None, lengths: Tensor | None) -> None:
    """Raises ShapeError unless the ends of the positions that count are one integer for each batch row."""
    for name, x in (("starts", starts), ("lengths", lengths)):
        if x is None:
            continue
        if x.dtype not in (torch.int32, torch.int64):
            raise ShapeError(f"{name} is {x.dtype}; wanted torch.int32 or torch.int64")
        _check_placed(q, x, name, (q.shape[0],))


def _check_like(q: Tensor, x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if x.dtype != q.dtype:
        raise ShapeError(f"{name} is {x.dtype} and q is {q.dtype}; cast them to one dtype")
    _check_placed(q, x, name, shape)


def _check_placed(q: Tensor, x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; wanted {shape} to fit q, k and v")
    if x.device != q.device:
        raise ShapeError(f"{name} is on {x.device} and q on {q.device}; move them to one device")
