"""Sinks + sliding window in plain torch on the CPU, beside eager and scaled_dot_product_attention with a dense mask.

    python benchmarks/streaming_cpu.py [--out FILE] [--quick]

Seconds, medians; fp32, B1 H8 D64, 4 sinks. The second table shows how the time of each grows with the length.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _record import measure, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnopt.kernels.streaming.places import streaming_attention

HEADS, WIDTH, SINKS = 8, 64, 4
LENGTH, WINDOWS = 4096, (256, 1024)
GROWTH = (1024, 2048, 4096, 8192)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_mask(length: int, window: int) -> Tensor:
    """bool (N, N): what the mask costs when it is written out."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    return (j <= i) & ((j > i - window) | (j < SINKS))


def contenders(length: int, window: int) -> dict[str, Attention]:
    """Three ways to the same numbers."""
    mask = dense_mask(length, window)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    return {
        "attnopt": lambda q, k, v: streaming_attention(q, k, v, sinks=SINKS, window=window),
        "eager": eager,
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }


def timings(length: int, window: int, repeat: int) -> dict[str, object]:
    """One row: forward, and forward with backward, of each contender."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3)]
    row: dict[str, object] = {"length": length, "window": window}
    outputs = {}
    for name, attention in contenders(length, window).items():
        with torch.no_grad():
            outputs[name] = attention(*inputs)
            row[name] = measure(lambda run=attention: run(*inputs), repeat)["median"]
        row[f"{name} + backward"] = measure(lambda run=attention: _both(run, inputs), repeat)["median"]
    worst = max(float((x - outputs["eager"]).abs().max()) for x in outputs.values())
    if worst > 1e-4:
        raise AssertionError(f"the contenders differ by {worst}")
    return row


def _both(attention: Attention, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attention(*inputs).sum(), inputs)


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="short lengths, few repeats")
    chosen = parser.parse_args()
    repeat, length = (2, 1024) if chosen.quick else (5, LENGTH)
    rows = [timings(length, window, repeat) for window in WINDOWS]
    growth = [timings(n, WINDOWS[0], repeat) for n in (GROWTH[:2] if chosen.quick else GROWTH)]
    written = write("streaming_cpu", {"windows": rows, "growth": growth}, chosen.out)
    for title, table in (("windows", rows), ("growth", growth)):
        print(f"\n{title}\n" + " | ".join(table[0]))
        for row in table:
            print(" | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()))
    print(f"\nwritten to {written}")


if __name__ == "__main__":
    main()
