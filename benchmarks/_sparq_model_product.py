"""A row or two times a matrix: what most of a decoding step without attention is. The matrix is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows that the kernel takes.
MOST = 2
#: Outputs of a program, and inputs that it takes at a time.
OUTPUTS, INPUTS = 4, 1024


@torch.library.custom_op("attnopt_benchmarks::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, 1, K), weight (N, K), both contiguous -> x @ weight.mT (B, 1, N), summed in fp32; B at most MOST."""
    return launch(x, weight) if x.is_cuda else x @ weight.mT


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def launch(x: Tensor, weight: Tensor) -> Tensor:
    """The same on a GPU."""
    (n, k), out = weight.shape, x.new_empty(*x.shape[:-1], weight.shape[0])
    if x.shape[0] > MOST or not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(
            f"x {tuple(x.shape)}, {x.stride()}; wanted at most {MOST} rows, one behind the other"
        )
    grid = (triton.cdiv(n, OUTPUTS),)
    _product[grid](x, weight, out, n, k, HAS_TWO=x.shape[0] == 2, OUTPUTS=OUTPUTS, INPUTS=INPUTS, num_warps=4)
    return out


@triton.jit
def _product(  # noqa: ANN202
    x_ptr, w_ptr, out_ptr, n, k, HAS_TWO: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr  # noqa: ANN001, N803
):  # fmt: skip
    """Program p: outputs p * OUTPUTS and the next ones. x is loaded anew for each, in the layout of the weights."""
    row, c = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    w_row = w_ptr + row.to(tl.int64)[:, None] * k
    one, two = tl.zeros((OUTPUTS, INPUTS), tl.float32), tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, k, INPUTS):
        at = tl.broadcast_to((start + c)[None, :], (OUTPUTS, INPUTS))
        there = (row < n)[:, None] & (at < k)
        w = tl.load(w_row + at, mask=there, other=0.0).to(tl.float32)
        one += w * tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        if HAS_TWO:
            two += w * tl.load(x_ptr + k + at, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(one, 1).to(out_ptr.dtype.element_ty), mask=row < n)
    if HAS_TWO:
        tl.store(out_ptr + n + row, tl.sum(two, 1).to(out_ptr.dtype.element_ty), mask=row < n)
