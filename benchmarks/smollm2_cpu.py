"""SmolLM2-135M at 2,048 tokens on the CPU: seconds per forward and compile time, attnopt beside Inductor alone.

    python benchmarks/smollm2_cpu.py [--tokens N] [--repeat N]

Both compile the same eager-spelled model with the same inner compiler; forwards are timed in turns (A, B, A, B, ...)
and the ratio is taken pair by pair, so that other work on the machine meets both. Writes results/smollm2_cpu.json.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _record import write
from torch import Tensor

import attnopt
from attnopt.report import Report

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import smollm2

BACKENDS = ("inductor", "attnopt")


def compiled(name: str, model: torch.nn.Module, ids: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
    """The compiled model and the seconds of its first call, nothing cached."""
    torch._dynamo.reset()
    function = torch.compile(model, backend=name)
    with torch._inductor.utils.fresh_cache():
        start = time.perf_counter()
        function(ids)
        return function, time.perf_counter() - start


def seconds(function: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Wall time of one forward."""
    start = time.perf_counter()
    function(ids)
    return time.perf_counter() - start


def passes(report: Report) -> dict[str, float]:
    """attnopt's own seconds by pass, over all graphs."""
    found: dict[str, float] = {}
    for graph in report.graphs:
        for name, value in graph.seconds.items():
            found[name] = found.get(name, 0.0) + value
    return {name: round(value, 4) for name, value in found.items()}


@torch.inference_mode()
def main(tokens: int, repeat: int) -> None:
    """Compiles both, times them in turns, prints and writes the figures."""
    model, ids = smollm2.model(), smollm2.text_ids(tokens)
    functions, first = {}, {}
    for name in BACKENDS:
        functions[name], first[name] = compiled(name, model, ids)
        print(f"{name}: first call {first[name]:.1f} s", flush=True)
    report = attnopt.reports()[-1]
    worst = float((functions["attnopt"](ids) - functions["inductor"](ids)).abs().max())
    rounds = [{name: seconds(functions[name], ids) for name in BACKENDS} for _ in range(repeat)]
    ratios = [r["attnopt"] / r["inductor"] for r in rounds]
    payload = {
        "tokens": tokens,
        "sites": {"found": len(report.attention), "rewritten": len(report.having("rewritten"))},
        "forward_seconds": {
            name: {"median": median(v), "min": min(v), "max": max(v)}
            for name in BACKENDS
            for v in [[r[name] for r in rounds]]
        },
        "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "first_call_seconds": first,
        "attnopt_seconds": passes(report),
        "largest_difference_of_logits": worst,
    }
    path = write("smollm2_cpu", payload)
    print(
        f"sites {payload['sites']}, ratio {payload['ratio']}, passes {payload['attnopt_seconds']}\nwritten to {path}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    main(given.tokens, given.repeat)
