"""The ops `attnopt::sparq_append` and `attnopt::sparq_step`: what they write, registration, and what they refuse."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor

from attnopt.errors import AttnoptError, OptionError, ShapeError, UnsupportedError
from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.op_step import sparq_append, sparq_step
from attnopt.kernels.sparq.plain import sparq_reference


@dataclass(frozen=True, eq=False)
class Step:
    """Operands of one step, in the order of the op; buffers of 20 positions."""

    q: Tensor
    new_k: Tensor
    new_v: Tensor
    k: Tensor
    v: Tensor
    k_t: Tensor | None
    v_mean: Tensor | None
    starts: Tensor | None
    lengths: Tensor

    def call(self, **choices: object) -> Tensor:
        usual: dict[str, object] = {"rank": 3, "topk": 6, "local": 2, "mean_value": True}
        return sparq_step(
            self.q, self.new_k, self.new_v, self.k, self.v, k_t=self.k_t, v_mean=self.v_mean, starts=self.starts,
            lengths=self.lengths, **{**usual, **choices},
        )  # fmt: skip


def step(
    starts: list[int] | None = None, lengths: tuple[int, int] = (9, 14), group: int = 2, **kind: object
) -> Step:
    """Buffers whose mean and layouts agree; what does not count is not a number."""
    k, v = torch.randn(2, 2, 20, 8, **kind), torch.randn(2, 2, 20, 6, **kind)
    first, last = torch.tensor(starts or [0, 0]), torch.tensor(lengths)
    position = torch.arange(20)
    counts = (position >= first[:, None]) & (position < last[:, None])
    for x in (k, v):
        x.transpose(1, 2)[~counts] = torch.nan
    mean_dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    total = v.nan_to_num(0.0).sum(2, dtype=mean_dtype)
    return Step(
        torch.randn(2, 2 * group, 1, 8, **kind), torch.randn(2, 2, 1, 8, **kind), torch.randn(2, 2, 1, 6, **kind),
        k, v, k.mT.contiguous(), total / counts.sum(-1).clamp_min(1)[:, None, None],
        None if starts is None else first, last,
    )  # fmt: skip


@given(st.integers(0, 8), st.integers(9, 19), st.integers(1, 3), st.booleans())
def test_a_step_is_the_definition_over_what_counts(
    first: int, last: int, group: int, mean_value: bool
) -> None:
    given_ = step([first, 0], (last, 14), group, dtype=torch.float64)
    out = given_.call(mean_value=mean_value)
    for b, (begin, end) in enumerate([(first, last), (0, 14)]):
        rows = slice(begin, end)
        k = torch.cat([given_.k[b : b + 1, :, rows], given_.new_k[b : b + 1]], 2)
        v = torch.cat([given_.v[b : b + 1, :, rows], given_.new_v[b : b + 1]], 2)
        want = sparq_reference(
            given_.q[b : b + 1], k, v, rank=3, topk=6, local=2, scale=8**-0.5, mean_value=mean_value
        )
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-11, atol=1e-12)


def test_the_buffers_hold_the_token_and_nothing_else_changes() -> None:
    now = step([2, 0])
    before = {name: getattr(now, name).clone() for name in ("k", "v", "k_t", "v_mean", "starts", "lengths")}
    now.call()
    for b, at in enumerate((9, 14)):
        for name in ("k", "v"):
            before[name][b, :, at] = getattr(now, f"new_{name}")[b, :, 0]
        before["k_t"][b, :, :, at] = now.new_k[b, :, 0]
    for name in ("k", "v", "k_t", "starts", "lengths"):
        torch.testing.assert_close(getattr(now, name), before[name], rtol=0, atol=0, equal_nan=True)
    means = [now.v[0, :, 2:10].mean(1), now.v[1, :, :15].mean(1)]
    torch.testing.assert_close(now.v_mean, torch.stack(means))


@given(st.integers(1, 6), st.integers(0, 12))
def test_appending_at_once_is_appending_one_by_one(tokens: int, first: int) -> None:
    one, many = (step([first, 0], (9, 14), dtype=torch.float64) for _ in range(2))
    many = replace(many, **{name: getattr(one, name).clone() for name in ("k", "v", "k_t", "v_mean")})
    new_k, new_v = torch.randn(2, 2, tokens, 8).double(), torch.randn(2, 2, tokens, 6).double()
    appended(many, new_k, new_v, many.lengths)
    for i in range(tokens):
        appended(one, new_k[:, :, i : i + 1], new_v[:, :, i : i + 1], one.lengths + i)
    for name in ("k", "v", "k_t"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=0, atol=0, equal_nan=True)
    counted = torch.tensor([9 + tokens > first, True])
    torch.testing.assert_close(one.v_mean[counted], many.v_mean[counted], rtol=1e-12, atol=1e-12)


def appended(to: Step, new_k: Tensor, new_v: Tensor, lengths: Tensor) -> None:
    sparq_append(
        new_k, new_v, to.k, to.v, lengths=lengths, k_t=to.k_t, v_mean=to.v_mean, starts=to.starts
    )  # fmt: skip


def test_attention_over_a_range_is_attention_over_its_mask() -> None:
    now = step([3, 0])
    position = torch.arange(20)
    kept = (position >= torch.tensor([3, 0])[:, None]) & (position < now.lengths[:, None])
    choices = {"rank": 3, "topk": 6, "local": 2, "k_t": now.k_t}
    ranged = sparq_attention(now.q, now.k, now.v, starts=now.starts, lengths=now.lengths, **choices)
    assert torch.equal(ranged, sparq_attention(now.q, now.k, now.v, key_padding=kept, **choices))


def test_the_order_of_heads_in_a_group_is_kept() -> None:
    now = step(group=3)
    single = [
        replace(now, q=now.q[:, [0 + i, 3 + i]]).call(rank=8, topk=20, mean_value=False) for i in range(3)
    ]
    together = now.call(rank=8, topk=20, mean_value=False)
    for i in range(3):
        assert_same(together[:, [0 + i, 3 + i]], single[i].double())


def test_the_ops_are_registered_correctly() -> None:
    now = step([2, 0])
    operands = (now.q, now.new_k, now.new_v, now.k, now.v, now.k_t, now.v_mean, now.starts, now.lengths)
    finite = tuple(None if x is None else x.nan_to_num(0.0) if x.is_floating_point() else x for x in operands)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.attnopt.sparq_step.default, (*finite, 3, 6, 2, 0.3, True), test_utils=tests
    )
    torch.library.opcheck(torch.ops.attnopt.sparq_append.default, finite[1:], test_utils=tests)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_compiles_into_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(Step.call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    now = step([2, 0])
    same = replace(now, **{name: getattr(now, name).clone() for name in ("k", "v", "k_t", "v_mean")})
    assert torch.equal(compiled(now), same.call())
    assert torch.equal(now.v_mean, same.v_mean)
    assert torch.equal(now.k.nan_to_num(), same.k.nan_to_num())


def test_a_step_keeps_its_sums_in_fp32_under_autocast() -> None:
    now = step()
    same = replace(now, **{name: getattr(now, name).clone() for name in ("k", "v", "k_t", "v_mean")})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = now.call()
    assert torch.equal(inside, same.call())


BAD: list[tuple[dict[str, object], type[AttnoptError], str]] = [
    ({"new_k": torch.randn(2, 2, 3, 8), "new_v": torch.randn(2, 2, 3, 6)}, UnsupportedError, "sparq_append"),
    ({"new_k": torch.randn(2, 2, 1, 7)}, ShapeError, "new_k has shape"),
    ({"new_k": torch.randn(2, 2, 8)}, ShapeError, "new_k has shape"),
    ({"new_v": torch.randn(2, 2, 1, 6).half()}, ShapeError, "new_v is torch.float16"),
    ({"v_mean": torch.zeros(2, 2, 6).half()}, ShapeError, "v_mean is torch.float16"),
    ({"lengths": torch.tensor([9.0, 14.0])}, ShapeError, "lengths is torch.float32"),
    ({"lengths": torch.tensor([9])}, ShapeError, r"lengths has shape \(1,\)"),
    ({"starts": torch.tensor([True, False])}, ShapeError, "starts is torch.bool"),
    ({"lengths": torch.tensor([9, 20])}, ShapeError, "room for 20 positions, holds 20 and was given 1 more"),
    ({"new_k": torch.randn(2, 2, 1, 8).requires_grad_()}, UnsupportedError, "no_grad"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_does_not_fit_is_refused_with_the_reason(
    change: dict[str, object], error: type[AttnoptError], message: str
) -> None:
    step().call()
    with pytest.raises(error, match=message):
        replace(step(), **change).call()


def test_choices_that_cannot_be_are_refused() -> None:
    with pytest.raises(OptionError, match="local is 7"):
        step().call(local=7)
