"""Seconds of attnopt's passes beside Inductor's compile time of the same model, on a few architectures.

    python benchmarks/coverage_seconds.py [--layers N]

Models of the coverage benchmark with more layers (equal layers share one validation, as in a real model). Each is
compiled twice with Inductor and nothing cached: once by Inductor alone, once through attnopt.
Claim: reading, choosing and validating take at most 5 % of Inductor's time. Writes results/coverage_seconds.json.
"""

import argparse
import sys
import time
from statistics import median

import coverage
import coverage_zoo as zoo
import torch
from _record import write
from coverage_modes import PLAIN
from coverage_subjects import LENGTH, inputs
from torch import nn

import attnopt

MODELS = (
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
)
PASSES = ("shadow", "read", "choose", "validate", "splice")


def deep(entry: zoo.Entry, layers: int) -> nn.Module:
    """A tiny model with this many layers, by the first variant that runs."""
    for rule in zoo.variants():
        try:
            model = zoo.build_with(entry, "eager", {r"^num_hidden_layers$|^n_layer$": layers, **rule}).eval()
            with torch.no_grad():
                model(**inputs(model, entry.family, PLAIN))
        except Exception:  # noqa: BLE001, S112 - the next variant is tried
            continue
        return model
    raise RuntimeError(f"{entry.model} does not build with {layers} layers")


def seconds(model: nn.Module, backend: str) -> float:
    """Of the first call, nothing cached."""
    torch._dynamo.reset()
    held = inputs(model, "causal", PLAIN)
    with torch._inductor.utils.fresh_cache(), torch.no_grad():
        start = time.perf_counter()
        torch.compile(model, backend=backend)(**held)
        return time.perf_counter() - start


def measure(entry: zoo.Entry, layers: int) -> dict[str, object]:
    """One model."""
    model = deep(entry, layers)
    alone, through = seconds(model, "inductor"), seconds(model, "attnopt")
    report = attnopt.reports()[-1]
    passes = {name: sum(graph.seconds.get(name, 0.0) for graph in report.graphs) for name in PASSES}
    ours = passes["read"] + passes["choose"] + passes["validate"]
    found = {
        "model": entry.model,
        "rewritten": len(report.having("rewritten")),
        "inductor": alone,
        "attnopt": through,
    }
    return {**found, "passes": passes, "share": ours / alone}


def main() -> int:
    """0 if the claim holds for the median model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    layers = parser.parse_args().layers
    coverage.quiet()
    coverage.warm_up()
    rows = []
    for entry in zoo.entries("causal"):
        if entry.model in MODELS:
            rows.append(measure(entry, layers))
            print(rows[-1], flush=True)
    share = median(float(str(row["share"])) for row in rows)
    payload = {"layers": layers, "length": LENGTH, "median_share": share, "rows": rows}
    print(
        f"read, choose and validate: {share:.1%} of Inductor's time; written to {write('coverage_seconds', payload)}"
    )
    return int(share > 0.05)


if __name__ == "__main__":
    sys.exit(main())
