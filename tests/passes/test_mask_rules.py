"""Laws of operations that make numbers and conditions: what is claimed of an element is what torch computes."""

import math

import pytest
import torch
from mask_trace import interpret

N, M = 4, 5


def rows():
    return torch.arange(N)[:, None]


def columns():
    return torch.arange(M)[None, :]


def distance():
    return rows() - columns()


KNOWN = {
    "arange": lambda x: torch.arange(N),
    "arange from": lambda x: torch.arange(-2, 3),
    "arange with a step": lambda x: torch.arange(7, -2, -3),
    "arange of floats": lambda x: torch.arange(3.0),
    "zeros": lambda x: torch.zeros(N),
    "ones of booleans": lambda x: torch.ones(N, dtype=torch.bool),
    "full": lambda x: torch.full((N, M), -math.inf),
    "likes": lambda x: torch.ones_like(x) + torch.zeros_like(x) + torch.full_like(x, 5),
    "news": lambda x: x.new_ones(N) + x.new_zeros(N) + x.new_full((N,), 3),
    "scalar tensor": lambda x: torch.scalar_tensor(2.5) + torch.zeros(N),
    "eye": lambda x: torch.eye(N, M),
    "tril": lambda x: (distance() + 9).tril(),
    "tril below": lambda x: torch.ones(2, N, M).tril(-2),
    "tril above": lambda x: torch.ones(N, M, dtype=torch.bool).tril(diagonal=2),
    "triu": lambda x: torch.full((N, M), -math.inf).triu(1),
    "eq": lambda x: rows() == columns(),
    "ne": lambda x: distance() != 1,
    "le": lambda x: columns() <= rows(),
    "lt a number": lambda x: distance() < 2,
    "lt a fraction": lambda x: distance() < 1.5,
    "ge a fraction": lambda x: distance() >= -1.5,
    "gt infinity": lambda x: distance() > -math.inf,
    "gt of floats": lambda x: rows().float() > columns().double(),
    "comparison of booleans": lambda x: (rows() > 1) == (columns() > 2),
    "comparison of a boolean and a number": lambda x: (rows() > columns()) == 1,
    "nan is nothing": lambda x: torch.full((N,), math.nan) != torch.full((N,), math.nan),
    "nan is no less": lambda x: torch.full((N,), math.nan) < torch.arange(N),
    "infinity times zero": lambda x: torch.where(torch.zeros(N) * -math.inf > 0, 1, 2),
    "and": lambda x: (rows() > 1) & (columns() < 3),
    "or": lambda x: (rows() > 1) | (columns() < 3),
    "xor": lambda x: (rows() >= columns()) ^ (rows() > columns() + 1),
    "not": lambda x: ~(rows() >= columns()),
    "logical on numbers": lambda x: torch.logical_and(distance(), rows()),
    "logical or": lambda x: torch.logical_or(rows() > 2, distance()),
    "logical xor": lambda x: torch.logical_xor(rows(), columns()),
    "logical not": lambda x: distance().logical_not(),
    "where": lambda x: torch.where(distance() >= 0, distance(), 7),
    "where of scalars": lambda x: torch.where(distance() >= 0, 0.0, -math.inf),
    "where of booleans": lambda x: torch.where(rows() > 1, columns() > 2, columns() < 2),
    "masked_fill": lambda x: torch.zeros(N, M).masked_fill(distance() < 0, -1e9),
    "masked_fill by a tensor": lambda x: torch.zeros(N, M).masked_fill(distance() < 0, torch.tensor(-3.0)),
    "sum of booleans": lambda x: (rows() > 1).add(columns() > 2),
    "product of booleans": lambda x: (rows() > 1).mul(columns() > 2),
    "boolean times number": lambda x: (distance() < 0) * -1e9,
    "alpha": lambda x: torch.add(rows(), columns(), alpha=3) + torch.sub(rows(), columns(), alpha=2),
    "rsub": lambda x: 1.0 - (distance() < 0).float(),
    "neg and abs": lambda x: (-distance()).abs(),
    "power": lambda x: distance() ** 2,
    "floor division": lambda x: distance() // 2,
    "floor division by mode": lambda x: torch.div(distance(), 3, rounding_mode="floor"),
    "remainder": lambda x: distance() % 3,
    "maximum": lambda x: torch.maximum(rows(), columns()) - torch.minimum(rows(), columns()),
    "clamp": lambda x: distance().clamp(-1, 2),
    "clamp to a tensor": lambda x: distance().clamp(min=torch.tensor(0)),
    "constants in double": lambda x: torch.full((N,), 0.5) * 0.25 / 2 + 1.5,
    "exponential of a constant": lambda x: torch.full((N, M), -math.inf).triu(1).exp(),
    "cumsum of ones": lambda x: torch.ones(N, M, dtype=torch.int64).cumsum(-1),
    "cumsum of booleans": lambda x: (columns().expand(N, M) >= 0).cumsum(0),
    "cumsum of rows": lambda x: rows().expand(N, M).cumsum(1),
    "diff": lambda x: torch.diff(torch.arange(N) * 3),
    "diff after what is prepended": lambda x: torch.diff(
        distance(), dim=-1, prepend=distance()[:, :1] - 1, append=rows() + 9
    ),
    "literal number": lambda x: torch.tensor(-2.5) + torch.zeros(N),
    "literal row": lambda x: torch.tensor([3, 5, 7, 9]),
    "literal of one value": lambda x: torch.tensor([[True, True], [True, True]]),
    "literal triangle": lambda x: torch.tensor([[True, False, False], [True, True, False]]),
    "literal strict triangle": lambda x: torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]]),
    "literal upper triangle": lambda x: torch.tensor([[0.0, -math.inf], [0.0, 0.0]])[None],
    "fill in place": lambda x: torch.empty(N).fill_(3.5),
    "zero in place": lambda x: torch.ones(N).zero_(),
    "copy in place": lambda x: torch.empty(N, M).copy_(columns()),
    "booleans in place": lambda x: (rows() > 1).logical_and_(rows() < 3),
    "operators in place": lambda x: torch.zeros(N, M).add_(columns()).mul_(2),
    "float16 constants": lambda x: torch.full((N, N), -65504.0, dtype=torch.float16).triu(1),
    "overflow to infinity": lambda x: torch.full((N,), -1e9).to(torch.float16),
    "least plus least": lambda x: torch.full((N,), torch.finfo(torch.float32).min) * 2,
    "unsigned bytes": lambda x: 1 - torch.ones(N, M, dtype=torch.uint8).tril(),
}


@pytest.mark.parametrize("name", KNOWN)
def test_elements_are_what_torch_computes(name):
    seen = interpret(KNOWN[name], torch.ones(3, dtype=torch.int64))
    assert torch.equal(seen.claimed, seen.actual)
    assert not seen.own


UNKNOWN = {
    "comparison of data": lambda x: x == 1,
    "comparison of rounded constants": lambda x: torch.full((N,), 0.1) == torch.full((N,), 0.1).double(),
    "positions in few bits": lambda x: torch.arange(600).to(torch.bfloat16)[::200] > 300,
    "bytes that wrap": lambda x: torch.zeros(N, dtype=torch.uint8) - 1 == 255,
    "bits of integers": lambda x: rows() & columns(),
    "division that truncates": lambda x: torch.div(distance(), 2, rounding_mode="trunc"),
    "division by a negative number": lambda x: distance() // -2,
    "cumsum of what varies": lambda x: columns().cumsum(1),
    "cumsum of data": lambda x: (x == 1).cumsum(0),
    "second difference": lambda x: torch.diff(torch.arange(N), n=2),
    "literal without form": lambda x: torch.tensor([1, 5, 2]) + 0,
    "literal with a hole": lambda x: torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 1]]) == 1,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_certain_is_data(name):
    seen = interpret(UNKNOWN[name], torch.tensor([0, 1, 2]))
    assert torch.equal(seen.claimed, seen.actual)
    assert seen.reads_data
