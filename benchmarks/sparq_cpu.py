"""SparQ decoding in plain torch on the CPU, beside dense decoding by scaled_dot_product_attention.

    python benchmarks/sparq_cpu.py --out benchmarks/results/sparq_cpu.json [--quick]

Milliseconds, medians of alternating runs. `k_t`: with the channel-major keys and the mean value that a cache keeps;
`k`: without them, as at a site of a graph.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnopt.kernels.sparq.op import sparq_attention

SHAPES = [
    (heads, kv_heads, sk, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for heads, kv_heads in ((32, 32), (32, 8))
    for sk in (4096, 16384)
]
REPEAT = 7


def timings(heads: int, kv_heads: int, sk: int, dtype: torch.dtype) -> dict[str, object]:
    """One row of the table."""
    q = torch.randn(1, heads, 1, 128, dtype=dtype)
    k, v = (torch.randn(1, kv_heads, sk, 128, dtype=dtype) for _ in range(2))
    k_t, mean = k.mT.contiguous(), v.mean(2, dtype=torch.float32)
    contenders: dict[str, Callable[[], Tensor]] = {
        "k_t": lambda: sparq_attention(q, k, v, k_t=k_t, v_mean=mean),
        "k": lambda: sparq_attention(q, k, v),
        "dense": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads),
    }
    times = _alternate(contenders)
    shape = f"B1 H{heads} KV{kv_heads} S{sk} D128 {str(dtype).removeprefix('torch.')}"
    return {"shape": shape, **times, "speedup": times["dense"] / times["k_t"]}


def _alternate(contenders: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    drawn: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPEAT + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            drawn[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times[1:]) for name, times in drawn.items()}


def main() -> int:
    """Prints the table, and writes it when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="two shapes instead of eight")
    chosen = parser.parse_args()
    rows = [timings(*shape) for shape in (SHAPES[::5] if chosen.quick else SHAPES)]
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if chosen.out:
        chosen.out.write_text(json.dumps({"environment": environment, "timings": rows}, indent=1) + "\n")
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
