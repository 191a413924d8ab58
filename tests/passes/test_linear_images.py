"""Attention over the pixels of an image whose result is folded into rows and columns again, as U-Nets write it."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import found_in, site_of
from torch import Tensor

B, H, D, ROWS, COLUMNS = 2, 3, 4, 5, 7


def images() -> tuple[Tensor, ...]:
    """q, k and v as channels of one image."""
    return (torch.randn(B, 3 * H * D, ROWS, COLUMNS),)


def parts(qkv: Tensor) -> list[Tensor]:
    """q, k, v, (B, H, D, pixels)."""
    return [x.reshape(B, H, D, -1) for x in qkv.chunk(3, 1)]


def of_latent_diffusion(qkv: Tensor) -> Tensor:
    b, _, rows, columns = qkv.shape
    q, k, v = qkv.reshape(b, 3, H, D, rows * columns).unbind(1)
    state = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    return torch.einsum("bhde,bhdn->bhen", state, q).reshape(b, -1, rows, columns)


def of_denoising_diffusion(qkv: Tensor) -> Tensor:
    rows, columns = qkv.shape[2:]
    q, k, v = parts(qkv)
    q, k, v = q.softmax(-2) * D**-0.5, k.softmax(-1), v / (rows * columns)
    state = torch.einsum("b h d n, b h e n -> b h d e", k, v)
    return torch.einsum("b h d e, b h d n -> b h e n", state, q).reshape(qkv.shape[0], -1, rows, columns)


def by_matmul(qkv: Tensor) -> Tensor:
    q, k, v = (x.mT for x in parts(qkv))
    return (q @ (k.mT @ v)).mT.reshape(B, -1, *qkv.shape[2:])


def gated_as_an_image(qkv: Tensor) -> Tensor:
    return of_denoising_diffusion(qkv) * qkv[:, : H * D].sigmoid()


def divided_by_another_image(qkv: Tensor) -> Tensor:
    return of_denoising_diffusion(qkv) / (1 + qkv[:, : H * D].exp())


def doubled_above(qkv: Tensor) -> Tensor:
    """Two readers of the image: the one that folds it and the one that does not."""
    q, k, v = parts(qkv)
    out = torch.einsum("bhde,bhdn->bhen", torch.einsum("bhdn,bhen->bhde", k, v), q)
    return out.reshape(B, -1, *qkv.shape[2:]) + out.sum(-1).reshape(B, -1, 1, 1)


SPELLINGS = (
    of_latent_diffusion,
    of_denoising_diffusion,
    by_matmul,
    gated_as_an_image,
    divided_by_another_image,
    doubled_above,
)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attend", SPELLINGS)
def test_folding_the_pixels_afterwards_does_not_matter(
    attend: Callable[[Tensor], Tensor], *, dynamic: bool
) -> None:
    (site,) = check_like_eager(attend, images(), differentiable=1, dynamic=dynamic).attention
    assert (site.family, site.verdict, site.kernel) == ("linear", "rewritten", "lightning")


def test_the_pixels_stay_one_axis() -> None:
    (site,) = [found.site for found in found_in(of_denoising_diffusion, *images()) if found.site is not None]
    assert [len(axes) for axes in site.result.roles.layout("q")] == [1, 1, 1, 1]
    assert site.spec.heads.share == 1


def test_queries_of_softmax_attention_stay_one_axis() -> None:
    """Rows of an image are no heads that share keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.mT @ k * D**-0.5).softmax(-1)
        return (v @ weights.mT).reshape(B, D, ROWS, COLUMNS)

    inputs = tuple(torch.randn(B, D, ROWS * COLUMNS) for _ in range(3))
    assert site_of(attend, *inputs).spec.heads.share == 1
    for dynamic in (False, True):
        (site,) = check_like_eager(attend, inputs, differentiable=3, dynamic=dynamic).attention
        assert (site.verdict, site.spec) == ("rewritten", "softmax scale=0.5 full")


def heads_joined(join: Callable[[list[Tensor]], Tensor], *, linear: bool) -> Callable[..., Tensor]:
    """One attention for each head, whose images are joined, and then seen as one row."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = []
        for each in zip(q.split(D, 1), k.split(D, 1), v.split(D, 1), strict=True):
            queries, keys, values = each
            if linear:
                out = (values @ keys.mT) @ queries
            else:
                out = values @ (queries.mT @ keys).softmax(-1).mT
            found.append(out.reshape(B, D, ROWS, COLUMNS))
        return join(found).view(B, -1)

    return attend


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(
    "join", [lambda found: torch.cat(found, 1), lambda found: torch.stack(found, 1), lambda found: found[0]]
)
def test_images_are_joined_as_they_lie(join: Callable[[list[Tensor]], Tensor], *, linear: bool) -> None:
    """`cat` lays out an image as its inputs are laid out: a view of what it makes must stay possible."""
    q, k, v = (torch.randn(B, H * D, ROWS * COLUMNS) for _ in range(3))
    report = check_like_eager(heads_joined(join, linear=linear), (q, k, v), differentiable=3)
    assert {site.verdict for site in report.attention} == {"rewritten"}
