"""What every Triton kernel here shares: where and when it may run, dot precision, offsets that cannot overflow."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

#: Triton decides at decoration time whether `@triton.jit` interprets; so is this read once, at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether a Triton kernel can be launched on the device of `tensor`."""
    return tensor.is_cuda or INTERPRETED


@contextmanager
def on_device_of(tensor: torch.Tensor) -> Iterator[None]:
    """Makes the device of `tensor` current, so that the launch goes to its current stream."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def bind_context(tensor: torch.Tensor) -> None:
    """Binds the CUDA context to this thread, which encoding a tensor descriptor needs and autograd's threads lack.

    Any work submitted by the runtime does it; this is the least.
    """
    if tensor.is_cuda:
        tensor.new_zeros(1)


def can_overlap(tensor: torch.Tensor) -> bool:
    """Whether a launch can be set up while the one before it ends (programmatic dependent launch): Hopper and later.

    A kernel launched with `launch_pdl=True` has to call `await_launch` before it touches memory.
    """
    if not tensor.is_cuda or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: exactly, unless the user turned TF32 on for torch's own matmul."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def next_power_of_two(n: int, *, least: int = 16) -> int:
    """The smallest power of two >= n and >= `least` (tensor cores want tiles of 16 or more)."""
    return max(least, triton.next_power_of_2(n))


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b with fp32 accumulation; fp32 operands in the named precision."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def offset(index, stride):
    """index * stride in 64 bits: a tensor may have more than 2^31 elements, or strides that span them."""
    return index.to(tl.int64) * stride


@triton.jit
def await_launch(OVERLAP: tl.constexpr):
    """Waits until all that was launched before has written its results; lets the next launch be set up meanwhile."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def fetch_ahead(pointers):
    """Asks for the cache lines at `pointers` to be brought into L2. Nothing is read, so it may precede the waiting."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
