"""Packed sequences: one call over sequences one behind the other is one call for each of them."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attnopt.errors import ShapeError, UnsupportedError
from attnopt.kernels.lightning import packed, triton_backward, triton_forward
from attnopt.kernels.lightning.op import lightning_attention

HAS_GPU = torch.cuda.is_available()
STARTS = (0, 5, 5, 38, 70, 71)
GPU = [pytest.param("cuda", d, marks=pytest.mark.gpu) for d in (torch.float32, torch.bfloat16, torch.float16)]
PLACES = [*([] if HAS_GPU else [("cpu", torch.float32), ("cpu", torch.float16)]), *GPU]


def inputs(dtype: torch.dtype, decay: str, device: str = "cpu") -> dict[str, Tensor | None]:
    """One key/value head for two query heads; D 8, Dv 5."""
    torch.manual_seed(0)
    rows, sequences = STARTS[-1], len(STARTS) - 1
    decays = {"none": None, "head": -0.3 * torch.rand(2), "token": -0.3 * torch.rand(1, 2, rows)}
    given = {
        "q": torch.randn(1, 2, rows, 8).to(dtype),
        "k": torch.randn(1, 1, rows, 8).to(dtype),
        "v": torch.randn(1, 1, rows, 5).to(dtype),
        "log_decay": decays[decay],
        "initial_state": torch.randn(sequences, 2, 8, 5),
    }
    return {name: None if x is None else x.to(device) for name, x in given.items()}


def wide(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.double().cpu() for name, x in given.items()}


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_a_packed_call_is_one_call_for_each_sequence(decay: str) -> None:
    given = inputs(torch.float64, decay)
    given["initial_state"] = given["initial_state"].double()
    out, state = lightning_attention(**given, scale=0.3, return_state=True, cu_seqlens=torch.tensor(STARTS))
    for i, (first, end) in enumerate(pairwise(STARTS)):
        alone = {name: x[:, :, first:end] for name, x in given.items() if name in "qkv"}
        steps = given["log_decay"] if decay != "token" else given["log_decay"][:, :, first:end]
        first_state = given["initial_state"][i : i + 1]
        o, s = lightning_attention(
            **alone, log_decay=steps, initial_state=first_state, scale=0.3, return_state=True
        )
        torch.testing.assert_close(out[:, :, first:end], o)
        torch.testing.assert_close(state[i : i + 1], s)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_packed_gradients_are_right(decay: str) -> None:
    given = inputs(torch.float64, decay)
    given["initial_state"] = given["initial_state"].double()
    leaves = [None if x is None else x.double().requires_grad_() for x in given.values()]

    def call(*tensors: Tensor) -> Tensor:
        named = dict(zip(given, tensors, strict=True))
        o, s = lightning_attention(**named, scale=0.3, return_state=True, cu_seqlens=torch.tensor(STARTS))
        return o.sum() * 0.1 + (s * s).sum()

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_the_kernel_packs_as_the_torch_path_does(device: str, dtype: torch.dtype, decay: str) -> None:
    given = inputs(dtype, decay, device)
    exact = wide(given)
    starts = torch.tensor(STARTS, device=device)
    d_out, d_state = torch.randn(1, 2, STARTS[-1], 5).to(dtype), torch.randn(len(STARTS) - 1, 2, 8, 5)
    got = triton_forward.forward(*given.values(), 0.3, starts)
    want = packed.forward(*exact.values(), 0.3, starts)
    assert_close(got[0], want[0], dtype)
    assert_close(got[1], want[1], dtype)
    decays = decay != "none"
    grads = triton_backward.backward(
        d_out.to(device), d_state.to(device), *given.values(), 0.3, starts, with_log_decay=decays
    )  # fmt: skip
    exact_grads = packed.backward(
        d_out.double(), d_state.double(), *exact.values(), 0.3, starts.cpu(), with_log_decay=decays
    )  # fmt: skip
    for name in ("q", "k", "v", *(["log_decay"] if decays else []), "initial_state"):
        assert_close(getattr(grads, name), getattr(exact_grads, name), dtype)


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Off by less than a few roundings of `dtype` in norm; rows are judged where nothing is packed."""
    assert (got.double().cpu() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_nothing_passes_from_one_packed_sequence_to_another() -> None:
    given = inputs(torch.float32, "head")
    starts = torch.tensor(STARTS)
    before = lightning_attention(**given, cu_seqlens=starts)
    for name in "qkv":
        given[name][:, :, 5:38] = torch.nan
    after = lightning_attention(**given, cu_seqlens=starts)
    rows = [*range(5), *range(38, STARTS[-1])]
    assert torch.equal(after[:, :, rows], before[:, :, rows])


def test_the_kernel_lets_nothing_pass_either() -> None:
    given = inputs(torch.float32, "token", "cuda" if HAS_GPU else "cpu")
    starts = torch.tensor(STARTS, device=given["q"].device)
    before = triton_forward.forward(*given.values(), 1.0, starts)[0]
    for name in "qkv":
        given[name][:, :, 5:38] = torch.nan
    after = triton_forward.forward(*given.values(), 1.0, starts)[0]
    rows = [*range(5), *range(38, STARTS[-1])]
    assert torch.equal(after[:, :, rows], before[:, :, rows])


def test_packed_calls_pass_opcheck() -> None:
    given = inputs(torch.float32, "head")
    arguments = (*(x.requires_grad_() for x in given.values()), 1.0, True, torch.tensor(STARTS))
    for with_state in (False, True):
        torch.library.opcheck(torch.ops.attnopt.lightning_attention.default, (*arguments, with_state))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"cu_seqlens": torch.tensor([0])}, ShapeError, r"wanted \(n \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([[0, 71]])}, ShapeError, r"wanted \(n \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([0.0, 71.0])}, ShapeError, "wanted int32 or int64"),
        ({"cu_seqlens": torch.tensor([0, 71]), "causal": False}, UnsupportedError, "causal=True"),
        ({"cu_seqlens": torch.tensor([0, 9, 71])}, ShapeError, "one state per query head"),
    ],
)
def test_what_cannot_be_packed_is_said(
    changes: dict[str, object], error: type[Exception], words: str
) -> None:
    given = inputs(torch.float32, "none")
    with pytest.raises(error, match=words):
        lightning_attention(**{**given, **changes})
