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


def test_a_fill_that_still_weighs_is_a_number_where_it_hides_pairs_and_a_bias_where_it_hides_keys() -> None:
    pairs = attention(lambda s, keep: s.masked_fill(future(), -100.0))
    spec = site_of(pairs, Q, K, V, KEEP).spec
    assert (spec.mask, spec.hidden_logit) == (Causal(), -100.0)
    keys = attention(lambda s, keep: padded(s, keep, -100.0))
    assert (site_of(keys, Q, K, V, KEEP).spec.mask, site_of(keys, Q, K, V, KEEP).spec.bias) == (
        FULL,
        ("bias",),
    )
    (site,) = check_like_eager(keys, (Q, K, V, KEEP), differentiable=3).attention
    assert site.verdict == "rewritten"


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


LOWEST = torch.finfo(torch.float32).min


def lowered(scores: Tensor, keep: Tensor) -> Tensor:
    """The lowest number added where a key is padding."""
    return scores + torch.where(keep[:, None, None, :], 0.0, LOWEST)


def test_the_lowest_number_lets_gradients_pass_where_it_is_added_and_not_where_it_is_filled_in() -> None:
    added = site_of(attention(lowered), Q, K, V, KEEP).spec
    filled = site_of(attention(lambda s, keep: padded(s, keep, LOWEST)), Q, K, V, KEEP).spec
    assert (added.empty_row, filled.empty_row) == (EmptyRow.ABSORBED, EmptyRow.UNIFORM)
    for attend in (attention(lowered), attention(lambda s, keep: padded(s, keep, LOWEST))):
        (site,) = check_like_eager(attend, (Q, K, V, KEEP), differentiable=3).attention
        assert site.verdict == "rewritten"


def test_a_fill_that_is_hidden_once_more_outside_of_it_is_a_mask() -> None:
    def attend(scores: Tensor, keep: Tensor) -> Tensor:
        seen = ~future() & keep[:, None, None, :]
        return scores.masked_fill(future(), LOWEST) + torch.where(seen, 0.0, LOWEST)

    site = site_of(attention(attend), Q, K, V, KEEP)
    assert (site.spec.mask, site.spec.bias, site.spec.empty_row) == (Causal(), ("bias",), EmptyRow.NEVER)
    assert "other gradients" in site.forward_only
    with torch.no_grad():
        (report,) = check_like_eager(attention(attend), (Q, K, V, KEEP)).attention
    assert report.verdict == "rewritten"
    (report,) = check_like_eager(attention(attend), (Q, K, V, KEEP), differentiable=3).attention
    assert report.verdict == "refused"


@pytest.mark.parametrize("inner", [torch.ones(7, 7, dtype=torch.bool).triu(2), torch.rand(7, 7) > 0.5])
def test_a_fill_that_is_not_hidden_once_more_is_refused(inner: Tensor) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        return lowered((q @ k.transpose(-2, -1)).masked_fill(hidden, LOWEST), keep).softmax(-1) @ v

    assert "mix several fill values" in reject_of(attend, Q, K, V, KEEP, inner).reason


@pytest.mark.parametrize("fill", [-1e9, -1e11])
def test_a_finite_number_that_a_whole_row_gets_leaves_outputs_and_gradients_alone(fill: float) -> None:
    attend = attention(lambda s, keep: s + (1.0 - keep[:, None, None, :].float()) * fill)
    (site,) = check_like_eager(attend, (Q, K, V, KEEP), differentiable=3).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1 full bias")
