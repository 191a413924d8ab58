"""Where a step's own key lies: behind a cache, or written into a static one. Other steps are refused, or exact."""

import pytest
import torch
from oracle import assert_same
from rope_cases import STREAMING, paper, tensors, turned_in_rows
from rope_spellings import halves
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attnopt


class Appended(nn.Module):
    """One token behind a cache, with a position for each sequence."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, keep: Tensor, t: Tensor
    ) -> Tensor:
        keys, values = torch.cat([keys, turned_in_rows(k, t)], 2), torch.cat([values, v], 2)
        return scaled_dot_product_attention(
            turned_in_rows(q, t), keys, values, attn_mask=keep[:, None, None], scale=0.4
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_step_of_a_padded_batch_is_a_step_of_each_row(*, dynamic: bool) -> None:
    q, k, v = tensors()
    keep = torch.ones(2, q.shape[2], dtype=torch.bool)
    keep[0, :8], keep[1, 21:-1] = False, False
    t = (keep.cumsum(-1) - 1).clamp(min=0)
    past = turned_in_rows(k, t)[:, :, :-1].clone(), v[:, :, :-1].clone()
    own = [x[:, :, -1:].clone() for x in (q, k, v)]
    torch._dynamo.reset()
    options = {**STREAMING, "inner": "eager", "strict": True}
    run = torch.compile(Appended(), backend="attnopt", options=options, dynamic=dynamic)
    with torch.no_grad():
        got = run(*own, *past, keep, t[:, -1:].clone())
    assert not attnopt.reports()[-1].sites[0].exact
    for row, kept in enumerate(keep):
        alone = paper(halves, *(x[row : row + 1, :, kept] for x in (q, k, v)))
        assert_same(got[row : row + 1], alone[:, :, -1:])


class Cached(nn.Module):
    """One token, or several, written into a cache of fixed length: (B, H, S, D) for keys and values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: Tensor, seen: Tensor
    ) -> Tensor:
        t = (torch.arange(k.shape[2]) + place)[None]
        q = q[:, :, -1:] if self.kind == "last of three" else q
        q, k = (
            turned_in_rows(q, t[:, -q.shape[2] :]),
            turned_in_rows(k, t * 2 if self.kind == "other rate" else t),
        )
        at = torch.arange(k.shape[2]) + place
        match self.kind:
            case "index_put":
                keys[:, :, at], values[:, :, at] = k, v
            case "functional":
                keys, values = keys.index_copy(2, at, k), values.index_copy(2, at, v)
            case "elsewhere":
                keys, values = keys + k, values + v
            case _:
                keys.index_copy_(2, at, k)
                values.index_copy_(2, at, v)
        seen = seen[:, :, -q.shape[2] :]
        if self.kind == "unmasked":
            return scaled_dot_product_attention(q, keys, values, scale=0.4)
        return scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=0.4)


def step(count: int = 1) -> tuple[Tensor, ...]:
    """The last of 17 tokens, or the last few, over a cache of 32 places."""
    q, k, v = (x[:, :, 17 - count : 17] for x in tensors())
    keys, values = (torch.full((2, 2, 32, 8), 9.0, dtype=torch.float64) for _ in range(2))
    _, old, values_of = tensors()
    keys[:, :, : 17 - count] = turned_in_rows(old[:, :, : 17 - count], torch.arange(17 - count)[None])
    values[:, :, : 17 - count] = values_of[:, :, : 17 - count]
    seen = (torch.arange(32) <= torch.arange(17 - count, 17)[:, None]).expand(2, 1, count, 32)
    return q, k, v, keys, values, torch.tensor(17 - count), seen.clone()


@pytest.mark.parametrize("kind", ["index_copy_", "index_put", "functional"])
def test_a_step_over_a_static_cache_is_the_last_row(kind: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(
        Cached(kind), backend="attnopt", options={**STREAMING, "inner": "eager", "strict": True}
    )
    with torch.no_grad():
        got = run(*step())
    (site,) = attnopt.reports()[-1].sites
    assert not site.exact
    assert "and its mask to end at the query's own" in site.reason
    assert_same(got, paper(halves, *(x[:, :, :17] for x in tensors()))[:, :, 16:])


@pytest.mark.parametrize(
    ("kind", "count", "reason"),
    [
        ("index_copy_", 3, "only prompts without padding and steps of one token are cut"),
        ("unmasked", 1, "its mask is not plainly causal (full)"),
        ("elsewhere", 1, "its mask is not plainly causal (padding)"),
        ("other rate", 1, "scores depend on more than the distance"),
        ("last of three", 3, "its mask is not plainly causal (padding)"),
    ],
)
def test_what_is_almost_a_step_over_a_static_cache_is_refused(kind: str, count: int, reason: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(Cached(kind), backend="attnopt", options={**STREAMING, "inner": "eager"})
    with torch.no_grad():
        got = run(*step(count))
        assert_same(got, Cached(kind)(*step(count)))
    (site,) = attnopt.reports()[-1].sites
    assert site.exact
    assert reason in site.reason


def test_a_prompt_that_is_said_to_be_causal_does_not_stand_at_the_end_of_the_cache() -> None:
    torch._dynamo.reset()
    options = {**STREAMING, "inner": "eager", "assume_causal": True}
    run = torch.compile(Cached("index_copy_"), backend="attnopt", options=options)
    with torch.no_grad():
        run(*step(3))
    assert "its last query stands at the end of a static cache" in attnopt.reports()[-1].sites[0].reason


class Prompt(Cached):
    """The first tokens, written into an empty cache, of which they see their own part."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, place: Tensor) -> Tensor:  # type: ignore[override]
        t = torch.arange(q.shape[2]) + place
        q, k = halves(q, t), halves(k, t)
        keys.index_copy_(2, t, k)
        values.index_copy_(2, t, v)
        keys, values = (x[:, :, : q.shape[2]] for x in (keys, values))
        return scaled_dot_product_attention(q, keys, values, is_causal=True, scale=0.4)


def test_a_prompt_without_padding_is_streamed_over_a_static_cache() -> None:
    torch._dynamo.reset()
    options = {**STREAMING, "inner": "eager", "strict": True}
    run = torch.compile(Prompt(""), backend="attnopt", options=options)
    q, k, v = (x[:, :, :17].clone() for x in tensors())
    with torch.no_grad():
        got = run(q, k, v, *step()[3:5], torch.tensor(0))
    (site,) = attnopt.reports()[-1].sites
    assert not site.exact
    assert site.reason == "the keys in its cache are taken to lie in the order of their positions"
    assert_same(got, paper(halves, q, k, v))
