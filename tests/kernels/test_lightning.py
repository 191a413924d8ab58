"""Linear attention without a GPU: the op and its torch path against the recurrence, and the laws of the whole."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_cases import LAYOUTS, Case, Result, cases, gradients, make_case, quadratic, recurrence
from oracle import assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.kernels.lightning import chunked
from attnopt.kernels.lightning.op import lightning_attention

LOW = (torch.float32, torch.bfloat16, torch.float16)
DECAYS = ("none", "head", "token")


def attend(case: Case) -> Result:
    """The public function."""
    return lightning_attention(
        case.q, case.k, case.v,
        log_decay=case.log_decay, scale=case.scale, initial_state=case.initial_state, return_state=True,
    )  # fmt: skip


def attend_in_chunks(case: Case, chunk: int) -> Result:
    return chunked.forward(
        case.q, case.k, case.v, case.log_decay, case.initial_state, case.scale, chunk=chunk
    )


def assert_close(got: Result | dict[str, Tensor], want: Result | dict[str, Tensor]) -> None:
    """fp64 against fp64: only the order of sums may differ."""
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# What it computes.


@given(cases())
def test_output_and_state_are_those_of_the_recurrence(case: Case) -> None:
    assert_close(attend(case), recurrence(case))


@given(cases(longest=30))
def test_gradients_are_those_of_the_recurrence(case: Case) -> None:
    assert_close(gradients(attend, case), gradients(recurrence, case))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 129])
def test_lengths_around_the_chunk_are_exact(length: int, decay: str) -> None:
    case = make_case(length, decay=decay)
    assert_close(attend(case), recurrence(case))
    assert_close(gradients(attend, case), gradients(recurrence, case))


@pytest.mark.parametrize("decay", DECAYS)
def test_every_length_up_to_two_chunks_is_exact(decay: str) -> None:
    whole = make_case(2 * 4 + 1, decay=decay)
    for length in range(2 * 4 + 2):
        assert_close(attend_in_chunks(whole.rows(0, length), 4), recurrence(whole.rows(0, length)))


@given(cases(shortest=1, signed=False), st.sampled_from(LOW))
def test_rows_are_as_good_as_those_of_eager(case: Case, dtype: torch.dtype) -> None:
    low = round_case(case, dtype)
    got, exact, eager = attend(low), recurrence(low.map(torch.Tensor.double)), quadratic(low)
    assert_same(got[0], exact[0], eager[0])
    assert_same(got[1], exact[1], eager[1], what="state")


@given(cases(shortest=1, longest=30, signed=False), st.sampled_from(LOW))
def test_gradients_are_as_good_as_those_of_eager(case: Case, dtype: torch.dtype) -> None:
    low = round_case(case, dtype)
    got, eager = gradients(attend, low), gradients(quadratic, low)
    for name, exact in gradients(recurrence, low.map(torch.Tensor.double)).items():
        assert_same(got[name], exact, eager[name], factor=3.0, what=f"d_{name}")


def round_case(case: Case, dtype: torch.dtype) -> Case:
    """Every number rounded to what `dtype` holds; positive scales, so that no row cancels."""
    return replace(case, scale=abs(case.scale) or 1.0).in_rounded(dtype)


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_small_integers_are_exact_in_fp32(factor: float, decay: str) -> None:
    length = 12 if factor == 0.5 else 150
    case = make_case(length, decay=decay, d=4, dv=3, scale=1.0)
    case = case.map(lambda x: x.mul(2).round().clamp(-3, 3))
    case = replace(case, log_decay=torch.full_like(case.log_decay, math.log(factor)))
    low = case.in_rounded(torch.float32)
    for got, want in zip(attend(low), recurrence(case), strict=True):
        assert torch.equal(got.double(), want)
    want = gradients(recurrence, case)
    for name, got in gradients(attend, low).items():
        assert name == "log_decay" or torch.equal(got.double(), want[name]), name


@pytest.mark.parametrize("rate", [-math.inf, -1e30, -1000.0, -104.0])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_a_decay_that_forgets_everything_leaves_each_token_alone(rate: float, decay: str) -> None:
    case = make_case(70, decay=decay)
    gone = replace(case, log_decay=torch.full_like(case.log_decay, rate)).in_rounded(torch.float32)
    alone = (case.q * case.k).sum(-1, keepdim=True) * case.v * case.scale
    torch.testing.assert_close(attend(gone)[0], alone.float(), rtol=1e-5, atol=1e-5)


def test_nothing_is_lost_over_a_long_sequence_without_decay() -> None:
    case = make_case(5000, decay="head", rate=1e-6, batch=1, signed=False)
    out, state = attend(case.in_rounded(torch.float32))
    exact = attend(case)
    assert_same(out, exact[0])
    assert_same(state, exact[1])


def test_decays_of_very_different_strength_do_not_blur_each_other() -> None:
    case = make_case(64, decay="token", signed=False)
    steps = torch.where(torch.arange(64) % 7 == 0, -300.0, -0.01).expand_as(case.log_decay)
    case = replace(case, log_decay=steps.double())
    low = case.in_rounded(torch.float32)
    assert_same(attend(low)[0], recurrence(low.map(torch.Tensor.double))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_lowers_nothing_inside(dtype: torch.dtype) -> None:
    case = make_case(70).in_rounded(dtype)
    want = gradients(attend, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(case)
        grads = gradients(attend, case)
    assert all(map(torch.equal, got, attend(case)))
    assert all(torch.equal(grads[name], want[name]) for name in want)


# Laws.


@given(cases(longest=60), st.integers(0, 60), st.integers(0, 60))
def test_splitting_time_changes_nothing(case: Case, cut: int, more: int) -> None:
    first, second, third = case.rows(0, cut), case.rows(cut, cut + more), case.rows(cut + more, None)
    out1, state = attend(first)
    out2, state = attend(replace(second, initial_state=state))
    out3, state = attend(replace(third, initial_state=state))
    assert_close((torch.cat([out1, out2, out3], dim=2), state), attend(case))


@given(cases(longest=60), st.integers(1, 70))
def test_the_length_of_a_chunk_changes_nothing(case: Case, chunk: int) -> None:
    assert_close(attend_in_chunks(case, chunk), attend(case))


@given(cases(longest=60), st.integers(0, 60))
def test_the_future_does_not_touch_the_past(case: Case, cut: int) -> None:
    low = case.in_rounded(torch.float32)
    edited = low.map(torch.Tensor.clone)
    for x in (edited.q, edited.k, edited.v):
        x[:, :, cut:] += 1.0
    if edited.log_decay is not None and edited.log_decay.dim() == 3:
        edited.log_decay[:, :, cut:] -= 1.0
    assert torch.equal(attend(edited)[0][:, :, :cut], attend(low)[0][:, :, :cut])


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@given(case=cases(longest=60), cut=st.integers(0, 60))
def test_later_keys_that_are_not_finite_do_not_touch_the_past(case: Case, cut: int, number: float) -> None:
    low = case.in_rounded(torch.float32)
    edited = low.map(torch.Tensor.clone)
    edited.k[:, :, cut:] = number
    assert torch.equal(attend(edited)[0][:, :, :cut], attend(low)[0][:, :, :cut])


@given(cases(longest=70), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(LOW))
def test_the_layout_in_memory_changes_nothing(case: Case, layout: str, dtype: torch.dtype) -> None:
    low = case.in_rounded(dtype)
    laid = low.map(lambda x: LAYOUTS[layout](x) if x.dim() > 2 else x)
    assert all(map(torch.equal, attend(laid), attend(low)))
    want = gradients(attend, low)
    assert all(torch.equal(got, want[name]) for name, got in gradients(attend, laid).items())


def test_expanded_tensors_are_read_as_they_are() -> None:
    case = make_case(70, kv_heads=2)
    one = replace(case, k=case.k[:, :1].expand_as(case.k), v=case.v[:, :, :1].expand_as(case.v))
    assert_close(attend(one), recurrence(one))


@given(cases())
def test_shared_heads_are_repeated_heads(case: Case) -> None:
    share = case.q.shape[1] // case.k.shape[1]
    repeated = replace(case, k=case.k.repeat_interleave(share, 1), v=case.v.repeat_interleave(share, 1))
    assert all(map(torch.equal, attend(case), attend(repeated)))


@given(cases(), st.floats(-4, 4))
def test_output_is_linear_in_the_values(case: Case, factor: float) -> None:
    case = replace(case, initial_state=None)
    other = replace(case, v=case.v.flip(2))
    mixed = replace(case, v=case.v + factor * other.v)
    assert_close(attend(mixed)[0], attend(case)[0] + factor * attend(other)[0])


def test_results_are_the_same_bits_each_time_and_inputs_stay() -> None:
    case = make_case(200, decay="token").in_rounded(torch.bfloat16)
    before = case.map(torch.Tensor.clone)
    first, first_grads = attend(case), gradients(attend, case)
    assert all(map(torch.equal, attend(case), first))
    assert all(torch.equal(got, first_grads[name]) for name, got in gradients(attend, case).items())
    kept = ("q", "k", "v", "log_decay", "initial_state", "d_out", "d_state")
    assert all(torch.equal(getattr(case, name), getattr(before, name)) for name in kept)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in found)])
        return result


@pytest.mark.parametrize("decay", DECAYS)
def test_no_temporary_is_larger_than_the_inputs_of_a_long_sequence(decay: str) -> None:
    case = make_case(8192, batch=1, share=1, decay=decay, d=32, dv=32).in_rounded(torch.float32)
    with Largest() as seen:
        arguments = (case.q, case.k, case.v, case.log_decay, case.initial_state, case.scale)
        chunked.forward(*arguments)
        chunked.backward(case.d_out, case.d_state, *arguments, with_log_decay=decay != "none")
    assert seen.elements <= max(case.q.numel(), chunked.CHUNK**2 * 64)


# Full attention.


def full(case: Case) -> Result:
    return lightning_attention(
        case.q, case.k, case.v,
        scale=case.scale, initial_state=case.initial_state, return_state=True, causal=False,
    )  # fmt: skip


def plain_full(case: Case) -> Result:
    share = case.q.shape[1] // case.k.shape[1]
    k, v = (x.repeat_interleave(share, dim=1) for x in (case.k, case.v))
    state = k.mT @ v if case.initial_state is None else case.initial_state + k.mT @ v
    return case.scale * (case.q @ k.mT) @ v + case.scale * case.q @ (state - k.mT @ v), state


@given(cases(), st.integers(0, 20))
def test_full_attention_is_every_key_for_every_query(case: Case, queries: int) -> None:
    case = replace(case, q=case.q[:, :, :queries], d_out=case.d_out[:, :, :queries], log_decay=None)
    assert_close(full(case), plain_full(case))
    assert_close(gradients(full, case), gradients(plain_full, case))


@pytest.mark.parametrize("dtype", LOW)
def test_full_attention_is_as_good_as_eager(dtype: torch.dtype) -> None:
    case = replace(make_case(90, signed=False, with_state=False, decay="none"), log_decay=None).in_rounded(
        dtype
    )
    assert_same(full(case)[0], plain_full(case.map(torch.Tensor.double))[0], plain_full(case)[0])
