"""What is filled into, or added to, the scores: a mask, a bias, and what a row returns that sees no key."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import reject_of, site_of
from torch import Tensor

from attnopt.mask import FULL, Causal, KeyPadding, Opaque
from attnopt.spec import EmptyRow

Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()
KEEP = torch.tensor([[True] * 5 + [False] * 2, [False] * 7])  # the second sequence sees nothing
Change = Callable[[Tensor, Tensor], Tensor]


def attention(change: Change) -> Callable[..., Tensor]:
    return lambda q, k, v, keep: change(q @ k.transpose(-2, -1), keep).softmax(-1) @ v


def future() -> Tensor:
    return torch.ones(7, 7, dtype=torch.bool).triu(1)


def padded(scores: Tensor, keep: Tensor, fill: float) -> Tensor:
    return scores.masked_fill(~keep[:, None, None, :], fill)


@pytest.mark.parametrize(
    ("fill", "row"),
    [
        (-1e9, EmptyRow.UNIFORM),
        (torch.finfo(torch.float32).min, EmptyRow.UNIFORM),
        (-torch.inf, EmptyRow.NAN),
    ],
)
def test_the_fill_says_what_an_empty_row_returns(fill: float, row: EmptyRow) -> None:
    attend = attention(lambda s, keep: padded(s, keep, fill))
    spec = site_of(attend, Q, K, V, KEEP).spec
    assert (spec.empty_row, type(spec.mask)) == (row, KeyPadding)
    (site,) = check_like_eager(attend, (Q, K, V, KEEP)).attention
    assert site.verdict == "rewritten"


def test_a_mask_that_leaves_every_query_a_key_has_no_empty_row() -> None:
    spec = site_of(attention(lambda s, keep: s.masked_fill(future(), -1e9)), Q, K, V, KEEP).spec
    assert (spec.mask, spec.empty_row) == (Causal(), EmptyRow.NEVER)


def test_two_fill_values_that_would_meet_in_an_empty_row_are_refused() -> None:
    mixed = attention(lambda s, keep: padded(s.masked_fill(future(), -1e30), keep, -1e9))
    assert "mix several fill values" in reject_of(mixed, Q, K, V, KEEP).reason


def test_an_added_finite_number_under_a_padding_stays_a_bias() -> None:
    attend = attention(lambda s, keep: s + (1.0 - keep[:, None, None, :].float()) * -1e9)
    spec = site_of(attend, Q, K, V, KEEP).spec
    assert (spec.mask, spec.bias, spec.empty_row) == (FULL, ("bias",), EmptyRow.NEVER)
    (site,) = check_like_eager(attend, (Q, K, V, KEEP)).attention
    assert site.verdict == "rewritten"


def test_added_minus_infinity_is_a_mask() -> None:
    def attend(scores: Tensor, keep: Tensor) -> Tensor:
        return scores + torch.zeros(7, 7).masked_fill(future(), -torch.inf)

    spec = site_of(attention(attend), Q, K, V, KEEP).spec
    assert (spec.mask, spec.bias, spec.empty_row) == (Causal(), (), EmptyRow.NEVER)


def test_a_fill_that_still_weighs_is_refused() -> None:
    assert (
        "still weighs" in reject_of(attention(lambda s, keep: padded(s, keep, -100.0)), Q, K, V, KEEP).reason
    )


def test_two_masks_of_unknown_form_keep_names_of_their_own() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).masked_fill(one, -torch.inf)
        return scores.masked_fill(other, -torch.inf).softmax(-1) @ v

    one, other = torch.rand(2, 7, 7) < 0.2
    spec = site_of(attend, Q, K, V, one, other).spec
    assert len(spec.mask.operand_names()) == 2
    assert all(isinstance(part, Opaque) for part in spec.mask.parts)  # type: ignore[attr-defined]
    (site,) = check_like_eager(attend, (Q, K, V, one, other)).attention
    assert site.verdict == "rewritten"
