"""One launch that takes a token into the ring is what its parts in torch do, interpreted or on a GPU."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from stream_cases import Batch, Paper
from torch import Tensor

from attnopt import caches_ring
from attnopt.caches import Rotary, StreamingCache
from attnopt.caches_ring import Arrival
from attnopt.kernels.streaming import ring
from attnopt.kernels.streaming.ring import Entry, Span
from attnopt.kernels.streaming.triton_enter import launch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
TURNS = {
    "none": None,
    "halves": Rotary.of(16, 100.0),
    "neighbours": Rotary.of(16, 100.0, "neighbours"),
    "part": Rotary(torch.tensor([1.0, 0.2, 0.05]), "halves", 1.3),
    "part of neighbours": Rotary(torch.tensor([1.0, 0.2, 0.05]), "neighbours", 0.7),
}


def an_entry(
    span: Span,
    seen: list[int],
    rotary: Rotary | None,
    *,
    keep: list[bool] | None = None,
    turned: bool = False,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
) -> Entry:
    b, d, dv = len(seen), 16, 12
    q, k, v = (
        torch.randn(b, h, n, dtype=torch.float64).to(dtype)
        for h, n in zip((*heads, heads[1]), (d, d, dv), strict=True)
    )
    keys, values = (torch.randn(b, heads[1], span.slots, n).to(dtype) for n in (d, dv))
    turn = {} if rotary is None else {
        "frequencies": rotary.frequencies.double(), "neighbours": rotary.pairs == "neighbours", "gain": rotary.gain,
    }  # fmt: skip
    flags = None if keep is None else torch.tensor(keep)
    return Entry(q, k, v, keys, values, torch.tensor(seen), flags, span, turned=turned, **turn)


def on(entry: Entry, device: torch.device) -> Entry:
    names = [name for name in Entry.__slots__ if isinstance(getattr(entry, name), Tensor)]
    return replace(entry, **{name: getattr(entry, name).to(device, copy=True) for name in names})


def check(entry: Entry, rotary: Rotary | None) -> None:
    """near, far, the key in its slot and everything beside it, against torch in fp64."""
    keep = torch.ones_like(entry.seen).bool() if entry.keep is None else entry.keep
    mine = on(entry, DEVICE)
    near, far, newest, tickets = (x.cpu() for x in launch(mine))
    assert torch.equal(tickets, torch.zeros_like(tickets))
    assert torch.equal(newest, torch.where(keep, entry.seen, -1))
    wide, plain = (placed(entry, rotary, dtype) for dtype in (torch.float64, entry.q.dtype))
    assert_same(near, wide[0], plain[0], what="near")
    if entry.span.sinks:
        assert_same(far, wide[1], plain[1], what="far")
    for kept, found, fresh, eager in (
        (entry.keys, mine.keys.cpu(), wide[2], plain[2]),
        (entry.values, mine.values.cpu(), entry.v.double(), entry.v),
    ):
        want, yardstick = kept.double(), kept.clone()
        for row in keep.nonzero()[:, 0]:
            slot = int(entry.span.slot(entry.seen[row]))
            want[row, :, slot], yardstick[row, :, slot] = fresh[row], eager[row]
        assert_same(found, want, yardstick, what="ring")


def placed(entry: Entry, rotary: Rotary | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x[:, :, None].to(dtype) for x in (entry.q, entry.k, entry.v))
    new = Arrival(q, k, v, None, 1.0, None, rotary, entry.turned).placed(entry.seen[:, None], entry.span)
    return new.near[:, :, 0], new.far[:, :, 0], new.k[:, :, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("positions", sorted(TURNS))
def test_a_token_is_turned_and_written(positions: str, turned: bool, dtype: torch.dtype) -> None:
    rotary = TURNS[positions]
    check(an_entry(Span(3, 5, 2), [0, 2, 3, 9, 100], rotary, turned=turned, dtype=dtype), rotary)


@settings(max_examples=30 if ON_GPU else 12)
@given(
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (6, 2), (3, 3)]),
    st.sampled_from(sorted(TURNS)),
    st.booleans(),
)
def test_any_ring_and_any_padding(
    sinks: int,
    window: int,
    spare: int,
    rows: list[tuple[int, bool]],
    heads: tuple[int, int],
    positions: str,
    turned: bool,
) -> None:
    seen, keep = (list(column) for column in zip(*rows, strict=True))
    entry = an_entry(
        Span(sinks, window, spare), seen, TURNS[positions], keep=keep, turned=turned, heads=heads
    )
    check(entry, TURNS[positions])


# Beyond 2^33 positions the phases of the fp64 definition are themselves no finer than fp32.
@pytest.mark.parametrize("far", [2**24 + 1, 2**31 + 12_345, 2**33 + 1])
@pytest.mark.parametrize("turned", [False, True])
def test_phases_are_exact_far_away(far: int, turned: bool) -> None:
    rotary = Rotary.of(16, 10_000.0)
    check(an_entry(Span(4, 9), [far, far + 5], rotary, turned=turned), rotary)


def test_layout_changes_nothing_and_inputs_stay() -> None:
    rotary = TURNS["halves"]
    entry = an_entry(Span(3, 5), [7, 2], rotary)
    odd = replace(
        entry, **{n: getattr(entry, n).mT.contiguous().mT for n in ("q", "k", "v", "keys", "values")}
    )
    mine = on(odd, DEVICE)
    check(odd, rotary)
    launch(mine)
    for name in ("q", "k", "v", "seen", "frequencies"):
        assert torch.equal(getattr(mine, name).cpu(), getattr(odd, name))


@pytest.mark.parametrize("counting", ["within", "beside"])
@pytest.mark.parametrize("positions", [*sorted(TURNS), "alibi"])
def test_a_stream_of_launches_is_the_published_algorithm(
    positions: str, counting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps by the kernels, prompts in torch; sequences of unequal length, one of which pauses."""
    monkeypatch.setattr(caches_ring, "enters_by_triton", lambda q: True)
    monkeypatch.setattr(ring, "_served_by_triton", lambda step: True)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if positions == "alibi" else None
    turn = {"slopes": slopes} if positions == "alibi" else {"rotary": TURNS[positions]}
    cache = StreamingCache(sinks=3, window=6, counting=counting, **turn)
    paper, batch = Paper(3, 9 + (counting == "beside"), **turn), Batch(d=16, rows=[[], []])
    for keep in ([[0, 1, 1], [1, 1, 1]], *([[1], [n % 4 > 0]] for n in range(12))):
        there = torch.tensor(keep).bool()
        q, k, v = (x.to(DEVICE) for x in batch.more(there, torch.float32))
        out = cache.attend(q, k, v, scale=paper.scale, keep=there.to(DEVICE))
        assert torch.allclose(out.cpu().double(), batch.wanted(paper, there), atol=1e-5)
    assert cache.lengths().tolist() == [14, 12]


@pytest.mark.parametrize("positions", sorted(TURNS))
def test_queries_that_come_turned_give_the_same(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = TURNS[positions]
    rings = [caches_ring.Ring(Span(2, 4), *torch.randn(2, 1, 2, 1, 16).to(DEVICE)) for _ in range(2)]
    monkeypatch.setattr(caches_ring, "enters_by_triton", lambda q: True)
    monkeypatch.setattr(ring, "_served_by_triton", lambda step: True)
    for t in range(9):
        q, k, v = (torch.randn(1, h, 1, 16, device=DEVICE) for h in (4, 2, 2))
        at = torch.tensor([[t]], device=DEVICE)
        near, key = (x if rotary is None else rotary.turned(x, at) for x in (q, k))
        arrivals = (
            Arrival(near, key, v, None, 0.3, None, rotary, turned=True),
            Arrival(q, k, v, None, 0.3, None, rotary),
        )
        outs = [it.attend(arrival) for it, arrival in zip(rings, arrivals, strict=True)]
        assert torch.allclose(outs[0], outs[1], atol=1e-5)
