"""Streaming attention by places: the definition, the cache token by token, gradients, and what cannot be."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor, nn

from attnopt.caches import Rotary, StreamingCache
from attnopt.errors import ShapeError
from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.kernels.streaming.kernel import KERNEL
from attnopt.kernels.streaming.places import Placed, attend_in_places, streaming_attention
from attnopt.mask import BOTTOM_RIGHT, Causal, First, KeyPadding, Length, Window
from attnopt.spec import Alibi, AttentionSpec, EmptyRow, Heads, Stream

FREE = {"alibi": {"alibi": Alibi(BOTTOM_RIGHT)}, "softcap": {"softcap": 3.0}, "sinks": {"sink_logits": True}}


def spec(
    sinks: int, window: int, offset: Length = BOTTOM_RIGHT, *, turned: bool = True, **rest: Any
) -> AttentionSpec:
    mask = Causal(offset) & (First(sinks) | Window(window, offset))
    return AttentionSpec("softmax", 0.3, Heads(2), mask, stream=Stream(sinks, window, offset, turned), **rest)


def operands(of: AttentionSpec, sq: int, sk: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(sq + 100 * sk)
    shapes = {
        "q": (2, 4, sq, 8), "far": (2, 4, sq, 8), "k": (2, 2, sk, 8), "v": (2, 2, sk, 6), "slopes": (4,),
        "sink_logits": (4,), "bias": (1, 4, sq, sk),
    }  # fmt: skip
    made = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: made[name].to(dtype) for name in of.operand_names() if name in made}


@pytest.mark.parametrize("kind", ["plain", *FREE])
@pytest.mark.parametrize("lengths", [(1, 1), (3, 3), (9, 9), (30, 30), (1, 30), (7, 30), (11, 12)], ids=str)
@pytest.mark.parametrize(("sinks", "window"), [(0, 4), (1, 1), (2, 5), (4, 40)])
def test_it_means_what_the_reference_means(
    kind: str, lengths: tuple[int, int], sinks: int, window: int
) -> None:
    of = spec(sinks, window, **FREE.get(kind, {}))
    given = operands(of, *lengths)
    assert_same(KERNEL.run(of, given), REFERENCE.run(of, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", *FREE])
def test_it_rounds_no_more_than_the_definition(kind: str, dtype: torch.dtype) -> None:
    of = spec(2, 5, **FREE.get(kind, {}))
    given = operands(of, 40, 40, dtype)
    exact = REFERENCE.run(of, {name: x.double() for name, x in given.items()})
    assert_same(KERNEL.run(of, given), exact, REFERENCE.run(of, given))


@pytest.mark.parametrize("kind", ["plain", *FREE])
@pytest.mark.parametrize("lengths", [(4, 4), (25, 25), (3, 25)], ids=str)
def test_gradients_are_those_of_the_definition(kind: str, lengths: tuple[int, int]) -> None:
    of = spec(2, 5, **FREE.get(kind, {}))
    found = [gradients(run, of, operands(of, *lengths)) for run in (KERNEL.run, REFERENCE.run)]
    for name in found[1]:
        scale = float(found[1][name].abs().max()) + 1e-30
        assert float((found[0][name] - found[1][name]).abs().max()) <= 1e-10 * scale, name


def gradients(run: Any, of: AttentionSpec, given: dict[str, Tensor]) -> dict[str, Tensor]:
    held = {name: x.requires_grad_() for name, x in given.items()}
    run(of, held).sin().sum().backward()
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in held.items()}


@pytest.mark.parametrize("past", [0, 1, 13])
@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_it_equals_the_cache_token_by_token(past: int, pairs: Any) -> None:
    """Keys turned once, at their true position, and a second query for the sinks: what StreamingCache does."""
    sinks, window, n = 3, 6, 31
    rotary = Rotary.of(8, pairs=pairs)
    q, k, v = (torch.randn(2, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2))
    cache = StreamingCache(sinks=sinks, window=window, rotary=rotary)
    steps = [cache.attend(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(n)]
    t = torch.arange(past, n)[None]
    near, far = (rotary.turned(q[:, :, past:], at) for at in (t, t.clamp(max=sinks + window - 1)))
    turned = rotary.turned(k, torch.arange(n)[None])
    got = attend_in_places(Placed(near, far, turned, v, 8**-0.5, past, sinks, window))
    assert_same(got, torch.cat(steps, 2)[:, :, past:])


def test_distances_of_alibi_to_sinks_stop_growing() -> None:
    """Far from the start a query sees its sinks as near as ever: the weights do not change with the position."""
    q, k, v = (torch.ones(1, 2, n, 4, dtype=torch.float64) for n in (1, 5000, 5000))
    v[:, :, :2] = 0.0
    given = Placed(q, q, k, v, 0.5, 4999, 2, 6, slopes=torch.tensor([[0.3, 0.01]], dtype=torch.float64))
    near = replace(given, k=k[:, :, :8], v=v[:, :, :8], offset=7)
    assert torch.allclose(attend_in_places(given), attend_in_places(near), atol=1e-12)


#: Which of 24 keys count, by the row: on the left, on the right, all, none, in between, and two in three.
PADDINGS = torch.ones(7, 24, dtype=torch.bool)
PADDINGS[0, :9], PADDINGS[1, 17:], PADDINGS[3], PADDINGS[4, 8:15] = False, False, False, False
PADDINGS[5, ::3], PADDINGS[6, :22] = False, False


@pytest.mark.parametrize("kind", ["plain", *FREE])
@pytest.mark.parametrize("sq", [24, 7, 1])
@pytest.mark.parametrize(("sinks", "window"), [(0, 4), (1, 1), (2, 5), (4, 40)])
def test_a_padded_row_is_the_row_alone(kind: str, sq: int, sinks: int, window: int) -> None:
    """Each row is run without its padding; queries that are padding themselves mean nothing."""
    of = spec(sinks, window, **FREE.get(kind, {}))
    given = batch_of(operands(of, sq, 24), len(PADDINGS))
    padded = KERNEL.run(with_padding(of), {**given, "padding": PADDINGS})
    for row, keep in enumerate(PADDINGS):
        own = keep[24 - sq :]
        if not own.any():
            continue
        alone = {name: x[row : row + 1] if x.dim() == 4 else x for name, x in given.items()}
        alone |= {name: alone[name][:, :, own] for name in ("q", "far")}
        alone |= {name: alone[name][:, :, keep] for name in ("k", "v")}
        assert_same(padded[row : row + 1, :, own], KERNEL.run(of, alone))


@pytest.mark.parametrize("kind", ["plain", "bias", *FREE])
@pytest.mark.parametrize("sq", [24, 7, 1])
def test_a_padded_batch_means_what_the_reference_means(kind: str, sq: int) -> None:
    """With gradients, where the query's own key counts."""
    of = with_padding(spec(2, 5, **FREE.get(kind, {"bias": ("bias",)} if kind == "bias" else {})))
    given = batch_of(operands(of, sq, 24), len(PADDINGS))
    held = [{name: x.clone().requires_grad_() for name, x in given.items()} for _ in range(2)]
    own = PADDINGS[:, None, 24 - sq :, None]
    outs = [
        run(of, {**x, "padding": PADDINGS}) * own
        for run, x in zip((KERNEL.run, REFERENCE.run), held, strict=True)
    ]
    assert_same(*outs)
    for out in outs:
        out.sin().sum().backward()
    for name in given:
        torch.testing.assert_close(held[0][name].grad, held[1][name].grad, rtol=1e-9, atol=1e-11)


def with_padding(of: AttentionSpec) -> AttentionSpec:
    assert of.stream is not None
    mask = Causal(of.stream.offset) & KeyPadding("padding")
    return replace(of, mask=mask, stream=replace(of.stream, kept="padding"), empty_row=EmptyRow.ZERO)


def batch_of(given: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The same with more rows, all different."""
    draw = torch.Generator().manual_seed(rows)
    shapes = {
        name: (rows, *x.shape[1:]) if name in ("q", "far", "k", "v") else x.shape for name, x in given.items()
    }
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


@drawn(
    keep=st.integers(1, 12).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1)),
    sq=st.integers(1, 12), sinks=st.integers(0, 4), window=st.integers(1, 6), slack=st.integers(0, 2),
)  # fmt: skip
def test_any_padding_means_what_the_reference_means(
    keep: list[list[bool]], sq: int, sinks: int, window: int, slack: int
) -> None:
    """slack: how many keys lie behind the last query's own, which nobody sees."""
    kept = torch.tensor(keep)
    sk = kept.shape[1]
    sq, slack = min(sq, sk), min(slack, sk - min(sq, sk))
    of = with_padding(spec(sinks, window, Length(sk - sq - slack)))
    given = {**batch_of(operands(of, sq, sk), len(kept)), "padding": kept}
    own = kept[:, sk - sq - slack : sk - slack, None][:, None]
    assert_same(KERNEL.run(of, given) * own, REFERENCE.run(of, given) * own)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sq", [200, 33, 1])
def test_a_padded_batch_on_a_gpu_rounds_no_more_than_the_definition(dtype: torch.dtype, sq: int) -> None:
    of = with_padding(spec(4, 60))
    given = {name: x.to("cuda", dtype) for name, x in batch_of(operands(of, sq, 200), 3).items()}
    keep = torch.ones(3, 200, dtype=torch.bool, device="cuda")
    keep[0, :90], keep[1, 170:199], keep[2, 50:110] = False, False, False
    exact = REFERENCE.run(of, {name: x.double() for name, x in given.items()} | {"padding": keep})
    eager = REFERENCE.run(of, {**given, "padding": keep})
    own = keep[:, None, 200 - sq :, None]
    assert_same(KERNEL.run(of, {**given, "padding": keep}) * own, exact * own, eager * own)


def test_padding_may_differ_where_lengths_are_symbols() -> None:
    """One program for any length: nothing is guarded on."""

    def run(q: Tensor, far: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend_in_places(Placed(q, far, k, v, 0.3, k.shape[2] - q.shape[2], 2, 5, kept=keep))

    of = with_padding(spec(2, 5))
    short, long = ({**batch_of(operands(of, n, n), 7), "padding": PADDINGS[:, :n]} for n in (9, 24))
    dims = {2: torch.export.Dim("n", min=2, max=64)}
    shapes = dict.fromkeys(("q", "far", "k", "v"), dims) | {"keep": {1: dims[2]}}
    module = nn.Module()
    module.forward = run
    order = ("q", "far", "k", "v", "padding")
    program = torch.export.export(module, tuple(long[n] for n in order), dynamic_shapes=shapes).module()
    for given in (short, long):
        keep = given["padding"]
        want = REFERENCE.run(of, given)
        assert_same(
            program(*(given[n] for n in order)) * keep[:, None, :, None], want * keep[:, None, :, None]
        )


def test_no_nan_comes_back_from_queries_that_see_nothing() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keep = torch.tensor([[False, False, False, True, True, True]])
    attend_in_places(Placed(q, q, k, v, 1.0, 0, 2, 3, kept=keep)).sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in (q, k, v) if x.grad is not None)


def test_a_second_query_of_another_form_is_refused() -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    with pytest.raises(ShapeError, match="far is"):
        attend_in_places(Placed(q, q[:, :1], k, k, 1.0, 0, 1, 2))


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.1, 0.02, 0.3])], ids=["rotated", "alibi"])
def test_the_public_call_takes_the_second_query(slopes: Tensor | None) -> None:
    q, far = (torch.randn(2, 4, 9, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, 30, 8, dtype=torch.float64) for _ in range(2))
    positions = {} if slopes is None else {"alibi": Alibi(BOTTOM_RIGHT)}
    given = {"q": q, "far": far, "k": k, "v": v, "slopes": slopes}
    got = streaming_attention(q, k, v, sinks=2, window=5, scale=0.3, slopes=slopes, far=far)
    assert_same(
        got, REFERENCE.run(spec(2, 5, **positions), {n: x for n, x in given.items() if x is not None})
    )
