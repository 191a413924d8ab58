"""SparQ with its launches joined: what each joined launch computes and writes is what the launches apart do."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_same
from sparq_cases import Case, request_of
from sparq_judging import DEVICE, DOTS, PLACES, SMALL, assert_row_rule, positions_of
from torch import Tensor

from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.append import Buffers, append
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import TICKETS, Tiles, choose_tiles
from attnopt.kernels.sparq.triton_decode import begin, decode, is_joinable, is_ticketed
from attnopt.kernels.sparq.triton_start import Channels, Token, Unchosen

#: All positions of a case are one part.
APART = replace(SMALL, chosen_split=64)
WAYS = {
    "start": replace(APART, start_joined=True),
    "end": replace(APART, end_joined=True),
    "rows": replace(APART, start_joined=True, end_joined=True),
    "dots": replace(APART, dot_heads=1, start_joined=True, end_joined=True),
    "ticket": replace(APART, start_joined=True, ticket=True),
    "ticket for one": replace(APART, dot_heads=1, start_joined=True, ticket=True),
}
BOUNDED = replace(
    APART, dot_heads=1, bound_split=64, open_split=128, bounded=True, start_joined=True, end_joined=True
)
SIZES = [
    Case(batch=1, group=3, sk=70, d=20, dv=12, topk=30, local=7),
    Case(group=2, kv_heads=1, sk=40, padding=0.5, layout="sliced"),
    Case(batch=1, kv_heads=2, sk=33, d=33, dv=40, rank=17, topk=17, layout="transposed", has_k_t=False),
    Case(batch=1, group=17, kv_heads=1, sk=20, d=16, topk=6, local=6),
]
ONE = Case(kv_heads=1)


@pytest.mark.parametrize("name", ["rows", "ticket for one"])
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_it_keeps_the_row_rule(case: Case, device: str, dtype: torch.dtype, name: str) -> None:
    request = request_of(case, dtype, device)
    positions = positions_of(request, DOTS if WAYS[name].dot_heads == 1 else SMALL)
    assert_row_rule(request, decode(request, WAYS[name]), positions, dtype)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "case", [replace(ONE, sk=40), replace(ONE, batch=1, group=2, sk=70, padding=0.3, topk=30)], ids=str
)
def test_joining_changes_only_rounding(case: Case, name: str) -> None:
    request, tiles = request_of(case, device=DEVICE), WAYS[name]
    apart = replace(tiles, start_joined=False, end_joined=False, ticket=False)
    assert_same(decode(request, tiles), decode(request, apart).double())


def test_bounds_join_their_end() -> None:
    request = request_of(Case(batch=1, group=2, sk=150, topk=4, local=1, mean_value=False), device=DEVICE)
    assert_row_rule(request, decode(request, BOUNDED), positions_of(request, SMALL), torch.float32)


def step_of(case: Case, lengths: tuple[int, int], starts: tuple[int, int] = (0, 4)) -> tuple[Request, Token]:
    """A request into which a token is to go; what does not count is not a number."""
    r = request_of(case, device=DEVICE)
    token = token_of(case.kv_heads)
    first, now = torch.tensor(starts, device=DEVICE), torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    position = torch.arange(case.sk, device=DEVICE)
    outside = (position < first[:, None]) | (position >= now[:, None])
    for x in (r.k, r.v):
        x.transpose(1, 2)[outside] = torch.nan
    if r.k_t is not None:
        r.k_t.permute(0, 3, 1, 2)[outside] = torch.nan
    mean = torch.randn(2, case.kv_heads, 16, device=DEVICE)
    return replace(r, v_mean=mean, starts=first, lengths=now, grown=1), token


def token_of(kv_heads: int) -> Token:
    return Token(*torch.randn(2, 2, kv_heads, 1, 16, device=DEVICE))


def held(request: Request) -> dict[str, Tensor]:
    """The buffers that a step writes."""
    found = {name: getattr(request, name) for name in ("k", "v", "k_t", "v_mean")}
    return {name: x for name, x in found.items() if x is not None}


@pytest.mark.parametrize("lengths", [(0, 49), (32, 50)], ids=str)
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case(), "rows"), (replace(ONE, group=2), "ticket"), (replace(ONE, group=2, mean_value=False), "dots"),
        (replace(ONE, has_k_t=False), "ticket for one"),
    ],
    ids=str,
)  # fmt: skip
def test_a_step_is_append_then_attention(case: Case, name: str, lengths: tuple[int, int]) -> None:
    request, token = step_of(case, lengths)
    there = replace(request, **{name: x.clone() for name, x in held(request).items()})
    fits = int(lengths[1] < 50) + 1  # a batch row without room gets no token
    parts = (there.k, there.v, there.k_t, there.v_mean, there.starts, there.lengths)
    append(Buffers(*(None if x is None else x[:fits] for x in parts)), token.k[:fits], token.v[:fits])
    out = decode(request, WAYS[name], token)
    for one, other in zip(held(request).values(), held(there).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert_same(out[:fits], steps.decode(there.masked())[:fits].double())


@pytest.mark.parametrize("name", ["rows", "ticket"])
def test_a_cache_that_grows_and_is_cropped_follows(name: str) -> None:
    request, _ = step_of(replace(ONE, group=1 + (name == "ticket")), (30, 14), starts=(0, 0))
    there = replace(request, **{name: x.clone() for name, x in held(request).items()})
    for advanced in (0, 1, -9):
        token = token_of(1)
        assert request.lengths is not None
        now = request.lengths + advanced
        mine, other = replace(request, lengths=now), replace(there, lengths=now)
        append(Buffers(other.k, other.v, other.k_t, other.v_mean, other.starts, now), token.k, token.v)
        assert_same(decode(mine, WAYS[name], token), steps.decode(other.masked()).double())


def test_steps_give_the_same_bits_each_time() -> None:
    outs = []
    for _ in range(2):
        request, token = step_of(replace(ONE, group=2), (30, 45))
        outs.append(decode(request, WAYS["ticket"], token))
    assert torch.equal(*outs)


def test_what_cannot_be_joined_is_left_apart() -> None:
    request, token = step_of(replace(ONE, group=2), (30, 45))
    tiles = WAYS["ticket"]
    assert isinstance(begin(request, token, tiles), Unchosen)
    assert is_ticketed(request, tiles)
    # A mask is made of the range: where the token goes is no longer known.
    assert isinstance(begin(replace(request, v_mean=None), token, tiles), Channels)
    # In several parts, or with nothing to weigh.
    for less in (replace(tiles, chosen_split=4), replace(tiles, dot_heads=4)):
        assert not is_ticketed(request, less)
    assert not is_joinable(request, replace(tiles, chosen_split=4))
    assert not is_ticketed(replace(request, mean_value=False), replace(tiles, bounded=True))
    for less in (replace(tiles, chosen_split=16), replace(tiles, end_joined=True, chosen_split=16)):
        many = request_of(Case(batch=1, kv_heads=1, group=2, topk=30), device=DEVICE)
        assert_same(decode(many, less), decode(many, APART).double())


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group", "sk", "joined", "early", "ticket"),
    [
        (1, 8, 4, 4_096, True, True, True),
        (1, 8, 4, 131_072, True, True, True),
        (1, 8, 4, 262_144, True, False, False),
        (4, 8, 4, 16_384, True, False, False),
        (1, 32, 1, 16_384, True, True, False),
        (16, 8, 4, 131_072, False, False, False),
        (64, 32, 1, 4_096, False, False, False),
    ],
)
def test_launches_are_joined_where_a_step_is_their_starts_and_ends(
    batch: int, kv_heads: int, group: int, sk: int, joined: bool, early: bool, ticket: bool
) -> None:
    k = torch.empty(batch, kv_heads, sk, 128, device="meta")
    q = k[:, :, :1].repeat(1, group, 1, 1)
    tiles = choose_tiles(Request(q, k, k, None, None, None, 32, 128, 1, 1.0, True))
    assert (tiles.start_joined, tiles.end_joined, tiles.early, tiles.ticket) == (
        joined,
        joined,
        early,
        ticket,
    )
    programs = batch * kv_heads * -(-sk // tiles.weight_block)
    assert not ticket or programs <= TICKETS, "those that draw a ticket all run at once"


# On a GPU only.


def large(group: int) -> tuple[Request, Tiles, Token]:
    case = Case(group=group, sk=9000, d=128, dv=128, rank=32, topk=64, local=8, mean_value=group == 1)
    request = request_of(case, torch.bfloat16, "cuda")
    lengths = torch.tensor([8999, 4000], device="cuda")
    mean = request.v[:, :, :4000].mean(2, dtype=torch.float32)
    request = replace(request, v_mean=mean, lengths=lengths, grown=1)
    joined = {"start_joined": True, "end_joined": True, "ticket": group > 1, "early": True, "bounded": False}
    return (
        request,
        replace(choose_tiles(request), **joined),
        Token(request.k[:, :, :1] + 0, request.v[:, :, :1] + 0),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_a_hundred_joined_steps_give_the_same_bits(group: int) -> None:
    request, tiles, token = large(group)
    first, mean = decode(request, tiles, token), request.v_mean
    assert mean is not None
    kept = mean.clone()
    for _ in range(100):
        decode(request, tiles, token)
        mean.copy_(kept)
        assert torch.equal(decode(request, tiles), first)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_a_captured_joined_step_follows_its_inputs_and_lengths(group: int) -> None:
    request, tiles, token = large(group)
    decode(request, tiles, token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(request, tiles, token)
    for at in (8000, 5, 700):
        assert request.lengths is not None
        request.lengths.copy_(torch.tensor([at, 4000], device="cuda"))
        request.q.normal_()
        token.k.normal_()
        graph.replay()
        found = out.clone()
        assert torch.equal(request.k[0, :, at], token.k[0, :, 0])
        assert torch.equal(request.k_t[0, :, :, at], token.k[0, :, 0])  # type: ignore[index]
        assert torch.equal(found, decode(request, tiles))
