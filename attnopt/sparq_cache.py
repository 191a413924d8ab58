"""A key/value cache for SparQ: both key layouts and the running mean of the values, kept in step."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attnopt.errors import OptionError, ShapeError
from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.op_step import sparq_append, sparq_step

KeyLayouts = Literal["both", "one"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of a cache: `batch` rows of `kv_heads` heads with room for `capacity` positions, and what it keeps.

    keys: "both" keeps the keys by rows and by channels, which takes half as much memory again as a plain cache (for
        Dv = D), and reads rank * length + topk * (D + Dv) elements a step for each key/value head. "one" keeps them by
        rows alone and takes the memory of a plain cache, but nearly all keys are read in each step, since the chosen
        channels lie in every row: of the traffic of dense attention at most half is saved.
    """

    batch: int
    kv_heads: int
    capacity: int
    d: int
    dv: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    keys: KeyLayouts = "both"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a cache. plain: keys and values; by_channel: the keys once more; rest: mean values and lengths."""

    plain: int
    by_channel: int
    rest: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.plain + self.by_channel + self.rest

    def __add__(self, other: "Memory") -> "Memory":
        """Of two caches together."""
        return Memory(self.plain + other.plain, self.by_channel + other.by_channel, self.rest + other.rest)

    def __str__(self) -> str:
        more = self.total / self.plain - 1 if self.plain else 0.0
        return f"{self.total / 1e6:,.1f} MB, {more:+.1%} beside a plain cache"


#: Buffers are a multiple of this long: rows of keys by channel then begin where a GPU can load 16 bytes at once.
ALIGNED = 16


class SparqCache:
    """The cache of one attention layer for decoding with SparQ (arXiv 2312.04985), in buffers that never move.

    cache = SparqCache(Plan(batch=1, kv_heads=8, capacity=4096, d=128, dv=128))
    cache.append(k, v)                # the prompt: (B, Hkv, T, D) and (B, Hkv, T, Dv)
    out = cache.step(q, k, v)         # one token: appends, then attends; (B, H, 1, Dv)

    All work is done in place, without asking the device for a value: steps compile and can be captured in CUDA graphs.
    `capacity` is that of the plan, rounded up. Positions from `starts` to `lengths` - 1 count in each batch row. The
    running mean differs from the mean of the same values by the rounding of fp32; `crop` takes it anew.
    """

    def __init__(self, plan: Plan) -> None:
        """Allocates and empties the buffers. Raises OptionError for sizes below one or an unknown layout."""
        _check_plan(plan)
        self.plan = plan
        self.capacity = self.rounded(plan.capacity)
        mean_dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
        self.k = _zeros(plan, (plan.kv_heads, self.capacity, plan.d), plan.dtype)
        self.v = _zeros(plan, (plan.kv_heads, self.capacity, plan.dv), plan.dtype)
        has_channels = plan.keys == "both"
        self.k_t = _zeros(plan, (plan.kv_heads, plan.d, self.capacity), plan.dtype) if has_channels else None
        self.v_mean = _zeros(plan, (plan.kv_heads, plan.dv), mean_dtype)
        self.starts = _zeros(plan, (), torch.int32)
        self.lengths = _zeros(plan, (), torch.int32)

    @staticmethod
    def rounded(capacity: int) -> int:
        """The capacity that a cache has whose plan asks for this one."""
        return -(-capacity // ALIGNED) * ALIGNED

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in self._buffers())

    def memory(self) -> "Memory":
        """What the buffers take, beside what a plain cache of the same capacity takes."""
        by_channel = 0 if self.k_t is None else self.k_t.nbytes
        plain = self.k.nbytes + self.v.nbytes
        return Memory(plain, by_channel, self.nbytes - plain - by_channel)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds T tokens, k (B, Hkv, T, D) and v (B, Hkv, T, Dv), behind those that each row holds.

        Raises ShapeError when they do not fit; on a GPU the device asserts when there is no room.
        """
        sparq_append(
            k, v, self.k, self.v,
            lengths=self.lengths, k_t=self.k_t, v_mean=self.v_mean, starts=self.starts,
        )  # fmt: skip
        self.lengths.add_(k.shape[2])

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rank: int = 32,
        topk: int = 128,
        local: int = 32,
        scale: float | None = None,
        mean_value: bool | None = None,
    ) -> Tensor:
        """(B, H, 1, Dv): adds one token and attends to all with its query q (B, H, 1, D), as `ops.sparq_step`."""
        out = sparq_step(
            q, k, v, self.k, self.v,
            lengths=self.lengths, k_t=self.k_t, v_mean=self.v_mean, starts=self.starts,
            rank=rank, topk=topk, local=local, scale=scale, mean_value=mean_value,
        )  # fmt: skip
        self.lengths.add_(1)
        return out

    def attend(
        self,
        q: Tensor,
        *,
        rank: int = 32,
        topk: int = 128,
        local: int = 32,
        scale: float | None = None,
        mean_value: bool | None = None,
    ) -> Tensor:
        """(B, H, 1, Dv): attends to what it holds with q (B, H, 1, D), as `ops.sparq_attention`."""
        return sparq_attention(
            q, self.k, self.v, rank=rank, topk=topk, local=local, k_t=self.k_t, v_mean=self.v_mean,
            scale=scale, mean_value=mean_value, starts=self.starts, lengths=self.lengths,
        )  # fmt: skip

    def reset(self, starts: Tensor | None = None) -> None:
        """Forgets all tokens. `starts` (B,) says how many of the next ones are left padding, which never counts."""
        self.lengths.zero_()
        self.v_mean.zero_()
        if starts is None:
            self.starts.zero_()
        else:
            self.starts.copy_(starts)

    def crop(self, lengths: Tensor | int) -> None:
        """Keeps at most the first `lengths` positions, (B,) or one number for all rows; reads all of v for its mean.

        A prompt that is padded on the right is cropped to its own lengths after `append`. A negative length is 0.
        """
        wanted = torch.as_tensor(lengths, dtype=self.lengths.dtype, device=self.lengths.device)
        self.lengths.copy_(torch.minimum(self.lengths, wanted).clamp_min(0))
        self.v_mean.copy_(self._mean())

    def reorder(self, rows: Tensor) -> None:
        """Batch row i becomes what row `rows[i]` was: rows (B,) integer, with repetitions (beam search)."""
        if rows.shape != (self.plan.batch,):
            raise ShapeError(
                f"rows has shape {tuple(rows.shape)}; wanted ({self.plan.batch},); `select` changes the batch size"
            )
        for buffer in self._buffers():
            buffer.copy_(buffer.index_select(0, rows.to(buffer.device)))

    def select(self, rows: Tensor) -> "SparqCache":
        """A new cache whose batch row i is a copy of row `rows[i]`: rows (N,) integer, of any length from one."""
        other = SparqCache(replace(self.plan, batch=len(rows)))
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            theirs.copy_(mine.index_select(0, rows.to(mine.device)))
        return other

    def stored(self) -> list[Tensor]:
        """The buffers of keys, values and their mean."""
        return [x for x in (self.k, self.v, self.k_t, self.v_mean) if x is not None]

    def _buffers(self) -> list[Tensor]:
        return [*self.stored(), self.starts, self.lengths]

    def _mean(self) -> Tensor:
        position = torch.arange(self.capacity, device=self.v.device)
        counts = (position >= self.starts[:, None]) & (position < self.lengths[:, None])
        total = self.v.masked_fill(~counts[:, None, :, None], 0.0).sum(dim=2, dtype=self.v_mean.dtype)
        return total / counts.sum(dim=1).clamp_min(1)[:, None, None]


def check_choices(capacity: int, rank: int, topk: int, local: int, keys: str) -> None:
    """Raises OptionError unless a cache can have these sizes and be read so."""
    least = {"capacity": (capacity, 1), "rank": (rank, 1), "topk": (topk, 1), "local": (local, 0)}
    for name, (value, wanted) in least.items():
        if value < wanted:
            raise OptionError(f"{name} is {value}; wanted at least {wanted}")
    if local > topk:
        raise OptionError(
            f"local is {local}; wanted at most topk, which is {topk}: local positions are part of it"
        )
    _check_keys(keys)


def _zeros(plan: Plan, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.zeros(plan.batch, *sizes, dtype=dtype, device=plan.device)


def _check_plan(plan: Plan) -> None:
    for name in ("batch", "kv_heads", "capacity", "d", "dv"):
        if getattr(plan, name) < 1:
            raise OptionError(f"{name} is {getattr(plan, name)}; wanted at least 1")
    _check_keys(plan.keys)


def _check_keys(keys: str) -> None:
    if keys not in ("both", "one"):
        raise OptionError(f"keys is {keys!r}; wanted 'both' (layouts) or 'one'")
