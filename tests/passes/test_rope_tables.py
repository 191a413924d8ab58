"""Rotations from tables that a module holds: rows by number or by slice, real or complex; each row is looked at."""

import warnings
from collections.abc import Callable

import pytest
import torch
from oracle import assert_same
from rope_cases import STREAMING, Turned, paper, tensors
from rope_spellings import halves, pairs_stacked, rates, rotate_half
from torch import Tensor, nn

import attnopt

ROWS = 64
Take = Callable[[Tensor, Tensor], Tensor]


def by_number(table: Tensor, t: Tensor) -> Tensor:
    return table[t]


def by_slice(table: Tensor, t: Tensor) -> Tensor:
    return table[: t.shape[0]]


def by_embedding(table: Tensor, t: Tensor) -> Tensor:
    return nn.functional.embedding(t, table)


def by_index_select(table: Tensor, t: Tensor) -> Tensor:
    return table.index_select(0, t)


def by_gather(table: Tensor, t: Tensor) -> Tensor:
    return table.gather(0, t[:, None].expand(-1, table.shape[1]))


class Real(nn.Module):
    """Causal attention turned by held tables of cos and sin."""

    def __init__(self, take: Take, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(ROWS).double(), rates(torch.ones((), dtype=torch.float64))).repeat(
            1, 2
        )
        self.register_buffer("cos", angle.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(dtype), persistent=False)
        self.take = take

    def turn(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.take(self.cos, t) + rotate_half(x) * self.take(self.sin, t)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Turned(self.turn)(q, k, v)


class Complex(nn.Module):
    """The same by one table of complex numbers, of which a slice is taken."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(ROWS).double(), rates(torch.ones((), dtype=torch.float64)))
        self.register_buffer("turns", torch.polar(torch.ones_like(angle), angle), persistent=False)

    def turn(self, x: Tensor, t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns[: t.shape[0]][None, None]).flatten(-2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Turned(self.turn)(q, k, v)


@pytest.mark.parametrize("take", [by_number, by_slice, by_embedding, by_index_select, by_gather])
def test_rows_of_tables_are_read_and_moved(take: Take) -> None:
    inputs = tensors()
    program, report = attnopt.rewrite(torch.export.export(Real(take), inputs), STREAMING)
    assert [site.exact for site in report.sites] == [False]
    assert_same(program.module()(*inputs), paper(halves, *inputs))


def test_rows_of_a_complex_table_are_read_and_moved() -> None:
    inputs = tensors()
    program, report = attnopt.rewrite(torch.export.export(Complex(), inputs), STREAMING)
    assert [site.exact for site in report.sites] == [False]
    assert_same(program.module()(*inputs), paper(pairs_stacked, *inputs))


@pytest.mark.parametrize("take", [by_number, by_slice])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_models_look_at_their_buffers(take: Take, *, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = Real(take)
    run = torch.compile(model, backend="attnopt", options={**STREAMING, "inner": "eager"}, dynamic=dynamic)
    for length in (29, 23):
        inputs = tensors(length)
        assert_same(run(*inputs), paper(halves, *inputs))
        assert [site.exact for site in attnopt.reports()[-1].sites] == [False]


def test_a_table_that_changes_takes_the_rewrite_back() -> None:
    torch._dynamo.reset()
    model, inputs = Real(by_number), tensors()
    run = torch.compile(model, backend="attnopt", options={**STREAMING, "inner": "eager"})
    assert_same(run(*inputs), paper(halves, *inputs))
    model.cos.mul_(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(run(*inputs), model(*inputs))


@pytest.mark.parametrize("row", [0, 31, ROWS - 1])
def test_one_row_out_of_line_is_refused(row: int) -> None:
    model = Real(by_number)
    model.cos[row] += 0.01
    _, report = attnopt.rewrite(torch.export.export(model, tensors()), STREAMING)
    assert report.sites[0].exact
    assert "depend on more than the distance of positions" in report.sites[0].reason


def test_tables_in_single_precision_are_as_exact_as_that() -> None:
    inputs = tensors(dtype=torch.float32)
    program, report = attnopt.rewrite(torch.export.export(Real(by_number, torch.float32), inputs), STREAMING)
    assert [site.exact for site in report.sites] == [False]
    exact = paper(halves, *(x.double() for x in inputs))
    assert_same(program.module()(*inputs), exact, paper(halves, *inputs))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Real(by_number, torch.bfloat16), "which holds torch.bfloat16: wanted float32"),
        (nn.Sequential(), "whose elements are not known while rewriting"),
    ],
)
def test_tables_that_say_too_little_are_refused(model: nn.Module, said: str) -> None:
    if not isinstance(model, Real):
        model = Real(by_number)
        for name in ("cos", "sin"):
            held = getattr(model, name)
            delattr(model, name)
            model.register_parameter(name, nn.Parameter(held))
    _, report = attnopt.rewrite(torch.export.export(model, tensors()), STREAMING)
    assert report.sites[0].exact
    assert said in report.sites[0].reason
