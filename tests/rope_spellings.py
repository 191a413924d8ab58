"""Rotary positions as people write them, and almost: each turns x (B, H, N, D) at positions t (N,) or (1, N)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Turn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spelling:
    """turn: the rotation. style, width, start, scaling: what there is to read."""

    name: str
    turn: Turn
    style: str = "halves"
    width: int = 8
    start: int = 0
    scaling: float | None = 1.0


def rates(x: Tensor, base: float = 50.0) -> Tensor:
    """Frequencies of 8 features."""
    return 1.0 / base ** (torch.arange(0, 8, 2, dtype=x.dtype) / 8)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def rotate_every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)


def doubled(x: Tensor, t: Tensor, *, gain: float = 1.0, base: float = 50.0) -> tuple[Tensor, Tensor]:
    angle = torch.outer(t.to(x.dtype), rates(x, base))
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos() * gain, angle.sin() * gain


def halves(x: Tensor, t: Tensor) -> Tensor:
    cos, sin = doubled(x, t)
    return x * cos + rotate_half(x) * sin


def halves_apart(x: Tensor, t: Tensor) -> Tensor:
    angle = t.to(x.dtype)[:, None] * rates(x)
    a, b = x[..., :4], x[..., 4:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def scaled(x: Tensor, t: Tensor) -> Tensor:
    cos, sin = doubled(x, t, gain=1.3)
    return x * cos + rotate_half(x) * sin


def by_einsum(x: Tensor, t: Tensor) -> Tensor:
    angle = torch.einsum("i,j->ij", t.to(x.dtype), rates(x)).repeat(1, 2)
    return (x * angle.cos()) + (rotate_half(x) * angle.sin())


def by_matmul(x: Tensor, t: Tensor) -> Tensor:
    angle = (rates(x)[None, :, None] @ t.to(x.dtype)[None, None, :]).transpose(1, 2)
    cos, sin = (f.unsqueeze(1) for f in (angle.repeat(1, 1, 2).cos(), angle.repeat(1, 1, 2).sin()))
    return x * cos + rotate_half(x) * sin


def in_single_precision(x: Tensor, t: Tensor) -> Tensor:
    cos, sin = doubled(x.float(), t)
    return (x.float() * cos + rotate_half(x.float()) * sin).to(x.dtype)


def every_two(x: Tensor, t: Tensor) -> Tensor:
    angle = torch.outer(t.to(x.dtype), rates(x)).repeat_interleave(2, dim=-1)
    return x * angle.cos() + rotate_every_two(x) * angle.sin()


def pairs_stacked(x: Tensor, t: Tensor) -> Tensor:
    angle = torch.outer(t.to(x.dtype), rates(x))
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


def complex_polar(x: Tensor, t: Tensor) -> Tensor:
    angle = torch.outer(t.to(x.dtype), rates(x))
    turn = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(3)


def complex_exp(x: Tensor, t: Tensor) -> Tensor:
    turn = torch.exp(1j * torch.outer(t.to(x.dtype), rates(x)))
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def first_features(x: Tensor, t: Tensor) -> Tensor:
    angle = torch.outer(t.to(x.dtype), rates(x)[:2])
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    turning, rest = x[..., :4], x[..., 4:]
    return torch.cat((turning * cos + rotate_half(turning) * sin, rest), dim=-1)


def last_features(x: Tensor, t: Tensor) -> Tensor:
    angle = torch.outer(t.to(x.dtype), rates(x)[:2])
    rest, turning = x.split([4, 4], dim=-1)
    turned = torch.view_as_real(
        torch.view_as_complex(turning.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(angle), angle)
    )
    return torch.cat((rest, turned.flatten(-2)), dim=-1)


def swapped(x: Tensor, t: Tensor) -> Tensor:
    """Cosine for sine: a rotation the other way round, and by a right angle."""
    cos, sin = doubled(x, t)
    return x * sin + rotate_half(x) * cos


def backwards(x: Tensor, t: Tensor) -> Tensor:
    cos, sin = doubled(x, t)
    return x * cos - rotate_half(x) * sin


def stretched(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, 2 * t)


def other_base(x: Tensor, t: Tensor) -> Tensor:
    cos, sin = doubled(x, t, base=77.0)
    return x * cos + rotate_half(x) * sin


def clamped(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, t.clamp(max=20))


def rounded(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, (t * 0.5).long())


def in_bfloat16(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, t.to(torch.bfloat16))


def growing(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, t) * (t.to(x.dtype)[:, None] + 2).log()


def reversed_order(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, t.flip(0))


def by_length(x: Tensor, t: Tensor) -> Tensor:
    """Dynamic NTK: the frequencies depend on the largest position."""
    angle = torch.outer(t.to(x.dtype), rates(x) / (t.max() + 1))
    angle = torch.cat((angle, angle), dim=-1)
    return x * angle.cos() + rotate_half(x) * angle.sin()


def learned(x: Tensor, t: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 400 * 8, dtype=x.dtype).view(400, 8)
    return x + table[t]


def unturned(x: Tensor, t: Tensor) -> Tensor:
    del t
    return x


SPELLINGS = (
    Spelling("halves", halves),
    Spelling("halves apart", halves_apart),
    Spelling("scaled", scaled, scaling=1.3),
    Spelling("by einsum", by_einsum),
    Spelling("by matmul", by_matmul),
    Spelling("every two", every_two, "neighbours"),
    Spelling("pairs stacked", pairs_stacked, "neighbours"),
    Spelling("complex polar", complex_polar, "neighbours"),
    Spelling("complex exp", complex_exp, "neighbours"),
    Spelling("first features", first_features, width=4),
    Spelling("last features", last_features, "neighbours", width=4, start=4),
    Spelling("swapped in both", swapped),
    Spelling("backwards in both", backwards),
    Spelling("stretched in both", stretched),
)

#: How queries and keys are turned, and what the refusal says.
NEAR_MISSES: tuple[tuple[Turn, Turn, str], ...] = (
    (swapped, halves, "depend on more than the distance"),
    (halves, backwards, "depend on more than the distance"),
    (halves, stretched, "depend on more than the distance"),
    (halves, other_base, "depend on more than the distance"),
    (every_two, halves, "depend on more than the distance"),
    (halves, first_features, "depend on more than the distance"),
    (growing, growing, "depend on more than the distance"),
    (halves, unturned, "positions enter the queries and not the keys"),
    (unturned, halves, "positions enter the keys and not the queries"),
    (clamped, clamped, "positions may enter"),
    (rounded, rounded, "positions may enter"),
    (by_length, by_length, "positions may enter"),
    (in_bfloat16, in_bfloat16, "positions are held in torch.bfloat16"),
    (reversed_order, reversed_order, "turns query"),
    (learned, learned, "depend on more than the distance|positions may enter"),
)
