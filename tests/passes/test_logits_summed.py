"""A mask that was added to a bias is told apart where each query surely sees a key, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

Q, K, V = (torch.randn(2, 4, 7, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
TABLE = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
KEPT = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
Summed = Callable[[Tensor, Tensor], Tensor]


def relative(table: Tensor) -> Tensor:
    """Float (1, H, Sq, Sk): T5's bias, by distance."""
    distance = torch.arange(7)[:, None] - torch.arange(7)
    return table[distance.clamp(0, 8)].permute(2, 0, 1)[None]


def lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def future(x: Tensor, number: float, diagonal: int = 1) -> Tensor:
    """Float (Sq, Sk): `number` behind the query, 0 elsewhere."""
    return torch.full((7, 7), number, dtype=x.dtype).triu(diagonal)


def by_zeros_and_ones(x: Tensor) -> Tensor:
    seen = (torch.arange(7)[None, None] <= torch.arange(7)[:, None]).to(x.dtype)
    return (1.0 - seen[:, None]) * lowest(x)


def attend(summed: Summed) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor, kept: Tensor) -> Tensor:
        scores = q @ k.mT
        scores += summed(relative(table), kept)
        return scores.softmax(-1) @ v

    return function


def spec_of(
    summed: Summed, *, differentiable: int = 0, dynamic: bool = False, dtype: torch.dtype = torch.float32
) -> str:
    inputs = (*(x.to(dtype) for x in (Q, K, V, TABLE)), KEPT)
    report = check_like_eager(attend(summed), inputs, differentiable=differentiable, dynamic=dynamic)
    (site,) = report.sites
    assert site.verdict == "rewritten", site.reason
    return site.spec


SPELLINGS: dict[str, Summed] = {
    "bias first": lambda b, _: b + by_zeros_and_ones(b),
    "mask first": lambda b, _: by_zeros_and_ones(b) + b,
    "-inf": lambda b, _: b + future(b, -torch.inf),
    "-1e9": lambda b, _: b + future(b, -1e9)[None, None],
    "chosen": lambda b, _: b + torch.where(torch.ones(7, 7).tril() > 0, 0.0, -1e10).to(b.dtype),
    "through a view": lambda b, _: (b + future(b, -torch.inf)).squeeze(0),
    "through a slice of all": lambda b, _: (b + future(b, -torch.inf))[:, :, -7:, :],
    "two masks": lambda b, _: b + future(b, -torch.inf) + future(b, -1e9),
}


@pytest.mark.parametrize(("differentiable", "dynamic"), [(0, False), (4, False), (0, True), (4, True)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_mask_is_proven(name: str, differentiable: int, dynamic: bool) -> None:
    spec = spec_of(SPELLINGS[name], differentiable=differentiable, dynamic=dynamic)
    assert spec == "softmax scale=1 causal bias"


def test_the_mask_is_proven_in_bfloat16() -> None:
    spec = spec_of(SPELLINGS["bias first"], differentiable=4, dtype=torch.bfloat16)
    assert spec == "softmax scale=1 causal bias"


def test_a_window_is_proven() -> None:
    spec = spec_of(lambda b, _: b + (future(b, -torch.inf) + future(b, -torch.inf).mT.triu(-6).tril(-3)))
    assert spec == "softmax scale=1 causal & window(3) bias"


def overwritten(b: Tensor, _: Tensor) -> Tensor:
    summed = b + future(b, -torch.inf)
    summed[..., 0, 3] = 0.0
    return summed


def mask_overwritten(b: Tensor, _: Tensor) -> Tensor:
    mask = future(b, -torch.inf)
    summed = b + mask
    mask.zero_()
    return summed + mask


NEAR_MISSES: dict[str, Summed] = {
    "a number that weighs": lambda b, _: b + future(b, -1e4),
    "a number that lifts": lambda b, _: b + future(b, 5.0),
    "a query that sees nothing": lambda b, _: b + future(b, -1e9, 0),
    "padding that may hide whole rows": lambda b, m: b + (~m)[:, None, None].to(b.dtype) * lowest(b) / 4,
    "padding and causality": lambda b, m: b + torch.zeros(2, 1, 7, 7).to(b).masked_fill(
        ~(m[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()), lowest(b) / 4
    ),
    "taken away": lambda b, _: b - future(b, 1e9),
    "added three times": lambda b, _: torch.add(b, future(b, -1e9), alpha=3),
    "halved afterwards": lambda b, _: (b + future(b, -1e9)) * 0.5,
    "turned round": lambda b, _: (b + future(b, -torch.inf)).mT,
    "flipped": lambda b, _: (b + future(b, -torch.inf)).flip(-1),
    "written to afterwards": overwritten,
    "made of the bias": lambda b, _: b + b.triu(1) * 0.5,
}  # fmt: skip


@pytest.mark.parametrize("differentiable", [0, 4])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_anything_else_stays_a_bias_or_is_right(name: str, differentiable: int) -> None:
    """`spec_of` compares with eager."""
    assert "causal" not in spec_of(NEAR_MISSES[name], differentiable=differentiable)


@pytest.mark.parametrize("differentiable", [0, 4])
def test_a_mask_that_is_written_to_after_it_was_added_counts_as_it_was(differentiable: int) -> None:
    inputs = (Q, K, V, TABLE, KEPT)
    check_like_eager(attend(mask_overwritten), inputs, differentiable=differentiable)


def test_a_sum_that_is_returned_stays_as_it_is() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        summed = relative(table) + future(table, -1e9)
        return (q @ k.mT + summed).softmax(-1) @ v, summed

    report = check_like_eager(function, (Q, K, V, TABLE), differentiable=4)
    assert [site.spec for site in report.having("rewritten")] == ["softmax scale=1 causal bias"]


def alibi(q: Tensor) -> Tensor:
    """Float (H, 1, Sk)."""
    slopes = torch.tensor([2.0 ** -(2 * h + 2) for h in range(4)]).to(q)
    return slopes[:, None, None] * torch.arange(7).to(q)


def raised(scores: Tensor) -> Tensor:
    return torch.max(scores, torch.tensor(lowest(scores), dtype=scores.dtype))


LINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in one tensor": lambda s, q: raised(s + (future(q, -torch.inf) + alibi(q))),
    "one after the other": lambda s, q: raised(s + alibi(q) + future(q, -torch.inf)),
    "clamped": lambda s, q: (s + alibi(q) + future(q, -torch.inf)).clamp(min=lowest(q)),
}


@pytest.mark.parametrize(("differentiable", "dynamic"), [(0, False), (3, False), (0, True)])
@pytest.mark.parametrize("name", LINES)
def test_a_lower_bound_is_not_noticed_beside_a_line_where_each_query_sees_a_key(
    name: str, differentiable: int, dynamic: bool
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return LINES[name](q @ k.mT * 0.25, q).softmax(-1) @ v

    report = check_like_eager(function, (Q, K, V), differentiable=differentiable, dynamic=dynamic)
    assert [site.spec for site in report.having("rewritten")] == ["softmax scale=0.25 causal alibi"]


UNSURE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a query that sees nothing": lambda s, q, _: raised(s + alibi(q) + future(q, -torch.inf, 0)),
    "padding": lambda s, q, m: raised(s + alibi(q) + torch.zeros_like(s).masked_fill(~m[:, None, None], -torch.inf)),
    "a bound that weighs": lambda s, q, _: (s + alibi(q) + future(q, -torch.inf)).clamp(min=-1e4),
    "a bias of data": lambda s, q, _: raised(s + q[..., :7] + future(q, -torch.inf)),
}  # fmt: skip


@pytest.mark.parametrize("differentiable", [0, 3])
@pytest.mark.parametrize("name", UNSURE)
def test_a_lower_bound_that_rows_may_notice_is_refused(name: str, differentiable: int) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return UNSURE[name](q @ k.mT * 0.25, q, kept).softmax(-1) @ v

    nothing = torch.tensor([[False] * 7, [True] * 7])
    report = check_like_eager(function, (Q, K, V, nothing), differentiable=differentiable)
    assert not report.having("rewritten")
