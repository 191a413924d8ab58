"""Gated linear attention in chunks, of a length padded to whole ones, as the models of the Mamba-2 family do it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from attnopt.report import Report, SiteReport

B, H, D, E, C = 2, 3, 4, 5, 8
GATED = "linear scale=1 causal decay per token"


def inputs(length: int) -> list[Tensor]:
    """q, k (B, S, H, D), v (B, S, H, E), log decays (B, S, H), and a weight for each head."""
    q, k, v = (torch.randn(B, length, H, n) for n in (D, D, E))
    return [q, k, v, -torch.rand(B, length, H), torch.randn(H)]


def filled(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """With `size` more positions, dimension 1, at the end."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, size), value=value)


def in_chunks(x: Tensor, size: int) -> Tensor:
    """(B, S, ...) -> (B, N, C, ...), after `size` positions more."""
    return filled(x, size).reshape(x.shape[0], -1, C, *x.shape[2:])


Triangle = Callable[[Tensor], Tensor]


def behind(square: Tensor) -> Tensor:
    return square.tril(-1)


def segments(x: Tensor, triangle: Triangle) -> Tensor:
    """The sum of x over the positions behind the key up to the query, -inf above the diagonal."""
    n = x.size(-1)
    counted = triangle(torch.ones(n, n, dtype=torch.bool))
    sums = x[..., None].expand(*x.shape, n).masked_fill(~counted, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


@dataclass(frozen=True)
class Chunked:
    """Chunks of a padded sequence, one after the other or each by itself, and what follows them.

    within, between: what segments count, of a chunk and of all chunks. beside: how a weight for each
    head enters beside the loop. linked: whether states are handed on. cut: whether what was padded is cut off again.
    last: whether the last state is returned.
    """

    within: Triangle = behind
    between: Triangle = behind
    beside: Callable[[Tensor, Tensor], Tensor] | None = None
    linked: bool = True
    cut: bool = True
    last: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        size = (C - q.shape[1] % C) % C
        out, state = self._attend(*(in_chunks(x, size) for x in (q, k, v, g)))
        out = out.contiguous().reshape(q.shape[0], -1, H, E)
        if self.beside is not None:
            out = out + self.beside(filled(v, size), weight)
        out = out[:, : q.shape[1]] if self.cut else out
        return (out, state.contiguous()) if self.last else out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        g = g.permute(0, 3, 1, 2)
        total = g.cumsum(-1)
        inside = torch.exp(segments(g, self.within)).permute(0, 2, 3, 4, 1)
        weights = torch.einsum("bclhn,bcshn->bclsh", q, k) * inside
        near = torch.einsum("bclsh,bcshp->bclhp", weights, v)
        fading = torch.exp(total[..., -1:] - total).permute(0, 2, 3, 1)[..., None]
        states = torch.einsum("bclhn,bclhp->bchpn", k * fading, v)
        if not self.linked:
            return near, states[:, -1]
        states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
        chunks = torch.exp(segments(F.pad(total[..., -1], (1, 0)), self.between)).transpose(1, 3)
        states = torch.einsum("bzch,bzhpn->bchpn", chunks, states)
        far = torch.einsum("bclhn,bchpn->bclhp", q, states[:, :-1])
        return near + far * torch.exp(total).permute(0, 2, 3, 1)[..., None], states[:, -1]


def residual(v: Tensor, weight: Tensor) -> Tensor:
    return weight[:, None] * v


def site_of(report: Report) -> SiteReport:
    (site,) = report.attention
    assert site.family == "linear"
    return site


@pytest.mark.parametrize("length", [3, 16, 19])
def test_a_padded_sequence_with_a_residual_is_one_loop(length: int) -> None:
    report = check_like_eager(Chunked(beside=residual), inputs(length), differentiable=5, inner="aot_eager")
    site = site_of(report)
    assert (site.verdict, site.nearest_rule, site.spec) == ("rewritten", "linear loop", GATED)


def test_the_last_state_goes_out_beside_the_residual() -> None:
    report = check_like_eager(Chunked(beside=residual, last=True), inputs(19), differentiable=5)
    assert (site_of(report).verdict, site_of(report).spec) == ("rewritten", f"{GATED} final state")


@pytest.mark.parametrize("case", [Chunked(), Chunked(cut=False)], ids=["cut off", "kept"])
def test_a_padded_sequence_without_a_residual_is_one_loop(case: Chunked) -> None:
    site = site_of(check_like_eager(case, inputs(19), differentiable=4))
    assert (site.verdict, site.nearest_rule, site.spec) == ("rewritten", "linear loop", GATED)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("length", [3, 19])
def test_chunks_by_themselves_read_their_decays_from_the_padded_tensor(length: int, *, dynamic: bool) -> None:
    """Reading on, from the padded tensor of log decays to the one before, finds a choice by position, not a decay."""
    case = Chunked(linked=False, beside=residual)
    site = site_of(check_like_eager(case, inputs(length), differentiable=4, dynamic=dynamic))
    assert (site.verdict, site.nearest_rule, site.spec) == ("rewritten", "linear", GATED)


@pytest.mark.parametrize("length", [16, 19])
def test_with_symbolic_lengths_at_least_each_chunk_is_read(length: int) -> None:
    """A loop that was tried at one number of chunks says nothing of others."""
    case = Chunked(beside=residual, last=True)
    site = site_of(check_like_eager(case, inputs(length), differentiable=5, dynamic=True))
    assert (site.verdict, site.nearest_rule, site.spec) == ("rewritten", "linear", GATED)


def test_what_was_compiled_for_whole_chunks_runs_at_other_lengths() -> None:
    case = Chunked(beside=residual)
    torch._dynamo.reset()
    compiled = torch.compile(case, backend="attnopt", options={"inner": "eager"}, dynamic=True)
    for length in (16, 19, 24, 31, 16):
        given = inputs(length)
        torch.testing.assert_close(compiled(*given), case(*given), rtol=1e-4, atol=1e-5)


NEAR_MISSES = {
    "a segment counts its first decay": Chunked(within=lambda x: x.tril(), beside=residual),
    "a segment counts one decay too few": Chunked(within=lambda x: x.tril(-2), beside=residual),
    "chunks fade by their own decay once more": Chunked(between=lambda x: x.tril(), beside=residual),
    "chunks do not fade by the one before": Chunked(between=lambda x: x.tril(-2), beside=residual),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_detail_that_differs_is_no_loop(name: str) -> None:
    """A chunk by itself may be one attention; the outputs have been compared."""
    report = check_like_eager(NEAR_MISSES[name], inputs(19), differentiable=5)
    assert all(site.nearest_rule != "linear loop" for site in report.attention if site.verdict == "rewritten")
    assert all(site.reason for site in report.attention if site.verdict != "rewritten")


BESIDE = {
    "values of one position earlier": lambda v, w: w[:, None] * v.roll(1, 1),
    "a running mean of the values": lambda v, w: w[:, None] * v.cumsum(1),
    "squares of the values": lambda v, w: w[:, None] * v * v,
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_added_to_the_output_does_not_matter(name: str) -> None:
    site = site_of(check_like_eager(Chunked(beside=BESIDE[name]), inputs(19), differentiable=5))
    assert (site.verdict, site.nearest_rule, site.spec) == ("rewritten", "linear loop", GATED)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_padding_may_hold_anything(place: int) -> None:
    """What is padded enters as it is, so that nothing has to be known of the numbers behind the end."""

    def attend(*given: Tensor) -> Tensor:
        longer = [filled(x, 5, -3.0 if n == place else 0.0) for n, x in enumerate(given[:4])]
        return Chunked(beside=residual, cut=False)(*longer, given[4])[:, :19]

    site = site_of(check_like_eager(attend, inputs(19), differentiable=5))
    assert (site.verdict, site.nearest_rule, site.spec) == ("rewritten", "linear loop", GATED)
