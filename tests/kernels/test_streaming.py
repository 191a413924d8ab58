"""Structured softmax attention in plain torch and the op around it: the masks, the numbers, the laws."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same
from streaming_cases import (
    LAYOUTS,
    LOWEST,
    VALUES,
    Call,
    Structure,
    call,
    calls,
    differentiable,
    eager_gradients,
    laid_out,
    plain_gradients,
    structures,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from attnopt.errors import AttnoptError, OptionError, ShapeError, UnsupportedError
from attnopt.kernels.streaming import chunked
from attnopt.kernels.streaming.op import attend
from attnopt.kernels.streaming.places import streaming_attention
from attnopt.kernels.streaming.problem import Wanted
from attnopt.kernels.streaming.reach import Reach

STREAM = Structure(offset=0, window=9, sinks=2)
STRUCTURES = [
    Structure(),
    Structure(offset=0),
    Structure(offset=-2),
    Structure(offset=3),
    Structure(offset=0, prefix=3),
    Structure(offset=0, window=1),
    Structure(offset=0, window=3),
    Structure(offset=0, window=3, sinks=2),
    Structure(offset=2, window=4, sinks=1),
    Structure(offset=-3, window=2, sinks=4),
    Structure(offset=1, window=0, sinks=2),
    Structure(offset=0, window=-5),
    Structure(offset=0, window=2, sinks=1, prefix=2),
    Structure(offset=10**9, window=10**9 + 2, sinks=10**9),
    Structure(offset=-(10**9), window=3, prefix=1),
]


def run(c: Call) -> Tensor:
    return attend(*c.arguments)[0]


def gradients(c: Call, do: Tensor) -> list[Tensor]:
    c, leaves = differentiable(c)
    return list(torch.autograd.grad(run(c), leaves, do))


def assert_close(got: Tensor, want: Tensor) -> None:
    """fp64 against fp64: only the last digits may differ."""
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    got, want = torch.nan_to_num(got), torch.nan_to_num(want)
    worst = (got - want).abs().max() if got.numel() else 0.0
    assert worst <= 1e-11 * max(1.0, float(want.abs().max()) if want.numel() else 1.0)


# ---- which keys are seen ----


@given(structures(reach=9), st.integers(0, 8), st.integers(0, 8), st.integers(1, 9))
def test_sections_and_edges_cover_what_a_block_sees(s: Structure, sq: int, sk: int, block: int) -> None:
    where = call(sq=sq, sk=sk, structure=s).problem.reach
    dense = s.dense(sq, sk)
    assert torch.equal(where.tile((0, sq), (0, sk), torch.device("cpu")), dense)
    for first in range(0, sq, block):
        rows = (first, min(first + block, sq))
        partly, seen = covered(where, rows, dense[slice(*rows)])
        assert not dense[slice(*rows)][:, ~seen].any()
        assert dense[slice(*rows)][:, seen & ~partly].all()


def covered(where: Reach, rows: tuple[int, int], dense: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that lie in an edge, and columns that lie in a section; no section overlaps another."""
    edge, section = (torch.zeros(dense.shape[1], dtype=torch.int) for _ in range(2))
    for span in where.sections(rows):
        assert 0 <= span[0] < span[1] <= dense.shape[1]
        section[slice(*span)] += 1
        for part in where.edges(rows, span):
            edge[slice(*part)] += 1
    assert (section <= 1).all()
    return edge > 0, section > 0


@given(structures(reach=9), st.integers(1, 8), st.integers(1, 8))
def test_reach_counts_pairs_and_knows_where_rows_are_empty(s: Structure, sq: int, sk: int) -> None:
    where, dense = call(sq=sq, sk=sk, structure=s).problem.reach, s.dense(sq, sk)
    assert where.pairs() == int(dense.sum())
    assert where.may_leave_a_row_empty() or dense.any(1).all()


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_tracer_every_short_length_shows_the_mask_bit_for_bit(structure: Structure, padded: bool) -> None:
    for sq, sk in product(range(10), range(1, 10)):
        keep = (torch.arange(sk) * 7 % 3 != 1)[None].expand(2, sk) if padded else None
        c = Call(
            torch.zeros(2, 2, sq, 3),
            torch.randn(2, 1, sk, 3),
            torch.eye(sk).expand(2, 1, sk, sk),
            key_padding=keep,
            structure=structure,
            empty_row="zero",
        )
        want = c.visible().expand(2, 2, sq, sk)
        assert torch.equal(torch.round(run(c) * want.sum(-1, keepdim=True)), want.float()), (sq, sk)


def test_tracer_every_query_head_reads_its_own_kv_head() -> None:
    v = torch.arange(3.0)[None, :, None, None].expand(1, 3, 5, 2)
    c = Call(torch.zeros(1, 6, 5, 4), torch.randn(1, 3, 5, 4), v, structure=STREAM)
    assert torch.equal(run(c)[0, :, 0, 0], torch.tensor([0.0, 0, 1, 1, 2, 2]))


# ---- the numbers ----


@given(calls())
def test_forward_is_the_definition_in_double(c: Call) -> None:
    c = c.to(torch.float64)
    assert_close(run(c), c.plain())


@given(calls(longest=30))
def test_backward_is_the_gradient_of_the_definition_in_double(c: Call) -> None:
    c = c.to(torch.float64)
    do = torch.randn(*c.q.shape[:3], c.v.shape[3], dtype=torch.float64)
    for got, want in zip(gradients(c, do), plain_gradients(c, do), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("structure", [Structure(), Structure(offset=5), STREAM], ids=str)
def test_rows_are_as_good_as_eager(structure: Structure, kind: str, dtype: torch.dtype) -> None:
    c = call(sq=67, sk=72, d=24, group=2, kind=kind, structure=structure).to(dtype)
    assert_same(run(c), c.to(torch.float64).plain(), c.plain())


@pytest.mark.parametrize("scale", [0.0, -1.0, 24**-0.5, 1.0, 8.0])
def test_rows_are_as_good_as_eager_at_any_scale(scale: float) -> None:
    c = call(sq=67, sk=67, d=24, structure=STREAM, scale=scale)
    assert_same(run(c), c.to(torch.float64).plain(), c.plain())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", ["none", "bias", "mask", "padding", "sinks", "softcap"])
def test_gradients_are_as_good_as_eager(extra: str, dtype: torch.dtype) -> None:
    c = call(
        sq=70, sk=70, d=24, dv=32, group=2, structure=STREAM, extras=frozenset({extra}), empty_row="zero"
    )
    c = c.to(dtype)
    do = torch.randn(2, 4, 70, 32).to(dtype)
    exact = plain_gradients(c.to(torch.float64), do.double())
    for got, want, eager in zip(gradients(c, do), exact, eager_gradients(c, do, exact), strict=True):
        assert got.dtype == dtype
        assert_same(got, want, eager, factor=3.0, what="gradient")


def test_lse_is_the_logarithm_of_the_sum_and_has_a_gradient() -> None:
    c, leaves = differentiable(
        call(sq=20, sk=20, structure=STREAM, extras=frozenset({"sinks"})).to(torch.float64)
    )
    _, lse, log_sum = attend(*c.arguments)
    scores = (c.q @ c.k.mT * c.scale).masked_fill(~c.visible(), -torch.inf)
    z = c.sink_logits[None, :, None, None].expand(2, 2, 20, 1)
    want = torch.cat([scores, z], -1).logsumexp(-1)
    assert_close(lse.detach(), want.detach())
    assert_close((lse - log_sum).detach(), torch.cat([scores, z], -1).amax(-1).detach())
    up = torch.randn_like(lse)
    pairs = [torch.autograd.grad(x, leaves, up, allow_unused=True) for x in (lse, want)]
    for got, expected in zip(*pairs, strict=True):
        assert_close(got, torch.zeros_like(got) if expected is None else expected)


# ---- rows that see no key ----


@pytest.mark.parametrize("extra", ["padding", "mask", "-inf", "structure"])
@pytest.mark.parametrize("meaning", ["nan", "zero", "uniform"])
def test_empty_rows_return_what_they_mean(meaning: str, extra: str) -> None:
    structure = Structure(offset=-4, window=6) if extra == "structure" else Structure(offset=0)
    c = call(sq=30, sk=30, group=2, structure=structure, extras=frozenset({extra}), empty_row=meaning)
    if extra == "padding":
        c = replace(c, key_padding=torch.arange(30)[None].expand(2, 30) > 8)
    c = c.to(torch.float64)
    blind = ~torch.isfinite((c.bias if extra == "-inf" else torch.zeros(())) + torch.zeros(2, 4, 30, 30))
    blind = (blind | ~c.visible()).all(-1)
    assert blind.any()
    mean = c.v.mean(2).repeat_interleave(2, dim=1)[:, :, None].expand(2, 4, 30, 16)
    want = {"nan": torch.full_like(mean, torch.nan), "zero": torch.zeros_like(mean), "uniform": mean}[meaning]
    assert_close(run(c)[blind], want[blind])


def test_the_mean_of_an_empty_row_passes_its_gradient_to_all_values() -> None:
    structure = Structure(offset=-4, window=6)
    c = call(sq=30, sk=30, group=2, structure=structure, empty_row="uniform").to(torch.float64)
    do = torch.randn(2, 4, 30, 16, dtype=torch.float64)
    for got, want in zip(gradients(c, do), plain_gradients(c, do), strict=True):
        assert_close(got, want)
    alone = torch.where(torch.arange(30)[:, None] < 4, do, 0.0)
    share = alone.sum(2).unflatten(1, (2, 2)).sum(2) / 30
    assert_close(gradients(c, alone)[2], share[:, :, None].expand(2, 2, 30, 16))


@pytest.mark.parametrize("meaning", ["nan", "zero", "uniform"])
def test_whatever_arrives_at_empty_rows_spoils_no_gradient(meaning: str) -> None:
    c = call(sq=20, sk=20, structure=Structure(offset=-6), empty_row=meaning).to(torch.float64)
    do = torch.randn(2, 2, 20, 16, dtype=torch.float64)
    clean = gradients(c, torch.where(torch.arange(20)[:, None] < 6, 0.0, do))
    spoilt = gradients(c, torch.where(torch.arange(20)[:, None] < 6, torch.nan, do))
    which = slice(0, 2) if meaning == "uniform" else slice(0, 3)
    for got, want in zip(spoilt[which], clean[which], strict=True):
        assert torch.equal(got, want)
    assert torch.isnan(spoilt[2]).any() == (meaning == "uniform")


@pytest.mark.parametrize("meaning", ["nan", "zero", "uniform"])
def test_a_row_of_the_lowest_number_is_not_empty_but_uniform(meaning: str) -> None:
    bias = torch.full((1, 1, 5, 7), LOWEST)
    c = replace(call(sq=5, sk=7, empty_row=meaning), bias=bias)
    do = torch.randn(2, 2, 5, 16)
    assert torch.allclose(run(c), c.v.mean(2, keepdim=True).expand(2, 2, 5, 16), atol=1e-6)
    dv = gradients(c, do)[2]
    assert torch.allclose(dv, do.mean(2, keepdim=True).expand(2, 2, 7, 16) * 5 / 7, atol=1e-6)


def test_without_any_key_the_answer_is_zero() -> None:
    for meaning in ("nan", "zero", "uniform"):
        o, lse, _ = attend(*call(sq=4, sk=0, empty_row=meaning).arguments)
        assert torch.equal(o, torch.zeros(2, 2, 4, 16))
        assert torch.isneginf(lse).all()


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf])
def test_rubbish_in_padded_keys_and_values_stays_there(rubbish: float) -> None:
    c = call(sq=30, sk=30, structure=STREAM, extras=frozenset({"padding"}), empty_row="zero")
    gone = ~c.key_padding[:, None, :, None]
    dirty = replace(c, k=c.k.masked_fill(gone, rubbish), v=c.v.masked_fill(gone, rubbish))
    do = torch.randn(2, 2, 30, 16)
    assert torch.equal(run(dirty), run(c))
    for got, want in zip(gradients(dirty, do), gradients(c, do), strict=True):
        assert torch.equal(got, want)


def test_a_visible_nan_is_seen() -> None:
    c = call(sq=30, sk=30, structure=STREAM)
    c.k[:, :, 12] = torch.nan
    nan = torch.isnan(run(c)).any(-1)[0, 0]
    assert torch.equal(nan, STREAM.dense(30, 30)[:, 12])


# ---- laws ----


def laws() -> dict[str, Callable[[Call], Call]]:
    """Changes of a call that change nothing in its answer."""
    return {
        "a window beyond the keys is none": lambda c: replace(
            c, structure=replace(c.structure, window=c.k.shape[2] + c.q.shape[2] + 99)
        ),
        "as many sinks as keys are no window": lambda c: replace(
            c, structure=Structure(c.structure.offset, 1, c.k.shape[2], c.structure.prefix)
        ),
        "scale may sit on q": lambda c: replace(c, q=c.q * c.scale, scale=1.0),
        "scale may sit on k": lambda c: replace(c, k=c.k * c.scale, scale=1.0),
        "the structure may be a dense mask": lambda c: replace(
            c, mask=c.visible().expand(c.q.shape[0], 1, c.q.shape[2], c.k.shape[2]), structure=Structure()
        ),
        "grouped heads are repeated heads": lambda c: replace(
            c,
            k=c.k.repeat_interleave(c.q.shape[1] // c.k.shape[1], 1),
            v=c.v.repeat_interleave(c.q.shape[1] // c.k.shape[1], 1),
        ),
        "padded keys may be appended": lambda c: replace(
            c,
            k=torch.cat([c.k, c.k[:, :, :3]], 2),
            v=torch.cat([c.v, c.v[:, :, :3]], 2),
            key_padding=torch.arange(c.k.shape[2] + 3).expand(c.q.shape[0], -1) < c.k.shape[2],
        ),
        "a number added to a row of logits is lost": lambda c: replace(
            c, bias=torch.randn(1, 1, c.q.shape[2], 1, dtype=c.q.dtype)
        ),
    }


@pytest.mark.parametrize("law", laws())
@pytest.mark.parametrize("offset", [0, 7])
def test_nothing_changes_when(law: str, offset: int) -> None:
    c = call(sq=50, sk=57, group=2, structure=Structure(offset=offset)).to(torch.float64)
    changed = laws()[law](c)
    do = torch.randn(2, 4, 50, 16, dtype=torch.float64)
    assert_close(run(changed), run(c))
    assert_close(gradients(changed, do)[0] * (changed.q / c.q).nanmean(), gradients(c, do)[0])


def test_splitting_the_queries_changes_nothing() -> None:
    c = call(sq=40, sk=40, structure=STREAM).to(torch.float64)
    parts = [
        replace(c, q=c.q[:, :, at], structure=replace(STREAM, offset=at.start))
        for at in (slice(0, 1), slice(1, 23), slice(23, 40))
    ]
    assert_close(torch.cat([run(part) for part in parts], dim=2), run(c))


def test_it_is_linear_in_the_values() -> None:
    c = call(sq=40, sk=40, structure=STREAM).to(torch.float64)
    other = torch.randn_like(c.v)
    mixed = run(replace(c, v=2 * c.v - 3 * other))
    assert_close(mixed, 2 * run(c) - 3 * run(replace(c, v=other)))


@pytest.mark.parametrize("structure", [Structure(offset=0), STREAM], ids=str)
def test_edits_of_the_future_do_not_change_the_past(structure: Structure) -> None:
    c = call(sq=50, sk=50, structure=structure)
    edited = replace(c, k=c.k.clone(), v=c.v.clone())
    edited.k[:, :, 31:] = 9.0
    edited.v[:, :, 31:] = -7.0
    assert torch.equal(run(edited)[:, :, :31], run(c)[:, :, :31])
    assert not torch.equal(run(edited), run(c))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str) -> None:
    c = call(sq=37, sk=37, group=2, structure=STREAM, extras=frozenset({"bias"}))
    odd = replace(c, **{name: laid_out(getattr(c, name), layout) for name in ("q", "k", "v", "bias")})
    packed = replace(c, **{name: getattr(odd, name).contiguous() for name in ("q", "k", "v", "bias")})
    do = torch.randn(1, 1, 1, 16).expand(2, 4, 37, 16)
    assert torch.equal(run(odd), run(packed))
    for got, want in zip(gradients(odd, do), gradients(packed, do.contiguous()), strict=True):
        assert torch.equal(got, want)


def test_it_gives_the_same_bits_twice_and_writes_to_no_input() -> None:
    c = call(sq=60, sk=60, structure=STREAM, extras=frozenset({"bias", "mask", "padding", "sinks"}))
    before = [x.clone() for x in c.arguments[:7]]
    do = torch.randn(2, 2, 60, 16)
    first, again = gradients(c, do), gradients(c, do)
    assert all(torch.equal(x, y) for x, y in zip([run(c), *first], [run(c), *again], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, c.arguments[:7], strict=True))


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("structure", [Structure(offset=0, window=32, sinks=4), Structure(offset=0)], ids=str)
def test_no_temporary_is_larger_than_the_inputs_or_a_few_tiles(structure: Structure) -> None:
    c = call(batch=1, kv_heads=2, sq=3000, sk=3000, d=8, dv=8, structure=structure)
    with Largest() as largest:
        answer = chunked.forward(c.problem)
        chunked.backward(c.problem, answer, torch.ones_like(answer.o), None, Wanted())
    assert largest.elements <= chunked.TILE
    assert largest.elements < 3000 * 3000 / 8


def test_work_grows_with_the_window_not_with_the_square() -> None:
    flops = []
    for n in (1000, 2000, 4000):
        c = call(
            batch=1, kv_heads=1, sq=n, sk=n, d=8, dv=8, structure=Structure(offset=0, window=100, sinks=4)
        )
        with FlopCounterMode(display=False) as counter:
            chunked.forward(c.problem)
        flops.append(counter.get_total_flops() / n)
    assert max(flops) <= 4 * 8 * (104 + 128)  # a block of 128 queries touches as many keys more
    assert max(flops) <= min(flops) * 1.1


# ---- the op under PyTorch ----


def _leaf(argument: Any) -> Any:
    is_float = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.requires_grad_() if is_float else argument


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize(
    "extras",
    [frozenset(), frozenset({"bias", "padding", "sinks"}), frozenset({"mask"}), frozenset({"alibi"})],
    ids=lambda names: "-".join(sorted(names)) or "none" if isinstance(names, frozenset) else None,
)
def test_the_op_is_well_formed(layout: str, extras: frozenset[str]) -> None:
    c = call(sq=9, sk=11, group=2, layout=layout, structure=STREAM, extras=extras, empty_row="zero")
    checks = torch.library.opcheck(attend, tuple(map(_leaf, c.arguments)))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_whole_and_forwards_and_backwards(dynamic: bool) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return streaming_attention(q, k, v, window=5, sinks=1, bias=bias).sin()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (17, 23):
        _, leaves = differentiable(call(sq=n, sk=n, seed=n, extras=frozenset({"bias"})))
        got, want = compiled(*leaves), step(*leaves)
        assert torch.equal(got, want)
        both = [torch.autograd.grad(x.sum(), leaves) for x in (got, want)]
        assert all(torch.equal(x, y) for x, y in zip(*both, strict=True))


def test_autocast_does_not_reach_inside() -> None:
    c = call(sq=40, sk=40, structure=STREAM)
    do = torch.randn(2, 2, 40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = [run(c), *gradients(c, do)]
    assert all(torch.equal(x, y) for x, y in zip(inside, [run(c), *gradients(c, do)], strict=True))


def test_second_derivatives_are_refused_not_wrong() -> None:
    c, leaves = differentiable(call(sq=5, sk=5))
    (dq,) = torch.autograd.grad(run(c).sum(), leaves[:1], create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        dq.sum().backward()


# ---- the public function ----


@pytest.mark.parametrize(("sq", "sk"), [(30, 30), (1, 30), (12, 30)])
def test_streaming_attention_aligns_the_last_query_with_the_last_key(sq: int, sk: int) -> None:
    c = call(
        sq=sq, sk=sk, group=2, scale=0.25, empty_row="zero", structure=Structure(sk - sq, window=6, sinks=2)
    )
    got = streaming_attention(c.q, c.k, c.v, sinks=2, window=6)
    assert torch.equal(got, run(c))
    assert_same(got, c.to(torch.float64).plain(), c.plain())


def test_streaming_attention_returns_zeros_where_all_keys_are_padding() -> None:
    c = call(sq=12, sk=12)
    keep = torch.arange(12).expand(2, 12) >= 5
    o = streaming_attention(c.q, c.k, c.v, window=3, sinks=1, key_padding=keep)
    assert torch.equal(o[:, :, :5], torch.zeros(2, 2, 5, 16))
    assert o.is_contiguous()


def test_streaming_attention_takes_a_bias_of_fewer_dimensions() -> None:
    c = call(sq=12, sk=12)
    bias = torch.randn(12, 12)
    whole = bias.expand(2, 2, 12, 12)
    assert torch.equal(
        streaming_attention(c.q, c.k, c.v, bias=bias), streaming_attention(c.q, c.k, c.v, bias=whole)
    )


Q = torch.zeros(2, 4, 6, 8)
KV = torch.zeros(2, 2, 6, 8)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ShapeError, {"q": Q[0]}),
        (ShapeError, {"q": Q[:1]}),
        (ShapeError, {"q": Q[..., :5]}),
        (ShapeError, {"q": Q[:, :3]}),
        (ShapeError, {"k": KV[:, :, :4]}),
        (ShapeError, {"v": KV[:, :1]}),
        (ShapeError, {"v": KV.double()}),
        (ShapeError, {"bias": torch.zeros(2, 4, 6, 5)}),
        (ShapeError, {"bias": torch.zeros(2, 2, 6, 6)}),
        (ShapeError, {"bias": torch.zeros(2, 4, 6, 6, dtype=torch.bool)}),
        (ShapeError, {"bias": torch.zeros(1, 2, 4, 6, 6)}),
        (ShapeError, {"key_padding": torch.zeros(2, 6)}),
        (ShapeError, {"key_padding": torch.zeros(2, 5, dtype=torch.bool)}),
        (OptionError, {"window": 0}),
        (OptionError, {"sinks": -1}),
        (UnsupportedError, {"q": Q.int(), "k": KV.int(), "v": KV.int()}),
        (
            UnsupportedError,
            {"q": Q.new_zeros(1, 1, 2, 257), "k": KV.new_zeros(1, 1, 2, 257), "v": KV[:1, :1, :2]},
        ),
        (UnsupportedError, {"q": Q[..., :0], "k": KV[..., :0]}),
    ],
)
def test_what_does_not_fit_is_named(error: type[AttnoptError], arguments: dict[str, object]) -> None:
    with pytest.raises(error, match="wanted"):
        streaming_attention(**{"q": Q, "k": KV, "v": KV, **arguments})


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (UnsupportedError, {"structure": Structure(offset=None, window=3)}),
        (OptionError, {"softcap": 0.0}),
        (OptionError, {"empty_row": "never"}),
        (ShapeError, {"mask": torch.zeros(1, 1, 33, 33)}),
        (ShapeError, {"sink_logits": torch.zeros(3)}),
    ],
)
def test_the_op_refuses_what_it_cannot_mean(error: type[AttnoptError], changes: dict[str, object]) -> None:
    with pytest.raises(error):
        run(replace(call(), **changes))


def test_widest_heads_are_served() -> None:
    c = call(batch=1, kv_heads=1, sq=5, sk=5, d=256, dv=256, structure=STREAM)
    assert_same(run(c), c.to(torch.float64).plain(), c.plain())
