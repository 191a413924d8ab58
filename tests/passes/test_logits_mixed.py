"""Several finite numbers that hide keys: where all keys that one leaves are hidden by another, eager mixes the two."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from mutant_trials import Setting, judged
from torch import Tensor

from attnopt.backend import reports

B, H, S, D = 3, 4, 7, 8
LOWEST = torch.finfo(torch.float32).min
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs() -> tuple[Tensor, ...]:
    """Queries, keys and values in fp64, and padding that hides the first keys of one row of the batch, and another."""
    torch.manual_seed(0)
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[0, :3], keep[1] = False, False
    return (*torch.randn(3, B, H, S, D, dtype=torch.float64).unbind(), keep)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def later() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def padding(keep: Tensor, number: float) -> Tensor:
    return torch.where(keep[:, None, None], 0.0, number)


def turned(x: Tensor) -> Tensor:
    """Other heads, so that a mask of the batch alone has no place among the roles of a kernel."""
    return x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)


def added(number: float) -> list[tuple[Attend, str]]:
    """Attention with two masks that are added, and what is to be seen of it: its spec, or the reason why it stays."""

    def added_twice(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = scores_of(q, k) + torch.where(later(), number, 0.0)
        return (scores + padding(keep, number)).softmax(-1) @ v

    def added_before_and_after_heads_are_turned(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = turned(scores_of(q, k) + torch.where(later(), number, 0.0))
        return (scores + padding(keep, number)).softmax(-1) @ v

    def added_to_another_sequence(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = scores_of(q, k) + torch.where(later(), number, 0.0)
        return (scores + padding(keep, number).roll([1], [0])).softmax(-1) @ v

    def added_in_an_order(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = scores_of(q, k) + torch.where(later(), number, 0.0)
        return (scores + padding(keep, number)[keep.sum(1).argsort()]).softmax(-1) @ v

    return [
        (added_twice, "full bias x2"),
        (added_before_and_after_heads_are_turned, "full bias x2"),
        (added_to_another_sequence, "full bias x2"),
        (added_in_an_order, "full bias x2"),
    ]


def filled(number: float) -> list[tuple[Attend, str]]:
    """The same with one of the masks filled in."""

    def filled_then_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (scores_of(q, k).masked_fill(later(), number) + padding(keep, number)).softmax(-1) @ v

    def added_then_filled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (scores_of(q, k) + padding(keep, number)).masked_fill(later(), number).softmax(-1) @ v

    def filled_then_added_to_turned_heads(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = turned(scores_of(q, k).masked_fill(later(), number))
        return (scores + padding(keep, number)).softmax(-1) @ v

    def infinity_filled_then_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (scores_of(q, k).masked_fill(later(), -torch.inf) + padding(keep, number)).softmax(-1) @ v

    def infinity_filled_then_added_to_turned_heads(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = turned(scores_of(q, k).masked_fill(later(), -torch.inf))
        return (scores + padding(keep, number)).softmax(-1) @ v

    return [
        (filled_then_added, "mix several fill values"),
        (added_then_filled, "mix several fill values"),
        (filled_then_added_to_turned_heads, "mix several fill values"),
        (infinity_filled_then_added, "causal bias"),
        (infinity_filled_then_added_to_turned_heads, "causal bias"),
    ]


CASES = [
    pytest.param(attend, seen, id=f"{attend.__name__} {number:.0e}")
    for number in (LOWEST, -1e9)
    for attend, seen in (*added(number), *filled(number))
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("attend", "seen"), CASES)
def test_what_eager_mixes_is_mixed_or_left_alone(attend: Attend, seen: str, training: bool) -> None:
    found = judged(attend, inputs(), Setting(training=training, kernels=("streaming",)))
    assert (found.wrong, found.unsettled) == ("", "")
    (site,) = reports()[-1].sites
    assert seen in f"{site.spec} {site.reason}" or (training and "other gradients" in site.reason)


def test_a_number_that_is_a_symbol_hides_keys_too() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = scores_of(q, k) + torch.where(
            later(), LOWEST, 0.0
        )  # a global: Dynamo hands it over as a float
        return (scores + torch.where(keep[:, None, None], 0.0, LOWEST).roll([1], [0])).softmax(-1) @ v

    (site,) = check_like_eager(attend, inputs(), dynamic=True).attention
    assert "causal" not in f"{site.spec}"


@pytest.mark.parametrize("raised", [LOWEST, -1e30])
def test_numbers_that_cancel_are_left_alone(raised: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = scores_of(q, k) - torch.where(later(), raised, 0.0)
        return (scores + padding(keep, LOWEST)).softmax(-1) @ v

    found = judged(attend, inputs(), Setting())
    assert (found.wrong, found.unsettled) == ("", "")
    assert "get lost between them" in reports()[-1].sites[0].reason


def test_numbers_that_raise_keys_alone_are_a_bias() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (scores_of(q, k) - padding(keep, LOWEST)).softmax(-1) @ v

    found = judged(attend, inputs(), Setting())
    assert (found.wrong, found.unsettled, found.verdicts) == ("", "", ("softmax rewritten",))


@pytest.mark.parametrize(
    ("number", "verdict"), [(LOWEST, "rewritten"), (torch.finfo(torch.float64).min, "refused")]
)
def test_a_fill_that_a_far_lower_number_absorbs_hides_nothing_twice(number: float, verdict: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        hidden = later() | ~keep[:, None, None]
        outer = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, number)
        return (scores_of(q, k).masked_fill(later(), LOWEST) + outer).softmax(-1) @ v

    found = judged(attend, inputs(), Setting())
    assert (found.wrong, found.unsettled, found.verdicts) == ("", "", (f"softmax {verdict}",))
