"""Padded batches and static caches are streamed row by row, as each row alone; what is almost that is refused."""

from collections.abc import Callable

import pytest
import torch
from oracle import assert_same
from rope_cases import STREAMING, N, paper, tensors, turned_in_rows
from rope_spellings import halves
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attnopt
from attnopt.report import Report

#: Padding on the left of one row, and on the right of the other.
KEEP = torch.ones(2, N, dtype=torch.bool)
KEEP[0, :8], KEEP[1, 21:] = False, False
#: Makes positions of a padding mask.
Count = Callable[[Tensor], Tensor]
#: Makes a mask (B, 1, N, N) of one.
Hide = Callable[[Tensor], Tensor]


def lower(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def padded(keep: Tensor) -> Tensor:
    return lower(keep.shape[1]) & keep[:, None, None]


class Padded(nn.Module):
    """Causal attention over a padded batch, turned at positions that are counted somehow."""

    def __init__(
        self, count: Count, hide: Hide = padded, turn: Callable[[Tensor, Tensor], Tensor] = turned_in_rows
    ) -> None:
        super().__init__()
        self.count, self.hide, self.turn = count, hide, turn

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        t = self.count(keep)
        q, k = self.turn(q, t), self.turn(k, t)
        return scaled_dot_product_attention(q, k, v, attn_mask=self.hide(keep), scale=0.4)


def slots(keep: Tensor) -> Tensor:
    return torch.arange(keep.shape[1])[None]


def late_slots(keep: Tensor) -> Tensor:
    return (torch.arange(keep.shape[1]) + 7).unsqueeze(0)


def running(keep: Tensor) -> Tensor:
    return keep.long().cumsum(-1)


def from_zero(keep: Tensor) -> Tensor:
    return keep.long().cumsum(-1) - 1


def mended(keep: Tensor) -> Tensor:
    return (keep.long().cumsum(-1) - 1).masked_fill(~keep, 1)


def clamped(keep: Tensor) -> Tensor:
    return (keep.cumsum(-1) - 1).clamp(min=0)


def rewritten(module: nn.Module, *inputs: Tensor) -> tuple[nn.Module, Report]:
    program, report = attnopt.rewrite(torch.export.export(module, inputs), STREAMING)
    return program.module(), report


@pytest.mark.parametrize("count", [slots, late_slots, running, from_zero, mended, clamped])
def test_each_row_is_the_row_alone(count: Count) -> None:
    q, k, v = tensors()
    run, report = rewritten(Padded(count), q, k, v, KEEP)
    (site,) = report.sites
    assert (site.verdict, site.kernel, site.exact) == ("rewritten", "streaming", False)
    assert "causal & padding" in site.spec
    assert "of kept keys, 3 first and 6 last" in site.spec
    got = run(q, k, v, KEEP)
    for row, keep in enumerate(KEEP):
        assert_same(
            got[row : row + 1, :, keep], paper(halves, *(x[row : row + 1, :, keep] for x in (q, k, v)))
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_gradients_are_those_of_each_row_alone(*, dynamic: bool) -> None:
    torch._dynamo.reset()
    run = torch.compile(
        Padded(from_zero), backend="attnopt", options={**STREAMING, "inner": "aot_eager", "strict": True},
        dynamic=dynamic,
    )  # fmt: skip
    together, alone = ([x.requires_grad_() for x in tensors()] for _ in range(2))
    (run(*together, KEEP).sin() * KEEP[:, None, :, None]).sum().backward()
    for row, keep in enumerate(KEEP):
        paper(halves, *(x[row : row + 1, :, keep] for x in alone)).sin().sum().backward()
    assert not attnopt.reports()[-1].sites[0].exact
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


class ByHand(nn.Module):
    """What is padding is said, and hidden by a fill."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lost: Tensor) -> Tensor:
        t = (~lost).cumsum(-1)
        scores = turned_in_rows(q, t) @ turned_in_rows(k, t).mT * 0.4
        scores = scores.masked_fill(~lower(q.shape[2]), -torch.inf).masked_fill(
            lost[:, None, None], -torch.inf
        )
        return scores.softmax(-1) @ v


def test_padding_may_be_said_the_other_way_round() -> None:
    q, k, v = tensors()
    run, report = rewritten(ByHand(), q, k, v, ~KEEP)
    assert not report.sites[0].exact
    assert (
        1e-3 < (report.sites[0].approximation_error or 0.0) < 1
    )  # of the tokens: the graph's padding is NaN
    got = run(q, k, v, ~KEEP)
    for row, keep in enumerate(KEEP):
        alone = paper(halves, *(x[row : row + 1, :, keep] for x in (q, k, v)))
        assert_same(got[row : row + 1, :, keep], alone)


class Shared(nn.Module):
    """One padding for all sequences, and one list of positions."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        t = torch.arange(q.shape[2])
        mask = lower(q.shape[2]) & keep
        return scaled_dot_product_attention(halves(q, t), halves(k, t), v, attn_mask=mask, scale=0.4)


def test_one_padding_for_all_needs_one_list_of_positions() -> None:
    q, k, v = tensors()
    run, report = rewritten(Shared(), q, k, v, KEEP[0])
    assert not report.sites[0].exact
    got = run(q, k, v, KEEP[0])[:, :, KEEP[0]]
    assert_same(got, paper(halves, *(x[:, :, KEEP[0]] for x in (q, k, v))))


class Handed(Padded):
    """Positions come in from outside."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        self.count = lambda _: t
        return super().forward(q, k, v, keep)


def test_positions_that_are_an_input_are_taken_to_count_what_is_kept() -> None:
    q, k, v = tensors()
    run, report = rewritten(Handed(slots), q, k, v, KEEP, clamped(KEEP))
    assert report.sites[0].reason == "its positions (t) are an input, and taken to count up by one"
    got = run(q, k, v, KEEP, clamped(KEEP))
    assert_same(got[:1, :, 8:], paper(halves, *(x[:1, :, 8:] for x in (q, k, v))))


def in_one_row(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, t[0])


def of_other_rows(x: Tensor, t: Tensor) -> Tensor:
    return turned_in_rows(x, t.flip(0))


def of_both_rows(x: Tensor, t: Tensor) -> Tensor:
    return turned_in_rows(x, (t + t.flip(0)) * 0.5)


def per_head(keep: Tensor) -> Tensor:
    return padded(keep) & (torch.arange(2)[:, None, None] < keep.sum())


def by_pairs(keep: Tensor) -> Tensor:
    return lower(keep.shape[1]) & (keep[:, None, None] | ~keep[:, None, :, None])


def far_apart(keep: Tensor) -> Tensor:
    return padded(keep) & ~lower(keep.shape[1]).tril(-9)


def by_twos(keep: Tensor) -> Tensor:
    return torch.arange(0, 2 * keep.shape[1], 2)[None]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Padded(slots, turn=in_one_row), "cannot be moved for each of them by itself"),
        (Padded(from_zero, turn=of_other_rows), "cannot be moved for each of them by itself"),
        (Padded(from_zero, turn=of_both_rows), "cannot be moved for each of them by itself"),
        (Padded(from_zero, per_head), "a tensor of unknown form hides some of its keys"),
        (Padded(from_zero, by_pairs), "its mask is not plainly causal"),
        (Padded(from_zero, far_apart), "it has a window already"),
        (Padded(by_twos), "do not count up by one"),
    ],
    ids=lambda x: None if isinstance(x, str) else "",
)
def test_what_is_almost_a_padded_batch_is_refused(module: nn.Module, reason: str) -> None:
    run, report = rewritten(module, *tensors(), KEEP)
    (site,) = report.sites
    assert site.exact
    assert reason in site.reason
    assert_same(run(*tensors(), KEEP), module(*tensors(), KEEP))
