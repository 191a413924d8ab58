"""StreamingCache is the published algorithm, however a text is split into calls."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from stream_cases import Batch, Paper, keeps
from torch import Tensor

from attnopt import caches_ring
from attnopt.caches import Rotary, StreamingCache
from attnopt.caches_ring import FIELDS
from attnopt.errors import OptionError, ShapeError, UnsupportedError

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
POSITIONS = {
    "none": {},
    "alibi": {"slopes": SLOPES},
    "halves": {"rotary": Rotary.of(8, 100.0)},
    "neighbours": {"rotary": Rotary.of(8, 100.0, "neighbours")},
    "partial": {"rotary": Rotary(torch.tensor([1.0, 0.3]), "halves", gain=1.2)},
}


def pair(
    sinks: int, window: int, counting: str = "within", rollback: int = 0, **positions: object
) -> tuple[StreamingCache, Paper]:
    cache = StreamingCache(sinks=sinks, window=window, counting=counting, rollback=rollback, **positions)
    return cache, Paper(sinks, sinks + window + (counting == "beside"), **positions)


def all_there(batch: int, n: int) -> Tensor:
    return torch.ones(batch, n, dtype=torch.bool)


def check_call(cache: StreamingCache, paper: Paper, batch: Batch, keep: Tensor) -> None:
    q, k, v = batch.more(keep)
    given_keep = None if bool(keep.all()) else keep
    out = cache.attend(q, k, v, scale=paper.scale, keep=given_keep)
    assert torch.allclose(out, batch.wanted(paper, keep), rtol=1e-11, atol=1e-11)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, object]]:
    calls = st.tuples(st.just("take"), keeps(2, 9))
    steps = st.tuples(st.just("take"), keeps(2, 1))
    crops = st.tuples(st.just("crop"), st.integers(0, 3))
    beams = st.tuples(st.just("beam"), st.lists(st.integers(0, 1), min_size=2, max_size=2))
    again = st.tuples(st.sampled_from(["save", "reset"]), st.none())
    return draw(st.lists(calls | steps | steps | crops | beams | again, min_size=2, max_size=12))


@settings(max_examples=60)
@given(
    histories(),
    st.integers(0, 3),
    st.integers(1, 5),
    st.sampled_from(["within", "beside"]),
    st.sampled_from(sorted(POSITIONS)),
)
def test_any_history_equals_the_paper_token_by_token(
    history: list[tuple[str, object]], sinks: int, window: int, counting: str, positions: str
) -> None:
    cache, paper = pair(sinks, window, counting, rollback=2, **POSITIONS[positions])
    batch = Batch(rows=[[], []])
    for verb, what in history:
        if verb == "take":
            check_call(cache, paper, batch, what)
        if verb == "crop" and min(len(row) for row in batch.rows) >= what:
            try:
                cache.crop(what)
            except UnsupportedError:
                continue
            batch.rows = [row[: len(row) - what] for row in batch.rows]
        if verb == "beam":
            cache.reorder(torch.tensor(what))
            batch.rows = [list(batch.rows[n]) for n in what]
        if verb == "save":
            state = cache.state_dict()
            cache = pair(sinks, window, counting, rollback=2, **POSITIONS[positions])[0]
            cache.load_state_dict(state)
        if verb == "reset":
            cache.reset()
            batch.rows = [[], []]


@pytest.mark.parametrize("positions", sorted(POSITIONS))
@pytest.mark.parametrize("counting", ["within", "beside"])
@pytest.mark.parametrize("cuts", [(40,), (1,) * 40, (3, 1, 1, 20, 1, 14), (1, 39)])
def test_every_split_of_a_text_is_the_same(cuts: tuple[int, ...], counting: str, positions: str) -> None:
    cache, paper = pair(4, 7, counting, **POSITIONS[positions])
    batch = Batch(rows=[[], []])
    for n in cuts:
        check_call(cache, paper, batch, all_there(2, n))


@pytest.mark.parametrize("positions", ["alibi", "halves"])
@pytest.mark.parametrize("piece", [16_384, 150])
def test_a_long_text_in_one_call(positions: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches_ring, "PIECE", piece)
    cache, paper = pair(4, 30, **POSITIONS[positions])
    batch = Batch(rows=[[]])
    check_call(cache, paper, batch, all_there(1, 700))
    check_call(cache, paper, batch, all_there(1, 1))
    check_call(cache, paper, batch, all_there(1, 300))


def test_the_two_countings_differ_by_the_own_key() -> None:
    assert pair(4, 7, "beside")[0].span == pair(4, 8, "within")[0].span
    assert pair(4, 7, "within")[0].span.last_place == 10


@pytest.mark.parametrize("seen", [0, 1, 3, 4, 30])
def test_left_padding_and_finished_sequences(seen: int) -> None:
    cache, paper = pair(4, 5, **POSITIONS["halves"])
    batch = Batch(rows=[[], [], []])
    if seen:
        check_call(cache, paper, batch, all_there(3, seen))
    prompt = torch.tensor([[0, 0, 0, 0, 1, 1], [1] * 6, [0] * 6]).bool()
    check_call(cache, paper, batch, prompt)
    for finished in ([1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]):
        check_call(cache, paper, batch, torch.tensor(finished).bool()[:, None])
    assert cache.lengths().tolist() == [len(row) for row in batch.rows]


def test_tokens_within_the_rollback_can_always_be_taken_back() -> None:
    cache, paper = pair(2, 4, rollback=3, **POSITIONS["halves"])
    batch = Batch(rows=[[]])
    for n in (5, 9, 1, 4, 1):
        check_call(cache, paper, batch, all_there(1, n))
        cache.crop(4)
        batch.rows[0] = batch.rows[0][:-4]
        check_call(cache, paper, batch, all_there(1, 6))


def test_what_is_gone_is_not_brought_back() -> None:
    cache, paper = pair(2, 4, **POSITIONS["halves"])
    batch = Batch(rows=[[]])
    check_call(cache, paper, batch, all_there(1, 20))
    before = cache.state_dict()["layers"][0]
    with pytest.raises(UnsupportedError, match="cannot be taken back"):
        cache.crop(2)
    cache.crop(1)
    with pytest.raises(UnsupportedError, match="cannot be taken back"):
        cache.crop(1)
    assert torch.equal(cache.layers[0].keys, before["keys"])
    short = pair(2, 4)[0]
    short.attend(*batch.more(all_there(1, 1)))
    with pytest.raises(UnsupportedError, match="not there"):
        short.crop(2)
    with pytest.raises(OptionError, match="0 or more"):
        short.crop(-1)


def test_what_was_overwritten_before_a_crop_stays_gone_after_it() -> None:
    cache, paper = pair(2, 4, rollback=2, **POSITIONS["halves"])
    batch = Batch(rows=[[]])
    check_call(cache, paper, batch, all_there(1, 20))
    cache.crop(3)
    batch.rows = [batch.rows[0][:17]]
    check_call(cache, paper, batch, all_there(1, 1))
    with pytest.raises(UnsupportedError):
        cache.crop(2)
    cache.crop(1)
    batch.rows = [batch.rows[0][:17]]
    check_call(cache, paper, batch, all_there(1, 9))


def test_a_crop_of_several_layers_takes_place_in_all_or_none() -> None:
    cache = StreamingCache(sinks=1, window=2)
    cache.attend(*Batch(rows=[[]]).more(all_there(1, 2)), layer=0)
    cache.attend(*Batch(rows=[[]]).more(all_there(1, 9)), layer=1)
    with pytest.raises(UnsupportedError):
        cache.crop(2)
    assert cache.lengths(0).tolist() == [2]


# ---- far from the start ----


def far_away(cache: StreamingCache, start: int) -> None:
    """The cache after `start` more tokens than it has seen, none of which is in its window any longer."""
    for ring in cache.layers.values():
        ring.seen += start
        ring.top += start


@pytest.mark.parametrize("start", [2**24 + 1, 2**31 + 12_345, 2**40 + 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_positions_far_away_are_as_exact_as_near_ones(start: int, dtype: torch.dtype) -> None:
    """What a query sees depends on distances only, so the same tokens far away must give what they give near."""
    rotary = Rotary.of(8, 10_000.0)
    cache, paper = pair(3, 6, rotary=rotary)
    batch = Batch(rows=[[]])
    cache.attend(*batch.more(all_there(1, 9), dtype), scale=paper.scale)
    far_away(cache, start)
    for n in (6, 1, 9, 1, 1):
        keep = all_there(1, n)
        out = cache.attend(*batch.more(keep, dtype), scale=paper.scale)
    want = batch.wanted(paper, keep)
    bound = {torch.float64: 2.0**-52 * start * 4 + 1e-12, torch.float32: 3e-6}[dtype]
    assert float((out.double() - want).abs().max()) < bound


def test_a_phase_formed_in_fp32_would_fail_there() -> None:
    rotary, t = Rotary.of(8), torch.tensor([[2**31 + 12_345]])
    cos, _ = rotary.waves(torch.randn(1, 1, 1, 8), t, 1.0)
    assert not torch.allclose(cos, (t.float() * rotary.frequencies.float()).cos(), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_row_is_as_good_as_eager(dtype: torch.dtype) -> None:
    cache, paper = pair(4, 20, **POSITIONS["halves"])
    batch = Batch(rows=[[], []])
    for n in (30, 1, 1, 25, 1):
        keep = all_there(2, n)
        out = cache.attend(*batch.more(keep, dtype), scale=paper.scale)
        assert_same(out, batch.wanted(paper, keep), eager(paper, batch, n, dtype))


def eager(paper: Paper, batch: Batch, n: int, dtype: torch.dtype) -> Tensor:
    """What a plain program in this dtype makes of it: keys and queries rotated and rounded, softmax in fp32."""
    rows = [[tuple(x.to(dtype) for x in token) for token in row] for row in batch.rows]
    outs = [torch.stack(InDtype(paper, dtype).outputs(row)[-n:], dim=1) for row in rows]
    return torch.stack(outs).to(dtype)


class InDtype(Paper):
    def __init__(self, paper: Paper, dtype: torch.dtype) -> None:
        super().__init__(paper.sinks, paper.most, paper.rotary, paper.slopes, paper.scale)
        object.__setattr__(self, "dtype", dtype)

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        return super().turned(x.double(), places).to(self.dtype)


# ---- the rest of the interface ----


def test_memory_is_flat_and_stays_where_it_is() -> None:
    cache, _ = pair(4, 16, **POSITIONS["halves"])
    batch = Batch(rows=[[], []])
    cache.attend(*batch.more(all_there(2, 3)))
    before = addresses(cache)
    for n in (50, 1, 1, 200, 1):
        cache.attend(*batch.more(all_there(2, n)))
    cache.reorder(torch.tensor([1, 0]))
    cache.crop(1)
    cache.reset()
    assert addresses(cache) == before


def addresses(cache: StreamingCache) -> list[tuple[int, int]]:
    tensors = [getattr(cache.layers[0], name) for name in FIELDS]
    return [(x.data_ptr(), x.numel()) for x in tensors]


def test_keys_are_written_once() -> None:
    """The bits of a key stay as long as it is kept: nothing is rotated again."""
    cache, _ = pair(2, 8, **POSITIONS["halves"])
    batch = Batch(rows=[[]])
    cache.attend(*batch.more(all_there(1, 10)))
    sinks = cache.layers[0].keys[:, :, :2].clone()
    newest = cache.layers[0].keys[:, :, 9].clone()
    for _ in range(7):
        cache.attend(*batch.more(all_there(1, 1)))
    assert torch.equal(cache.layers[0].keys[:, :, :2], sinks)
    assert torch.equal(cache.layers[0].keys[:, :, 9], newest)


def test_a_saved_cache_is_numbers_and_tensors_and_stays_as_it_was() -> None:
    cache, paper = pair(2, 4, **POSITIONS["halves"])
    batch = Batch(rows=[[]])
    check_call(cache, paper, batch, all_there(1, 9))
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    check_call(cache, paper, Batch(rows=[list(batch.rows[0])]), all_there(1, 3))
    file.seek(0)
    other = pair(2, 4, **POSITIONS["halves"])[0]
    other.load_state_dict(torch.load(file, weights_only=True))
    check_call(other, paper, batch, all_there(1, 3))
    with pytest.raises(OptionError, match="wanted the same"):
        pair(2, 5)[0].load_state_dict(cache.state_dict())


@pytest.mark.parametrize("calls", [(1, 2, 1), (2, 1, 2), (3, 3)])
def test_a_stale_nan_does_not_come_back(calls: tuple[int, ...]) -> None:
    cache, paper = pair(4, 2, **POSITIONS["none"])
    batch = Batch(rows=[[]])
    q, k, v = batch.more(all_there(1, 5))
    cache.attend(q, k * torch.nan, v * torch.nan, scale=paper.scale)
    cache.crop(5)
    batch.rows = [[]]
    for n in calls:
        check_call(cache, paper, batch, all_there(1, n))


def test_a_batch_can_be_taken_apart() -> None:
    cache, paper = pair(2, 4, **POSITIONS["halves"])
    batch = Batch(rows=[[], [], []])
    check_call(cache, paper, batch, torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]]).bool())
    cache.reorder(torch.tensor([2, 0]))
    batch.rows = [batch.rows[2], batch.rows[0]]
    check_call(cache, paper, batch, all_there(2, 1))


def test_a_padded_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches_ring, "PIECE", 8)
    cache, paper = pair(3, 2, **POSITIONS["neighbours"])
    batch = Batch(rows=[[], []])
    keep = all_there(2, 50)
    keep[0, :21] = False
    check_call(cache, paper, batch, keep)
    check_call(cache, paper, batch, all_there(2, 1))


def test_layers_are_apart() -> None:
    cache, paper = pair(2, 4, **POSITIONS["halves"])
    first, second = Batch(rows=[[]]), Batch(rows=[[]])
    for n in (3, 1, 1, 6):
        for layer, batch in enumerate((first, second)):
            q, k, v = batch.more(all_there(1, n))
            out = cache.attend(q, k, v, layer=layer, scale=paper.scale)
            assert torch.allclose(out, batch.wanted(paper, all_there(1, n)), atol=1e-11)


def test_no_token_changes_nothing() -> None:
    cache, _ = pair(2, 4)
    q, k, v = Batch(rows=[[]]).more(all_there(1, 0))
    assert cache.attend(q, k, v).shape == (1, 4, 0, 6)
    assert cache.lengths().tolist() == [0]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"sinks": -1}, "sinks=-1"),
        ({"window": 0}, "sees itself"),
        ({"window": -1, "counting": "beside"}, "sees itself"),
        ({"counting": "around"}, "'within' or 'beside'"),
        ({"rollback": -1}, "rollback=-1"),
        ({"rotary": Rotary.of(8), "slopes": SLOPES}, "one kind of positions"),
    ],
)
def test_numbers_that_cannot_be(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        StreamingCache(**kwargs)


def test_tensors_that_do_not_fit() -> None:
    cache, _ = pair(2, 4)
    q, k, v = Batch(rows=[[], []]).more(all_there(2, 3))
    for arguments, keep, match in (
        ((q[:, :, :1], k, v), None, "1 queries and 3 keys"),
        ((q, k, v), torch.ones(2, 3), "keep is torch.float32"),
        ((q, k, v), all_there(2, 4), "keep is"),
    ):
        with pytest.raises(ShapeError, match=match):
            cache.attend(*arguments, keep=keep)
    cache.attend(q, k, v)
    with pytest.raises(ShapeError, match="the cache holds"):
        cache.attend(q[:1], k[:1], v[:1])
    with pytest.raises(ShapeError, match="layer 7 has taken in nothing"):
        cache.lengths(7)
    with pytest.raises(ShapeError, match="slopes is"):
        StreamingCache(slopes=SLOPES[:2]).attend(q, k, v)
    with pytest.raises(ShapeError, match="rotated features"):
        StreamingCache(rotary=Rotary.of(16)).attend(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_a_stream_on_the_gpu_is_as_good_as_eager(positions: str, dtype: torch.dtype) -> None:
    cache, paper = pair(4, 20, **POSITIONS[positions])
    batch = Batch(rows=[[], []])
    for n in (30, 1, 1, 25, 1):
        keep = all_there(2, n)
        out = cache.attend(*(x.cuda() for x in batch.more(keep, dtype)), scale=paper.scale)
        assert_same(out.cpu(), batch.wanted(paper, keep), eager(paper, batch, n, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("positions", sorted(POSITIONS))
def test_a_captured_step_goes_on_through_the_text(positions: str) -> None:
    cache, paper = pair(4, 9, **POSITIONS[positions])
    batch, one = Batch(rows=[[], []]), all_there(2, 1)
    cache.attend(*(x.cuda() for x in batch.more(all_there(2, 7), torch.float32)), scale=paper.scale)
    given_ones = [x.cuda() for x in batch.more(one, torch.float32)]
    cache.attend(*given_ones, scale=paper.scale)
    torch.cuda.synchronize()
    before = cache.state_dict()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cache.attend(*given_ones, scale=paper.scale)
    assert torch.equal(cache.lengths(), before["layers"][0]["seen"])  # capturing runs nothing
    for _ in range(25):
        for old, new in zip(given_ones, batch.more(one, torch.float32), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.allclose(out.double().cpu(), batch.wanted(paper, one), atol=1e-5)


def test_gradients_are_refused() -> None:
    q, k, v = Batch(rows=[[]]).more(all_there(1, 3))
    with pytest.raises(UnsupportedError, match="no_grad"):
        pair(2, 4)[0].attend(q.requires_grad_(), k, v)
