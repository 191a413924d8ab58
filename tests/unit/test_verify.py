"""The check in fp64: a right reading agrees to rounding, and every planted misreading is caught."""

from dataclasses import replace

import pytest
import torch
from graphs import shadow_of
from torch import Tensor

from attnopt.mask import FULL, Causal, Length, Opaque
from attnopt.pipeline import read
from attnopt.registry import rules
from attnopt.rule import Site
from attnopt.shadow import Shadow
from attnopt.spec import EmptyRow
from attnopt.verify import LONGEST, TOLERANCE, Checks, row_error, validate

Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()
KEEP = torch.rand(2, 1, 7, 7) < 0.5


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = q.shape[-2]
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    return (q @ k.transpose(-2, -1) * 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    hidden = ~keep
    return (q @ k.transpose(-2, -1) * 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def read_one(shadow: Shadow) -> Site:
    (site,) = (found.site for found in read(shadow, rules()) if found.site is not None)
    return site


def test_a_right_reading_agrees() -> None:
    for shadow in (shadow_of(causal, Q, K, V), shadow_of(padded, Q, K, V, KEEP)):
        check = validate(shadow, read_one(shadow), {})
        assert check.agrees, check.reason


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.5 * (1 + 1e-6)},
        {"scale": -0.5},
        {"mask": FULL},
        {"mask": Causal(Length(1))},
        {"mask": Causal(Length(-1))},
        {"softcap": 50.0},
    ],
    ids=str,
)
def test_a_misread_spec_is_caught(wrong: dict[str, object]) -> None:
    shadow = shadow_of(causal, Q, K, V)
    site = read_one(shadow)
    check = validate(shadow, replace(site, spec=replace(site.spec, **wrong)), {})
    assert check.error is not None
    assert not check.agrees
    assert check.error > TOLERANCE
    assert "the reading differs" in check.reason


def padded_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return padded(q, k, v, keep[:, None, None, :])


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("row", [EmptyRow.NEVER, EmptyRow.ZERO, EmptyRow.UNIFORM])
def test_a_misread_empty_row_under_padding_is_caught(row: EmptyRow, batch: int) -> None:
    q, k, v = (torch.randn(batch, 2, 6, 4) for _ in range(3))
    shadow = shadow_of(padded_keys, q, k, v, torch.rand(batch, 6) < 0.5)
    site = read_one(shadow)
    assert validate(shadow, site, {}).agrees
    assert not validate(shadow, replace(site, spec=replace(site.spec, empty_row=row)), {}).agrees


@pytest.mark.parametrize("row", [EmptyRow.ZERO, EmptyRow.UNIFORM])
def test_a_misread_empty_row_is_caught(row: EmptyRow) -> None:
    shadow = shadow_of(padded, Q, K, V, KEEP)
    site = read_one(shadow)
    assert (site.spec.empty_row, type(site.spec.mask)) == (EmptyRow.NAN, Opaque)
    check = validate(shadow, replace(site, spec=replace(site.spec, empty_row=row)), {})
    assert check.error == float("inf")


@pytest.mark.parametrize("row", [EmptyRow.NAN, EmptyRow.NEVER, EmptyRow.UNIFORM])
def test_a_misread_row_that_a_bias_hides_is_caught(row: EmptyRow) -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    shadow = shadow_of(biased, Q, K, V, torch.randn(2, 1, 7, 7))
    site = read_one(shadow)
    assert site.spec.empty_row is EmptyRow.ZERO
    assert validate(shadow, site, {}).agrees
    assert not validate(shadow, replace(site, spec=replace(site.spec, empty_row=row)), {}).agrees


def test_a_bias_left_out_is_caught() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v

    shadow = shadow_of(biased, Q, K, V, torch.randn(3, 7, 7))
    site = read_one(shadow)
    kept = {name: operand for name, operand in site.operands.items() if name != "bias"}
    assert validate(shadow, site, {}).agrees
    assert not validate(shadow, replace(site, spec=replace(site.spec, bias=()), operands=kept), {}).agrees


def test_heads_in_another_order_are_caught() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    shadow = shadow_of(shared, torch.randn(2, 9, 7, 4), K, V)
    site = read_one(shadow)
    batch, (major, minor), *rest = site.operands["q"].dims
    tiled = replace(site.operands["q"], dims=(batch, (minor, major), *rest))
    assert validate(shadow, site, {}).agrees
    assert not validate(shadow, replace(site, operands={**site.operands, "q": tiled}), {}).agrees


def test_a_scale_that_divides_is_not_one_that_multiplies() -> None:
    def scaled(q: Tensor, k: Tensor, v: Tensor, by: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / by).softmax(-1) @ v

    shadow = shadow_of(scaled, Q, K, V, torch.rand(3, 1, 1))
    site = read_one(shadow)
    (factor,) = site.operands["q"].times
    wrong = replace(site.operands["q"], times=(replace(factor, inverse=False),))
    assert validate(shadow, site, {}).agrees
    assert not validate(shadow, replace(site, operands={**site.operands, "q": wrong}), {}).agrees


def test_a_padding_that_is_not_inverted_is_caught() -> None:
    shadow = shadow_of(padded_keys, Q, K, V, torch.rand(2, 7) < 0.5)
    site = read_one(shadow)
    padding = site.operands["padding"]
    wrong = {**site.operands, "padding": replace(padding, negated=not padding.negated)}
    assert not validate(shadow, replace(site, operands=wrong), {}).agrees


@pytest.mark.parametrize("offset", [49, 51])
def test_an_offset_that_shows_only_far_along_is_caught(offset: int) -> None:
    def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(64, 64, dtype=torch.bool).triu(51)
        return (q @ k.transpose(-2, -1)).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    shadow = shadow_of(shifted, *torch.randn(3, 1, 1, 64, 2).unbind())
    site = read_one(shadow)
    assert site.spec.mask == Causal(Length(50))
    assert validate(shadow, site, {}).agrees
    wrong = replace(site, spec=replace(site.spec, mask=Causal(Length(offset))))
    assert not validate(shadow, wrong, {}).agrees


def test_a_part_of_the_mask_that_shows_only_far_along_is_caught() -> None:
    def ending(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = (torch.arange(64) >= 40)[None, :].expand(64, 64)
        return (q @ k.transpose(-2, -1)).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    shadow = shadow_of(ending, *torch.randn(3, 1, 1, 64, 2).unbind())
    site = read_one(shadow)
    assert validate(shadow, site, {}).agrees
    assert not validate(shadow, replace(site, spec=replace(site.spec, mask=FULL)), {}).agrees


def test_a_write_that_the_reader_overlooked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v * 1
        first = v[:, :, 0]
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        first.zero_()
        return weights @ v

    shadow = shadow_of(written, Q, K, V)
    with monkeypatch.context() as blind:
        blind.setattr("attnopt.passes.site.writes_after", lambda *_: [])
        site = read_one(shadow)
    assert not validate(shadow, site, {}).agrees


@pytest.mark.parametrize(("one", "other"), [("q", "k"), ("k", "v"), ("q", "v")])
def test_swapped_operands_are_caught(one: str, other: str) -> None:
    shadow = shadow_of(causal, Q, K, V)
    site = read_one(shadow)
    first, second = site.operands[one], site.operands[other]
    swap = {one: replace(first, node=second.node), other: replace(second, node=first.node)}  # type: ignore[type-var, attr-defined]
    check = validate(shadow, replace(site, operands={**site.operands, **swap}), {})
    assert check.error is not None
    assert check.error > TOLERANCE


def test_equal_sites_share_one_check() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        once = causal(q, k, v)
        twice = causal(q, k, once.sin())
        return causal(q, k, twice.sin())

    shadow = shadow_of(layers, Q, K, V)
    done: Checks = {}
    checks = [validate(shadow, found.site, done) for found in read(shadow, rules()) if found.site]
    assert (len(checks), len(done)) == (3, 1)
    assert checks[0].agrees


def test_a_mask_beyond_the_reduced_sizes_is_checked_at_the_graphs_own() -> None:
    width, size = LONGEST + 20, LONGEST + 60

    def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(size, size, dtype=torch.bool).triu(width)
        return (q @ k.transpose(-2, -1)).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    shadow = shadow_of(windowed, *torch.randn(3, 1, 1, size, 2).unbind())
    site = read_one(shadow)
    assert site.spec.mask == Causal(Length(width - 1))
    assert validate(shadow, site, {}).agrees
    wrong = replace(site, spec=replace(site.spec, mask=Causal(Length(width))))
    assert not validate(shadow, wrong, {}).agrees


def test_the_error_is_that_of_the_worst_row_and_infinite_where_special_values_differ() -> None:
    exact = torch.ones(2, 4, dtype=torch.float64)
    assert row_error(exact, exact) == 0.0
    assert row_error(exact + torch.tensor([[0.0], [0.5]]), exact) == pytest.approx(0.5)
    assert row_error(exact, exact[:1]) == float("inf")
    for special in (torch.nan, torch.inf):
        assert row_error(exact.clone().fill_diagonal_(special), exact) == float("inf")
