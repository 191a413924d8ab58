"""New tokens into the buffers of a cache: values, both key layouts and the running mean stay in step. Plain torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.errors import ShapeError
from attnopt.kernels.sparq.request import DTYPES, check_range


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """What a cache holds; positions from starts (0 when None) to lengths - 1 count.

    k (B, Hkv, S, D), v (B, Hkv, S, Dv), k_t (B, Hkv, D, S): one floating dtype. v_mean (B, Hkv, Dv): fp32 (fp64 beside
    fp64). starts, lengths (B,): int32 or int64.
    """

    k: Tensor
    v: Tensor
    k_t: Tensor | None
    v_mean: Tensor | None
    starts: Tensor | None
    lengths: Tensor


def check_append(buffers: Buffers, new_k: Tensor, new_v: Tensor) -> None:
    """Raises ShapeError unless the new keys (B, Hkv, T, D) and values (B, Hkv, T, Dv) fit the buffers."""
    k, v = buffers.k, buffers.v
    if k.ndim != 4 or v.ndim != 4 or k.dtype not in DTYPES:
        raise ShapeError(
            f"the cache holds k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)}; "
            "wanted (batch, heads, length, dim) in a floating dtype"
        )
    batch, kv_heads, sk, d = k.shape
    tokens = new_k.shape[2] if new_k.ndim == 4 else 1
    _check_like(k, v, "v", (batch, kv_heads, sk, v.shape[3]))
    _check_like(k, new_k, "new_k", (batch, kv_heads, tokens, d))
    _check_like(k, new_v, "new_v", (batch, kv_heads, tokens, v.shape[3]))
    if buffers.k_t is not None:
        _check_like(k, buffers.k_t, "k_t", (batch, kv_heads, d, sk))
    if buffers.v_mean is not None:
        wanted = k.new_empty(0, dtype=torch.float64 if k.dtype == torch.float64 else torch.float32)
        _check_like(wanted, buffers.v_mean, "v_mean", (batch, kv_heads, v.shape[3]))
    check_range(k, buffers.starts, buffers.lengths)


def append(buffers: Buffers, new_k: Tensor, new_v: Tensor) -> None:
    """Writes T tokens at `lengths`, which stay as they are, and takes those from `starts` on into the mean.

    Raises ShapeError on the CPU when the buffers are too short. On a GPU, where looking would make the host wait, that
    is a failed assertion of the device.
    """
    tokens, capacity = new_k.shape[2], buffers.k.shape[2]
    if buffers.k.device.type == "cpu" and buffers.lengths.numel():
        _check_room(int(buffers.lengths.max()), tokens, capacity)
    position = buffers.lengths[:, None] + torch.arange(tokens, device=new_k.device)
    row = torch.arange(len(position), device=new_k.device)[:, None]
    by_token = new_k.transpose(1, 2)
    buffers.k.transpose(1, 2)[row, position] = by_token
    buffers.v.transpose(1, 2)[row, position] = new_v.transpose(1, 2)
    if buffers.k_t is not None:
        buffers.k_t.permute(0, 3, 1, 2)[row, position] = by_token
    if buffers.v_mean is not None:
        _take_in(buffers.v_mean, new_v, position, buffers)


def _take_in(mean: Tensor, new_v: Tensor, position: Tensor, buffers: Buffers) -> None:
    starts = torch.zeros_like(buffers.lengths) if buffers.starts is None else buffers.starts
    counts = position >= starts[:, None]
    total = new_v.masked_fill(~counts[:, None, :, None], 0.0).sum(dim=2, dtype=mean.dtype)
    added = counts.sum(dim=1)
    number = ((buffers.lengths - starts).clamp_min(0) + added).clamp_min(1)
    mean += (total - added[:, None, None] * mean) / number[:, None, None]


def _check_room(longest: int, tokens: int, capacity: int) -> None:
    if longest + tokens > capacity:
        raise ShapeError(
            f"the cache has room for {capacity} positions, holds {longest} and was given {tokens} more; "
            "make it longer, or crop it"
        )


def _check_like(k: Tensor, x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}; wanted {shape} to fit the cache")
    if x.dtype != k.dtype or x.device != k.device:
        raise ShapeError(f"{name} is {x.dtype} on {x.device}; wanted {k.dtype} on {k.device}, as the cache")
