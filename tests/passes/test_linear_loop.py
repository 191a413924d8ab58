"""Loops, chunks and running sums: read, compared in fp64, rewritten to one call, and equal to eager."""

import pytest
import torch
from compiling import check_like_eager
from loop_spellings import SPELLINGS, Spelling, blocks, blocks_with_state, by_head, slopes, step
from torch import Tensor


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_one_site_and_computes_what_eager_computes(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    report = check_like_eager(spelling.attend, inputs, differentiable=len(inputs), inner="aot_eager")
    (site,) = report.attention
    assert (site.verdict, site.kernel, site.spec) == ("rewritten", "lightning", str(spelling.spec))
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 31])
def test_blocks_of_any_number_and_a_shorter_last_one(length: int) -> None:
    report = check_like_eager(blocks, [*by_head(length), slopes()], differentiable=4)
    assert [site.verdict for site in report.attention] in ([], ["rewritten"])
    assert length < 9 or len(report.attention) == 1


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_state_that_is_kept_goes_in_and_comes_out(length: int) -> None:
    inputs = [*by_head(length), torch.randn(2, 3, 4, 5), slopes()]
    report = check_like_eager(step, inputs, differentiable=5)
    (site,) = report.attention
    assert (site.verdict, site.kernel) == ("rewritten", "lightning")
    assert "initial state" in site.spec
    assert "final state" in site.spec


def test_lengths_may_be_symbolic() -> None:
    report = check_like_eager(blocks, [*by_head(21), slopes()], dynamic=True)
    assert [site.verdict for site in report.attention] == ["rewritten"]


def test_half_precision() -> None:
    inputs = [x.bfloat16() for x in by_head(21)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return blocks(q, k, v, slopes().to(q.dtype))

    report = check_like_eager(attend, inputs, differentiable=3)
    assert [site.verdict for site in report.attention] == ["rewritten"]


def test_the_state_alone_used_twice_is_given_once() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, state = blocks_with_state(q, k, v, slope)
        return out, state.sin(), state.cos()

    report = check_like_eager(attend, [*by_head(), slopes()], differentiable=4)
    (site,) = report.attention
    assert (site.verdict, "final state" in site.spec) == ("rewritten", True)


def test_an_inner_state_that_is_used_elsewhere_keeps_the_loop() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows, states = [], [torch.zeros(2, 3, 4, 5)]
        for t in range(q.shape[2]):
            states.append(states[-1] + k[:, :, t, :, None] * v[:, :, t, None, :])
            rows.append(q[:, :, t, None] @ states[-1])
        return torch.cat(rows, 2), torch.stack(states)

    report = check_like_eager(attend, by_head(12), differentiable=3)
    (site,) = report.attention
    assert site.verdict == "refused"
    assert "used outside" in site.reason


def test_two_layers_in_one_graph_are_two_sites() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return blocks(blocks(q, k, v, slope).sin(), k, v, slope)

    report = check_like_eager(
        attend, [*(torch.randn(2, 3, 20, 4) for _ in range(3)), slopes()], differentiable=4
    )
    assert [site.verdict for site in report.attention] == ["rewritten"] * 2
