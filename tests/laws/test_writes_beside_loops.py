"""Writes that no rule reads as arithmetic: to the memory of a loop over positions, to lists, by launched kernels."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import aten_graph, nodes_of, shadow_of
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch.fx import GraphModule

from attnopt.options import Options
from attnopt.passes.linear_loop import _loops
from attnopt.passes.mask_writes import LAUNCH, targets
from attnopt.pipeline import optimise
from attnopt.rule import Reject

aten = torch.ops.aten
B, H, S, D, C = 2, 3, 24, 4, 8
torch.manual_seed(0)
INPUTS = (*torch.randn(3, B, H, S, D, dtype=torch.float64).unbind(), torch.rand(H, 1, 1, dtype=torch.float64))

Write = Callable[[Tensor], object]
#: Ways to change a tensor in place; none is part of a recurrence.
WRITES: dict[str, Write] = {
    "relu_": lambda x: x.relu_(),
    "sin_": lambda x: x.sin_(),
    "pow_": lambda x: x.pow_(2),
    "clamp_": lambda x: x.clamp_(-0.1, 0.1),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), x.new_tensor(0.5)),
    "_foreach_sin_": lambda x: torch._foreach_sin_([x]),
    "out": lambda x: torch.sin(x * 1, out=x),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "select": lambda x: x.select(0, 0),
    "transpose": lambda x: x.transpose(0, -1),
}


def nothing(x: Tensor) -> None:
    """Leaves the tensor as it is."""


def blocks(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor,
    exponent: Write = nothing, state_written: Write = nothing, row: Write = nothing,
) -> Tensor:  # fmt: skip
    """Lightning Attention by blocks; what is done to the exponents, the state and the rows of its second block."""
    rows, state = [], q.new_zeros(B, H, D, D)
    place = torch.arange(1, C + 1, dtype=q.dtype)
    for start in range(0, S, C):
        now = slice(start, start + C)
        power = -slope * place[:, None]
        if start == C:
            exponent(power)
            state_written(state)
        apart = (-slope * (place[:, None] - place).clamp_min(0)).exp().tril()
        own = (q[:, :, now] @ k[:, :, now].mT * apart) @ v[:, :, now]
        rows.append(own + (q[:, :, now] * power.exp()) @ state)
        if start == C:
            row(rows[-1])
        fading = k[:, :, now] * (-slope * (C - place[:, None])).exp()
        state = state * (-slope * C).exp() + fading.mT @ v[:, :, now]
    return torch.cat(rows, 2)


def is_read(attend: Callable[..., Tensor]) -> bool:
    """Whether the loop was replaced as a whole, so that nothing joins its rows; what it computes must not change."""
    module = aten_graph(attend, *INPUTS)
    optimise(module, Options(), gradient=False)
    wanted = attend(*INPUTS)
    torch.testing.assert_close(module(*(x.clone() for x in INPUTS)), wanted, rtol=1e-10, atol=1e-12)
    return not nodes_of(module, aten.cat.default)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_the_exponents_is_no_part_of_a_loop(write: str, view: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return blocks(q, k, v, slope, exponent=lambda x: WRITES[write](VIEWS[view](x)))

    assert not is_read(attend)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("at", ["state_written", "row"])
def test_a_write_to_the_state_or_a_row_is_no_part_of_a_loop(at: str, write: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return blocks(q, k, v, slope, **{at: lambda x: WRITES[write](x[:, 1])})

    assert not is_read(attend)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_copy_leaves_the_loop_as_it_is(write: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return blocks(q, k, v, slope, exponent=lambda x: WRITES[write](x.clone()))

    assert is_read(attend)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("write", ["relu_", "sin_", "index_put_", "_foreach_sin_"])
def test_a_write_before_a_loop_or_after_it_stays_where_it_is(write: str, view: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        own = k * 1
        WRITES[write](VIEWS[view](own))
        out = blocks(q, own, v, slope)
        WRITES[write](VIEWS[view](out))
        return out

    assert is_read(attend)


def test_the_reason_names_the_write() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return blocks(q, k, v, slope, exponent=lambda x: x[0].relu_())

    reasons = [reject.reason for reject in rejects_of(attend)]
    assert any("is written to in place by relu_" in reason for reason in reasons)


def rejects_of(attend: Callable[..., Tensor]) -> list[Reject]:
    found = _loops(shadow_of(attend, *INPUTS))
    return [verdict for verdict in found.values() if isinstance(verdict, Reject)]


def test_a_write_after_a_loop_that_its_author_gave_no_metadata_is_done_once() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        out = torch.einsum("...nde,...nd->...ne", torch.einsum("...nd,...ne->...nde", k, v).cumsum(-3), q)
        return out.sin_()

    module = aten_graph(attend, *INPUTS)
    (write,) = nodes_of(module, aten.sin_.default)
    (product,) = write.all_input_nodes
    write.replace_all_uses_with(product)
    write.target = aten.neg_.default
    write.meta.clear()
    module.recompile()
    wanted = module(*INPUTS)
    optimise(module, Options(), gradient=False)
    assert not nodes_of(module, aten.cumsum.default)
    torch.testing.assert_close(module(*INPUTS), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("write", ["relu_", "_foreach_sin_"])
def test_gradients_pass_a_write_in_the_middle_of_a_loop(write: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        return blocks(q, k, v, slope, exponent=lambda x: WRITES[write](x[:, 2]))

    check_like_eager(attend, INPUTS, differentiable=4, inner="aot_eager")


# --- lists ---


def scores_in_a_list(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = q @ k.mT
    torch._foreach_mul_([v * 1, scores], 0.5)
    return scores.softmax(-1) @ v


def part_of_the_scores_in_a_list(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    scores = q @ k.mT
    torch._foreach_zero_([scores[..., 0]])
    return scores.softmax(-1) @ v


def weights_in_a_list(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.5).softmax(-1)
    torch._foreach_add_([weights[:, 0]], [v[:, 1] @ v[:, 1].mT])
    return weights @ v


def linear_weights_in_a_list(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    weights = (q @ k.mT).tril()
    torch._foreach_sin_([weights])
    return weights @ v


@pytest.mark.parametrize(
    "attend",
    [scores_in_a_list, part_of_the_scores_in_a_list, weights_in_a_list, linear_weights_in_a_list],
    ids=lambda f: f.__name__,
)
def test_a_write_to_a_list_is_a_write_to_each(attend: Callable[..., Tensor]) -> None:
    report = check_like_eager(attend, INPUTS)
    assert [site.verdict for site in report.attention] == ["refused"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_bias_written_to_as_one_of_a_list_is_read_as_it_is_then(first: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        bias = torch.zeros(S, S, dtype=q.dtype).masked_fill(
            torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf
        )
        both = [bias[first], torch.ones(3, dtype=q.dtype)]
        torch._foreach_zero_(both if first else both[::-1])
        return (q @ k.mT + bias).softmax(-1) @ v

    report = check_like_eager(attend, INPUTS)
    assert [site.verdict for site in report.attention] == ["rewritten"]


# --- kernels of the program's own ---


def launched_on(operand: Callable[[Tensor, Tensor], Tensor]) -> GraphModule:
    """Softmax attention; a kernel is launched, between scores and softmax, on something made of scores and values."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        operand(scores, v).sin_()
        return scores.softmax(-1) @ v

    module = aten_graph(attend, *INPUTS[:3])
    (write,) = nodes_of(module, aten.sin_.default)
    given = {
        "kernel_idx": kernel_side_table.add_kernel(launched_on), "constant_args_idx": 0, "grid": [(1, 1, 1)],
        "tma_descriptor_metadata": {}, "kwargs": {"x": write.args[0]},
    }  # fmt: skip
    with module.graph.inserting_before(write):
        launch = module.graph.call_function(triton_kernel_wrapper_mutation, (), given)
    assert launch.target.__name__ == LAUNCH
    assert targets(launch) == list(write.all_input_nodes)
    write.replace_all_uses_with(write.args[0])
    module.graph.erase_node(write)
    return module


@pytest.mark.parametrize("view", VIEWS)
def test_a_launched_kernel_may_write_to_all_that_it_is_given(view: str) -> None:
    module = launched_on(lambda scores, _: VIEWS[view](scores))
    assert [site.verdict for site in optimise(module, Options(), gradient=False).sites] == ["refused"]


def test_a_kernel_launched_on_a_copy_of_the_values_is_let_be() -> None:
    module = launched_on(lambda _, v: v.clone())
    assert [site.verdict for site in optimise(module, Options(), gradient=False).sites] == ["rewritten"]
    assert len(nodes_of(module, triton_kernel_wrapper_mutation)) == 1
