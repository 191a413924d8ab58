"""Random programs that compute masks: positions, triangles, comparisons, logic, views, in-place writes, and data."""

import math
from collections.abc import Callable
from random import Random

import torch
from mask_cases import Site
from torch import Tensor


def condition(rng: Random, s: Site, depth: int) -> Tensor:
    """A boolean tensor, broadcastable to (B, 1, Sq, Sk)."""
    makers = CONDITIONS if depth > 0 else SIMPLE_CONDITIONS
    return rng.choice(makers)(rng, s, depth - 1)


def number(rng: Random, s: Site, depth: int) -> Tensor:
    """An integer tensor, broadcastable to (Sq, Sk)."""
    return rng.choice(NUMBERS)(rng, s, depth - 1)


def _line(rng, s, depth):
    left, right = s.i * rng.choice([1, 1, 1, 2]), s.j + rng.randint(-3, 3)
    return rng.choice([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne])(left, right)


def _column(rng, s, depth):
    position = rng.choice([s.i, s.j])
    return rng.choice([torch.le, torch.gt, torch.ne])(position, rng.randint(-1, 6))


def _triangle(rng, s, depth):
    dtype = rng.choice([torch.bool, torch.int64, torch.float32])
    return rng.choice([torch.tril, torch.triu])(s.ones(dtype), rng.randint(-4, 4)) != 0


def _padding(rng, s, depth):
    return rng.choice([torch.eq, torch.ne, torch.ge])(s.given, rng.randint(0, 2))[:, None, None, :]


def _pairs(rng, s, depth):
    return s.pairs


def _numbers_compared(rng, s, depth):
    return rng.choice([torch.le, torch.lt, torch.eq])(number(rng, s, depth), number(rng, s, depth))


def _logic(rng, s, depth):
    both = rng.choice(
        [torch.logical_and, torch.logical_or, torch.logical_xor, torch.bitwise_and, torch.bitwise_or]
    )
    return both(condition(rng, s, depth), condition(rng, s, depth))


def _complement(rng, s, depth):
    return ~condition(rng, s, depth)


def _choice(rng, s, depth):
    return torch.where(condition(rng, s, depth), condition(rng, s, depth), condition(rng, s, depth))


def _through_floats(rng, s, depth):
    added = torch.zeros(s.sq, s.sk).masked_fill(condition(rng, s, depth), -math.inf)
    return added == rng.choice([0.0, -math.inf])


def _one_minus(rng, s, depth):
    return (1.0 - condition(rng, s, depth).float()) * -1e9 > -1


def _written(rng, s, depth):
    mask = s.ones().tril(rng.randint(-2, 2))
    rng.choice([lambda m: m[:, :2], lambda m: m[-1:], lambda m: m[1], lambda m: m[:, -1]])(mask).fill_(
        rng.choice([True, False])
    )
    return mask & condition(rng, s, depth)


def _chunks(rng, s, depth):
    size = rng.randint(2, 4)
    compare = rng.choice([torch.eq, torch.le, torch.lt, torch.ge, torch.ne])
    return compare((s.j + rng.randint(-2, 2)) // size, (s.i + rng.randint(0, 2)) // size)


def _segments(rng, s, depth):
    of_query = torch.nn.functional.pad(s.ids, (0, s.sq))[:, : s.sq]
    return rng.choice([torch.eq, torch.ne])(of_query[:, None, :, None], s.ids[:, None, None, :])


def _packed(rng, s, depth):
    number = (torch.diff(s.ids, prepend=s.ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    query = torch.arange(s.sq).clamp(max=s.sk - 1)
    same = number[:, None, query, None] == number[:, None, None, :]
    ordered = s.ids[:, None, None, :] - rng.randint(-2, 2) <= s.ids[:, None, query, None]
    return same & ordered


def _flipped(rng, s, depth):
    held = condition(rng, s, depth).expand(2, 1, s.sq, s.sk)
    return rng.choice([lambda m: m.flip(-1), lambda m: m.flip(2), lambda m: m.roll(1, -1)])(held)


def _cast(rng, s, depth):
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
    return condition(rng, s, depth).to(rng.choice(dtypes)).to(rng.choice(dtypes)).bool()


def _counted(rng, s, depth):
    ones = torch.ones(s.sk, dtype=rng.choice([torch.int64, torch.float32]))
    return (ones.cumsum(0) - rng.randint(0, 2))[None, :]


def _looked_up(rng, s, depth):
    return torch.arange(s.sk)[torch.arange(s.sk).flip(0)][None, :]


def _position(rng, s, depth):
    return rng.choice([s.i, s.j, s.i - s.j, s.j - s.i])


def _shifted(rng, s, depth):
    return number(rng, s, depth) + rng.randint(-3, 3)


def _absolute(rng, s, depth):
    return number(rng, s, depth).abs()


def _bounded(rng, s, depth):
    return number(rng, s, depth).clamp(*sorted((rng.randint(-2, 2), rng.randint(0, 4))))


def _divided(rng, s, depth):
    return rng.choice([lambda x: x // 3, lambda x: x % 2])(number(rng, s, depth))


def _chosen(rng, s, depth):
    return torch.where(_line(rng, s, 0), number(rng, s, depth), rng.randint(-2, 2))


def _joined(rng, s, depth):
    j = torch.arange(s.sk)
    return torch.cat([j[:2] * 0 - rng.randint(0, 2), j])[: s.sk][None, :]


Maker = Callable[[Random, Site, int], Tensor]
SIMPLE_CONDITIONS: list[Maker] = [_line, _line, _column, _triangle, _padding, _pairs, _chunks, _segments]
CONDITIONS: list[Maker] = [
    *SIMPLE_CONDITIONS,
    *(_numbers_compared, _numbers_compared, _logic, _logic, _logic, _complement, _choice, _through_floats),
    *(_one_minus, _written, _chunks, _segments, _packed, _flipped, _cast),
]
NUMBERS: list[Maker] = [
    _position,
    _position,
    _shifted,
    _absolute,
    _bounded,
    _divided,
    _chosen,
    _joined,
    _counted,
    _looked_up,
]
