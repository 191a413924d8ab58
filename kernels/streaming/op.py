"""The differentiable op behind structured softmax attention: causal, windows, sinks, prefixes, padding, biases.

Sinks + window: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels._once import differentiable_once
from attnopt.kernels.streaming.checks import check
from attnopt.kernels.streaming.problem import Answer, Gradients, Problem, Wanted
from attnopt.kernels.streaming.reach import reach


def four_dimensional(x: Tensor) -> Tensor:
    """`x` with leading dimensions of one, as broadcasting adds them."""
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x


@torch.library.custom_op("attnopt::streaming_attention", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_padding: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    offset: int | None,
    window: int | None,
    sinks: int,
    prefix: int,
    softcap: float | None,
    empty_row: str,
    slopes: Tensor | None,
    diagonal: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(softcap(scale q k^T) + bias) v over the visible keys: (o, lse, log_sum).

    Visible: ((j <= i + offset and (j > i + offset - window or j < sinks)) or j < prefix) and key_padding[b, j] and
    mask[b, h, i, j]; offset None is not causal, window None has no lower end. slopes (B or 1, H) add
    slopes * (j - i - diagonal), or -slopes * |j - i - diagonal| if `symmetric` (ALiBi, arXiv:2108.12409). Tensors as
    in `problem.Problem`, results as in `problem.Answer`. A row whose largest logit is -inf returns NaN, zeros or the
    mean of all values, as `empty_row` says ("nan", "zero", "uniform"), and passes no gradient to q, k, bias, slopes;
    the mean does to v.
    """
    problem = _problem(
        *(q, k, v, bias, mask, key_padding, sink_logits),
        *(scale, offset, window, sinks, prefix, softcap, empty_row),
        *(slopes, diagonal, symmetric),
    )
    answer = _forward(problem)
    return answer.o, answer.lse, answer.log_sum


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, *rest)
    rows = q.shape[:3]
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty((*rows, v.shape[3])),
        q.new_empty(rows, dtype=statistics),
        q.new_empty(rows, dtype=statistics),
    )


@torch.library.custom_op("attnopt::streaming_attention_backward", mutates_args=())
def attend_backward(
    do: Tensor,
    dlse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    log_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_padding: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    offset: int | None,
    window: int | None,
    sinks: int,
    prefix: int,
    softcap: float | None,
    empty_row: str,
    slopes: Tensor | None,
    diagonal: int,
    symmetric: bool,
    bias_gradient: bool,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias, sink_logits and slopes; the last three have no elements where they are not wanted."""
    problem = _problem(
        *(q, k, v, bias, mask, key_padding, sink_logits),
        *(scale, offset, window, sinks, prefix, softcap, empty_row),
        *(slopes, diagonal, symmetric),
    )
    found = _backward(problem, Answer(o, lse, log_sum), do, dlse, Wanted(bias_gradient, slope_gradient))
    extras = (found.bias, found.sink_logits, found.slopes)
    dbias, dsinks, dslopes = (q.new_empty(0) if x is None else x for x in extras)
    return found.q, found.k, found.v, dbias, dsinks, dslopes


@attend_backward.register_fake
def _(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, log_sum: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del do, dlse, o, lse, log_sum
    (q, k, v, bias), sink_logits, slopes = rest[:4], rest[6], rest[14]
    bias_gradient, slope_gradient = rest[17:]
    wanted = (bias if bias_gradient else None, sink_logits, slopes if slope_gradient else None)
    dbias, dsinks, dslopes = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in wanted)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias, dsinks, dslopes


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*output, *inputs[:7], inputs[14])
    ctx.numbers = (*inputs[7:14], *inputs[15:])


def _differentiate(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> Sequence[Tensor | None]:
    *saved, slopes = ctx.saved_tensors
    numbers, (diagonal, symmetric) = ctx.numbers[:7], ctx.numbers[7:]
    do = torch.zeros_like(saved[0]) if do is None else do
    asked = ctx.needs_input_grad
    *found, dbias, dsinks, dslopes = attend_backward(
        do, dlse, *saved, *numbers, slopes, diagonal, symmetric, asked[3], asked[14]
    )
    dbias, dsinks, dslopes = (x if asked[n] else None for n, x in ((3, dbias), (6, dsinks), (14, dslopes)))
    return (*found, dbias, None, None, dsinks, *(None for _ in numbers), dslopes, None, None)


attend.register_autograd(_differentiate, setup_context=_save)
differentiable_once(attend_backward, "streaming")


def _problem(*given: Any) -> Problem:
    """The arguments of `attend`, checked."""
    check(*given)
    q, k, *_ = given
    offset, window, sinks, prefix = given[8:12]
    sizes = {"rows": q.shape[2], "columns": k.shape[2]}
    where = reach(offset=offset, window=window, sinks=sinks, prefix=prefix, **sizes)
    fields = (*given[:8], where, *given[12:])
    return Problem(*fields)


def _forward(problem: Problem) -> Answer:
    with _own_precision(problem):
        if not _goes_to_triton(problem):
            from attnopt.kernels.streaming import chunked  # what runs is imported where it runs

            return chunked.forward(problem)
        from attnopt.kernels.streaming import (
            triton_forward,
            triton_hopper,
        )  # importing attnopt must not import triton

        return (triton_hopper if triton_hopper.serves(problem) else triton_forward).launch(problem)


def _backward(problem: Problem, answer: Answer, do: Tensor, dlse: Tensor | None, wanted: Wanted) -> Gradients:
    with _own_precision(problem):
        if wanted.bias or wanted.slopes or not _goes_to_triton(problem):
            from attnopt.kernels.streaming import chunked  # as above

            return chunked.backward(problem, answer, do, dlse, wanted)
        from attnopt.kernels.streaming import triton_backward  # as above

        return triton_backward.launch(problem, answer, do, dlse)


def _own_precision(problem: Problem) -> AbstractContextManager[None]:
    """Autocast reaches into the implementation of a custom op, and would take its fp32 products to half."""
    return torch.autocast(problem.q.device.type, enabled=False)


def _goes_to_triton(problem: Problem) -> bool:
    """Half types on a GPU. Exact fp32 and fp64 products have no tensor cores: torch's matmul is the better one there.

    Triton cannot launch an empty grid, so a tensor without elements goes to torch as well.
    """
    half = problem.q.dtype in {torch.float16, torch.bfloat16}
    filled = min(problem.q.numel(), problem.k.numel(), problem.v.numel()) > 0
    return problem.q.is_cuda and half and filled and find_spec("triton") is not None
