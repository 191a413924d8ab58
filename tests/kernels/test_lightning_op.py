"""Linear attention as an op: registration, compilation, one-token steps, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_cases import LAYOUTS, Case, Result, cases, gradients, make_case, recurrence
from oracle import assert_same
from torch import Tensor

from attnopt.errors import AttnoptError, ShapeError, UnsupportedError
from attnopt.kernels.lightning.op import lightning_attention, lightning_step

ATTENTION = torch.ops.attnopt.lightning_attention.default
STEP = torch.ops.attnopt.lightning_step.default
DECAYS = ("none", "head", "token")


def attend(case: Case) -> Result:
    return lightning_attention(
        case.q, case.k, case.v,
        log_decay=case.log_decay, scale=case.scale, initial_state=case.initial_state, return_state=True,
    )  # fmt: skip


def low_case(length: int, **changes: object) -> Case:
    return make_case(length, **changes).in_rounded(torch.float32)


# Registration and compilation.


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_op_is_registered_well(decay: str, with_state: bool, layout: str) -> None:
    case = low_case(37, kv_heads=2, decay=decay, with_state=with_state)
    laid = case.map(lambda x: (LAYOUTS[layout](x) if x.dim() > 2 else x).requires_grad_())
    arguments = (
        laid.q,
        laid.k,
        laid.v,
        laid.log_decay,
        laid.initial_state,
        laid.scale,
        True,
        None,
        with_state,
    )
    assert set(torch.library.opcheck(ATTENTION, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_attention_is_registered_well(dtype: torch.dtype, layout: str) -> None:
    case = make_case(37, kv_heads=2).in_rounded(dtype)
    q, k, v, state = (LAYOUTS[layout](x) for x in (case.q[:, :, :5], case.k, case.v, case.initial_state))
    arguments = tuple(x.requires_grad_() for x in (q, k, v))
    tests = torch.library.opcheck(ATTENTION, (*arguments, None, state, 0.5, False, None, True))
    assert set(tests.values()) == {"SUCCESS"}


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_step_is_registered_well(decay: str) -> None:
    case = low_case(1, decay=decay)
    arguments = (*token(case, 0), case.initial_state, decay_of(case, 0), case.scale)
    assert set(torch.library.opcheck(STEP, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_compiled_is_eager(decay: str, dynamic: bool) -> None:
    case = low_case(37, kv_heads=2, decay=decay)

    def model(given: Case) -> Result:
        out, state = attend(replace(given, q=given.q * 2))
        return out.sin(), state

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert all(map(torch.equal, compiled(case), model(case)))
    want = gradients(model, case)
    assert all(torch.equal(got, want[name]) for name, got in gradients(compiled, case).items())


def test_one_compilation_serves_all_lengths() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda q: lightning_attention(q, q, q), backend=count, dynamic=True)
    for length in (5, 64, 100):
        q = torch.randn(1, 2, length, 8)
        assert torch.equal(compiled(q), lightning_attention(q, q, q))
    assert len(graphs) == 1


def test_compiled_step_changes_its_state() -> None:
    case = low_case(1)
    eager, compiled = case.initial_state.clone(), case.initial_state.clone()
    step = torch.compile(lightning_step, fullgraph=True, backend="aot_eager")
    want = lightning_step(*token(case, 0), eager, log_decay=case.log_decay)
    assert torch.equal(step(*token(case, 0), compiled, log_decay=case.log_decay), want)
    assert torch.equal(compiled, eager)


@pytest.mark.parametrize("used", ["out", "state"])
def test_either_result_may_be_used_alone(used: str) -> None:
    def one(compute, case: Case) -> dict[str, Tensor]:
        leaves = {n: getattr(case, n).detach().requires_grad_() for n in ("q", "k", "v", "initial_state")}
        out, state = compute(replace(case, **leaves))
        result, arriving = (out, case.d_out) if used == "out" else (state, case.d_state)
        found = torch.autograd.grad(
            result, list(leaves.values()), arriving, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))

    case = make_case(70, decay="head")
    torch.testing.assert_close(one(attend, case), one(recurrence, case), rtol=1e-9, atol=1e-9)


# One token at a time.


def token(case: Case, t: int) -> tuple[Tensor, Tensor, Tensor]:
    return case.q[:, :, t], case.k[:, :, t], case.v[:, :, t]


def decay_of(case: Case, t: int) -> Tensor | None:
    per_token = case.log_decay is not None and case.log_decay.dim() == 3
    return case.log_decay[:, :, t] if per_token else case.log_decay


def step_by_step(case: Case, state: Tensor) -> Tensor:
    steps = (
        lightning_step(*token(case, t), state, log_decay=decay_of(case, t), scale=case.scale)
        for t in range(case.q.shape[2])
    )
    return torch.stack(list(steps), dim=2)


@given(cases(shortest=1, longest=12))
def test_steps_are_the_recurrence(case: Case) -> None:
    case = replace(case, initial_state=torch.zeros_like(case.d_state))
    state = case.initial_state.clone()
    want, last = recurrence(case)
    torch.testing.assert_close(step_by_step(case, state), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prefill_then_steps_are_one_pass(dtype: torch.dtype, decay: str) -> None:
    case = make_case(80, decay=decay, signed=False).in_rounded(dtype)
    exact, last = recurrence(case.map(torch.Tensor.double))
    out, state = attend(case.rows(0, 70))
    assert_same(torch.cat([out, step_by_step(case.rows(70, None), state)], dim=2), exact)
    assert_same(state, last, what="state")


@given(st.sampled_from(sorted(LAYOUTS)))
def test_state_of_any_layout_is_updated_in_place(layout: str) -> None:
    case = low_case(3)
    plain, laid = case.initial_state.clone(), LAYOUTS[layout](case.initial_state.clone())
    want = step_by_step(case, plain)
    assert torch.equal(step_by_step(case, laid), want)
    assert torch.equal(laid, plain)


# What it refuses.


def operands(**changes: Tensor) -> dict[str, Tensor]:
    plain = {"q": torch.randn(2, 4, 6, 8), "k": torch.randn(2, 2, 6, 8), "v": torch.randn(2, 2, 6, 5)}
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(4, 6, 8)}, ShapeError, "wanted q"),
        ({"k": torch.randn(2, 2, 6, 7)}, ShapeError, "one B and D"),
        ({"k": torch.randn(1, 2, 6, 8)}, ShapeError, "one B and D"),
        ({"v": torch.randn(2, 2, 5, 5)}, ShapeError, "one B, Hkv and Sk"),
        ({"q": torch.randn(2, 3, 6, 8)}, ShapeError, "multiple of Hkv"),
        ({"q": torch.randn(2, 4, 5, 8)}, ShapeError, "Sq == Sk"),
        ({"q": torch.randn(2, 4, 6, 8).double()}, ShapeError, "one dtype and one device"),
        ({"v": torch.randn(2, 2, 6, 5, device="meta")}, ShapeError, "one dtype and one device"),
        (
            {name: torch.ones(2, 2, 6, 5, dtype=torch.int64) for name in "qkv"},
            UnsupportedError,
            "wanted one of",
        ),
        ({"log_decay": torch.zeros(3)}, ShapeError, r"wanted \(4,\)"),
        ({"log_decay": torch.zeros(2, 4)}, ShapeError, r"or \(2, 4, 6\)"),
        ({"log_decay": torch.zeros(4, dtype=torch.int64)}, ShapeError, "floating point"),
        ({"log_decay": torch.zeros(4, device="meta")}, ShapeError, "floating point on cpu"),
        ({"initial_state": torch.zeros(2, 2, 8, 5)}, ShapeError, "one state per query head"),
        ({"initial_state": torch.zeros(2, 4, 8, 5, dtype=torch.bfloat16)}, ShapeError, "torch.float32"),
        ({"log_decay": torch.zeros(4), "causal": False}, UnsupportedError, "without causal order"),
    ],
)
def test_wrong_operands_are_named(
    changes: dict[str, Tensor], error: type[AttnoptError], message: str
) -> None:
    with pytest.raises(error, match=message):
        lightning_attention(**operands(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.randn(2, 4, 1, 8)}, ShapeError, "without a time dimension"),
        ({"k": torch.randn(2, 2, 7)}, ShapeError, "one B and D"),
        ({"q": torch.randn(2, 5, 8)}, ShapeError, "multiple of Hkv"),
        ({"state": torch.zeros(2, 4, 5, 8)}, ShapeError, "one state per query head"),
        ({"log_decay": torch.zeros(2, 4, 1)}, ShapeError, "one per step"),
        ({"q": torch.randn(2, 4, 8, requires_grad=True)}, UnsupportedError, "no_grad"),
    ],
)
def test_wrong_steps_are_named(changes: dict[str, Tensor], error: type[AttnoptError], message: str) -> None:
    plain = {"q": torch.randn(2, 4, 8), "k": torch.randn(2, 2, 8), "v": torch.randn(2, 2, 5)}
    with pytest.raises(error, match=message):
        lightning_step(**{**plain, "state": torch.zeros(2, 4, 8, 5), **changes})
