"""The decoding kernel of the ring: interpreted on the CPU, compiled where a GPU is. Same laws, other sizes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor

from attnopt.caches import Rotary, StreamingCache
from attnopt.kernels.streaming.ring import Span, Step, decode_in_torch
from attnopt.kernels.streaming.triton_decode import PROCESSORS, Tiles, _sizes_of_join, choose_tiles, launch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
SMALL = Tiles(16, 16, stages=1)
TENSORS = ("near", "far", "keys", "values")


def a_step(
    span: Span,
    newest: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    dv: int = 16,
    alibi: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Random operands; what no query may see is NaN."""
    b = len(newest)
    near, far = (torch.randn(b, heads, d).to(dtype) for _ in range(2))
    keys, values = (torch.randn(b, kv_heads, span.slots, size).to(dtype) for size in (d, dv))
    t = torch.tensor(newest)
    held = span.held(t)
    hidden = (held < 0) | (held > t[:, None])
    hidden[:, span.sinks :] |= held[:, span.sinks :] <= t[:, None] - span.window
    for x in (keys, values):
        x.masked_fill_(hidden[:, None, :, None], torch.nan)
    slopes = 2.0 ** -torch.arange(1.0, heads + 1) if alibi else None
    return Step(near, far, keys, values, t, span, d**-0.5, slopes)


def to(step: Step, *, dtype: torch.dtype | None = None, device: str | None = None) -> Step:
    tensors = {name: getattr(step, name).to(device=device, dtype=dtype) for name in TENSORS}
    slopes = None if step.slopes is None else step.slopes.to(device=device)
    return replace(step, **tensors, slopes=slopes, newest=step.newest.to(device))


def tickets_of(step: Step) -> Tensor:
    return torch.zeros(step.keys.shape[0] * step.keys.shape[1], dtype=torch.int32, device=DEVICE)


def run(step: Step, tiles: Tiles | None = SMALL) -> Tensor:
    tickets = tickets_of(step)
    out = launch(to(replace(step, tickets=tickets), device=DEVICE), tiles).cpu()
    assert not tickets.any()
    return out


def eager(step: Step) -> Tensor:
    """What one softmax in the step's own dtype loses: scores and weights rounded, as plain programs do."""
    span, t = step.span, step.newest
    held, group = span.held(t), step.near.shape[1] // step.keys.shape[1]
    seen = (held >= 0) & (held <= t[:, None])
    seen[:, span.sinks :] &= held[:, span.sinks :] > t[:, None] - span.window
    k, v = (x.nan_to_num().repeat_interleave(group, 1) for x in (step.keys, step.values))
    scores = torch.cat(
        [step.far[:, :, None] @ k[:, :, : span.sinks].mT, step.near[:, :, None] @ k[:, :, span.sinks :].mT],
        -1,
    )
    scores = scores * step.scale
    if step.slopes is not None:
        away = torch.cat(
            [span.place(t)[:, None] - held[:, : span.sinks], t[:, None] - held[:, span.sinks :]], 1
        )
        scores = scores - (step.slopes[:, None, None] * away[:, None, None]).to(scores.dtype)
    weights = torch.softmax(scores.masked_fill(~seen[:, None, None], -torch.inf), -1)
    return (weights.nan_to_num() @ v)[:, :, 0]


def check(step: Step, tiles: Tiles | None = SMALL) -> None:
    assert_same(run(step, tiles), decode_in_torch(to(step, dtype=torch.float64)), eager(step))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(
    "span", [Span(4, 40), Span(0, 33), Span(3, 40, 5), Span(20, 17), Span(1, 1)], ids=str
)
def test_every_row_is_as_good_as_eager(span: Span, alibi: bool, dtype: torch.dtype) -> None:
    check(a_step(span, [0, 2, 5, 41, 1000], alibi=alibi, dtype=dtype))


@settings(max_examples=40 if ON_GPU else 12)
@given(
    st.integers(0, 5),
    st.integers(1, 40),
    st.integers(0, 3),
    st.lists(st.integers(-1, 120), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)]),
    st.sampled_from([(16, 16), (24, 40), (8, 3)]),
)
def test_any_sizes_and_lengths(
    sinks: int,
    window: int,
    spare: int,
    newest: list[int],
    heads: tuple[int, int],
    widths: tuple[int, int],
) -> None:
    d, dv = widths
    check(a_step(Span(sinks, window, spare), newest, heads=heads[0], kv_heads=heads[1], d=d, dv=dv))


@pytest.mark.parametrize("tiles", [Tiles(16, 64, stages=1), Tiles(64, 64, stages=1), None], ids=str)
def test_any_parts_give_the_same(tiles: Tiles | None) -> None:
    step = a_step(Span(4, 60, 2), [3, 30, 90], alibi=True)
    assert torch.allclose(run(step, tiles), run(step), atol=1e-6)


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_launch_of_its_own_joins_to_the_same_bits(sinks: int) -> None:
    step = a_step(Span(sinks, 60, 2), [3, 30, 90])
    assert torch.equal(launch(to(step, device=DEVICE), SMALL).cpu(), run(step))


@pytest.mark.parametrize("sinks", [0, 2])
def test_parts_of_many_heads_are_joined_in_pieces(sinks: int) -> None:
    """More parts than one piece of a join takes, and more heads than rows of the smallest product."""
    step = a_step(Span(sinks, 300), [310, 40], heads=36, kv_heads=2, d=16, dv=40, alibi=True)
    assert _sizes_of_join(18, 40, 19)["PARTS_PAD"] < 19
    check(step)


def test_one_query_may_serve_both() -> None:
    step = a_step(Span(5, 40), [60, 3], alibi=True)
    check(replace(step, far=step.near))


def test_tokens_are_counted_where_there_is_a_query() -> None:
    step = to(a_step(Span(2, 20), [30, -1, 0]), device=DEVICE)
    for seen in (torch.tensor([30, 8, 0], device=DEVICE), torch.tensor([30, 8, 0], device=DEVICE)):
        launch(replace(step, seen=seen), SMALL)
        assert seen.tolist() == [31, 8, 1]


@pytest.mark.parametrize("newest", [2**24 + 1, 2**31 + 5, 2**45])
def test_lengths_beyond_32_bits(newest: int) -> None:
    check(a_step(Span(4, 21), [newest, 7]))


def test_a_sequence_without_a_query_returns_zeros() -> None:
    out = run(a_step(Span(4, 21), [-1, 9]))
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert not torch.equal(out[1], torch.zeros_like(out[1]))


def test_a_visible_nan_is_seen() -> None:
    step = a_step(Span(2, 20), [30])
    step.keys[0, 1, step.span.slot(torch.tensor(25))] = torch.nan
    assert torch.isnan(run(step)).any(-1).tolist() == [[False, False, True, True]]


def test_layout_changes_nothing() -> None:
    step = a_step(Span(2, 20), [30, 4])
    odd = replace(step, **{name: getattr(step, name).mT.contiguous().mT for name in TENSORS})
    assert torch.allclose(run(odd), run(step), atol=1e-6)


def test_it_gives_the_same_bits_each_time_and_writes_to_no_input() -> None:
    step = to(a_step(Span(4, 60), [100, 20]), device=DEVICE)
    before = [getattr(step, name).clone() for name in TENSORS]
    first, step = launch(step, SMALL), replace(step, tickets=tickets_of(step))
    assert all(torch.equal(launch(step, SMALL), first) for _ in range(200 if ON_GPU else 1))
    assert all(
        torch.equal(x.nan_to_num(), getattr(step, name).nan_to_num())
        for x, name in zip(before, TENSORS, strict=True)
    )


def test_parts_fill_the_gpu_and_are_no_longer_than_the_ring() -> None:
    for b, window in ((1, 1020), (8, 1020), (37, 1020), (64, 1020), (1, 100_000), (1, 3)):
        step = a_step(Span(4, window), [5] * b, heads=8, kv_heads=8, d=16)
        tiles = choose_tiles(step)
        programs, most = 8 * b * -(-step.span.slots // tiles.part), -(-step.span.slots // tiles.block)
        assert tiles.part % tiles.block == 0
        assert tiles.part < window + 4 + tiles.block
        rounds = -(-programs // PROCESSORS)
        assert programs >= min(0.8 * rounds * PROCESSORS, 8 * b * most)


@pytest.mark.gpu
def test_a_captured_stream_is_the_plain_one() -> None:
    """Launches that are set up early still read what the launches before them wrote."""
    rotary, out = Rotary.of(64, 10_000.0), []
    tokens = [tuple(torch.randn(8, h, 1, 64, device=DEVICE) for h in (8, 2, 2)) for _ in range(30)]
    for graphed in (False, True):
        cache, given = StreamingCache(sinks=4, window=300, rotary=rotary), [x.clone() for x in tokens[0]]

        def step(cache: StreamingCache = cache, given: list[Tensor] = given) -> Tensor:
            x = given
            for layer in range(4):
                x = [cache.attend(*x, layer=layer), *x[1:]]
            return x[0]

        step()
        cache.reset()
        run_once = replayed(step) if graphed else step
        cache.reset()
        out.append([_with(run_once, given, token).clone() for token in tokens])
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


def replayed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = step()
    return lambda: (graph.replay(), filled)[1]


def _with(step: Callable[[], Tensor], given: list[Tensor], token: tuple[Tensor, ...]) -> Tensor:
    for here, x in zip(given, token, strict=True):
        here.copy_(x)
    return step()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (9, 3), (64, 2)])
def test_real_sizes_are_as_good_as_eager(heads: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    newest = [3, 700, 5000, 2**24 + 3]
    check(a_step(Span(4, 1020), newest, heads=heads[0], kv_heads=heads[1], d=d, dv=d, dtype=dtype), None)
