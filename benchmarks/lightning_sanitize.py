"""A few launches of every lightning kernel at small sizes, for compute-sanitizer; prints "done" when all are through.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1          # each tensor is an allocation of its own, with real borders
    python benchmarks/lightning_sanitize.py          # first without: compiles, so that the tools only run
    python benchmarks/lightning_sanitize.py --tiny
    compute-sanitizer --tool memcheck  --error-exitcode 1 python benchmarks/lightning_sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python benchmarks/lightning_sanitize.py --pointers
    compute-sanitizer --tool synccheck --error-exitcode 1 python benchmarks/lightning_sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 --racecheck-report all \
        python benchmarks/lightning_sanitize.py --tiny

initcheck takes what a tensor descriptor has written for memory that nobody has, hence --pointers there.

Exit code 1 of a tool, or a missing "done", is a finding. Operands are made on the host and copied, results are read
back to it, so that nothing but the launches and what torch does around them runs on the device. --tiny: the shortest
sequences that have several segments, for racecheck, which is slow. --interpreted: on the CPU (bf16 is wrong
there: --dtypes fp16 fp32), to check the script.
"""

import argparse
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.kernels.lightning import triton_backward, triton_forward, triton_step
from attnopt.kernels.lightning.triton_tiles import Tiles

DECAYS = ("none", "head", "token")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Launch:
    """One forward and backward; in two segments of chunks of `chunk` rows, or with the tiles chosen for the shape."""

    dtype: torch.dtype
    d: int
    dv: int
    length: int
    decay: str
    chunk: int | None = None
    kv_heads: int = 2
    shift: int = 0  # elements by which tensors miss the alignment of descriptors
    packed: tuple[int, ...] = ()


def launches(dtype: torch.dtype, *, tiny: bool) -> list[Launch]:
    """Every decay, one pass and segments, descriptors and pointers, ragged widths, packed sequences."""
    chunk = 16 if dtype == torch.float32 or tiny else 64
    long = 4 * chunk + 5
    return [
        *(Launch(dtype, 32, 32, long, decay, chunk) for decay in DECAYS),
        Launch(dtype, 32, 32, long, "token", chunk, kv_heads=1, shift=1),
        Launch(dtype, 40, 24, chunk + 3, "head"),
        Launch(dtype, 32, 32, 0, "token", packed=(chunk + 1, 0, 3)),
        *(Launch(dtype, 128, 128, long, decay) for decay in ("head", "token") if not tiny),
    ]


def on_device(device: str, *shape: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
    """Numbers from the host, `shift` elements behind the start of their memory."""
    size = torch.Size(shape).numel()
    flat = (torch.rand(size + shift) + 0.5).to(dtype).to(device)
    return flat[shift:].view(shape)


def run(launch: Launch, device: str) -> None:
    """Forward and backward, and results read back."""
    x, heads = launch, 2
    sequences, length = len(x.packed) or 1, sum(x.packed) or x.length

    def rows(heads: int, width: int) -> Tensor:
        return on_device(device, 1, heads, length, width, dtype=x.dtype, shift=x.shift)

    q, k, v, d_out = rows(heads, x.d), rows(x.kv_heads, x.d), rows(x.kv_heads, x.dv), rows(heads, x.dv)
    state, d_state = (on_device(device, sequences, heads, x.d, x.dv) for _ in range(2))
    shape = {"none": None, "head": (heads,), "token": (1, heads, length)}[x.decay]
    decay = None if shape is None else (-0.1 * torch.rand(shape)).to(device)
    starts = torch.tensor([0, *x.packed]).cumsum(0).to(device) if x.packed else None
    tiles = None if x.chunk is None else Tiles(x.chunk, 32, 2, pieces=2)
    inputs = (q, k, v, decay, state, 0.1)
    out = triton_forward.forward(*inputs, starts=starts, tiles=tiles)
    grads = triton_backward.backward(
        d_out, d_state, *inputs, starts, with_log_decay=decay is not None, tiles=tiles
    )
    read_back(*out, grads.q, grads.k, grads.v, grads.initial_state)


def run_step(dtype: torch.dtype, device: str) -> None:
    """Two one-token steps into one state."""
    state, decay = on_device(device, 2, 4, 40, 24), (-0.1 * torch.rand(2, 4)).to(device)
    for _ in range(2):
        q, k = (on_device(device, 2, heads, 40, dtype=dtype) for heads in (4, 2))
        read_back(triton_step.step(q, k, on_device(device, 2, 2, 24, dtype=dtype), state, decay, 0.1))
    read_back(state)


def read_back(*found: Tensor) -> None:
    """Copies results to the host; what was not written, or is not finite, is an error."""
    for x in found:
        if not x.cpu().isfinite().all():
            raise SystemExit(f"a result of shape {tuple(x.shape)} is not finite")


def main() -> int:
    """0 if every launch returned finite numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="for racecheck")
    parser.add_argument("--pointers", action="store_true", help="no descriptors: for initcheck")
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--interpreted", action="store_true", help="on the CPU; start with TRITON_INTERPRET=1"
    )
    arguments = parser.parse_args()
    if not (arguments.interpreted or torch.cuda.is_available()):
        print("left out: no CUDA device is here")
        return 0
    torch.manual_seed(0)
    device = "cpu" if arguments.interpreted else "cuda"
    for dtype in (DTYPES[name] for name in arguments.dtypes):
        for launch in launches(dtype, tiny=arguments.tiny):
            run(replace(launch, shift=1) if arguments.pointers else launch, device)
        run_step(dtype, device)
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
