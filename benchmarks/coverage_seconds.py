"""Seconds of attnopt's passes beside Inductor's on the same graphs, a few architectures at the sizes of real models.

    python benchmarks/coverage_seconds.py [--layers N] [--width W] [--length S] [--only NAME ...]

Models of the coverage benchmark with a real width, head size and length, and a few layers (in a real model the others
are equal to these and share their validation). Each is compiled twice with nothing cached: once by Inductor alone, once
through attnopt. Inductor's time is that of its backend, without Dynamo's tracing and without the first run.
Claim: reading, choosing and validating take at most 5 % of it. Writes results/coverage_seconds.json.
"""

import argparse
import sys
from dataclasses import dataclass
from statistics import median
from typing import Any

import coverage
import coverage_zoo as zoo
import torch
from _record import write
from torch import nn

import attnopt
from attnopt.report import Report

MODELS = (
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "GptOssForCausalLM",
    "BloomForCausalLM",
    "DeepseekV3ForCausalLM",
    "MiniMaxForCausalLM",  # a Python loop over blocks of the sequence, unrolled by Dynamo
)
PASSES = ("shadow", "read", "choose", "validate", "splice")
MOST_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the models: layers, numbers to a token, tokens."""

    layers: int
    width: int
    length: int

    def rule(self, variant: zoo.Rule) -> zoo.Rule:
        """A rule of the zoo at these sizes; lengths and blocks in the configuration stay as they are."""
        shrunk = {
            name: size for name, size in variant.items() if not any(word in name for word in _OWN_LENGTHS)
        }
        return {
            r"^num_hidden_layers$|^n_layer$": self.layers,
            r"position_embeddings$|^n_positions$|^n_ctx$": 2 * self.length,
            r"^(hidden_size|n_embd|d_model)$": self.width,
            r"^(intermediate_size|n_inner)$": 2 * self.width,
            r"^(num_attention_heads|n_head)$": self.width // 128,
            r"^num_key_value_heads$": 4,
            r"^(head_dim|v_head_dim|qk_nope_head_dim)$": 128,
            r"^qk_rope_head_dim$": 64,
            **shrunk,
        }


#: Parts of the rules that would make sequences, windows and blocks tiny.
_OWN_LENGTHS = ("position", "max_seq", "chunk_size", "sliding_window", "block_size")


def deep(entry: zoo.Entry, sizes: Sizes) -> nn.Module:
    """A model of these sizes, by the first variant that runs on a few tokens."""
    for variant in zoo.variants():
        try:
            model = zoo.build_with(entry, "eager", sizes.rule(variant), MOST_PARAMETERS).eval()
            with torch.no_grad():
                model(**tokens(8))
        except Exception:  # noqa: BLE001, S112 - the next variant is tried
            continue
        return model
    raise RuntimeError(f"{entry.model} does not build at these sizes")


def tokens(length: int) -> dict[str, Any]:
    """The arguments of a forward over one sequence."""
    draw = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, 100, (1, length), generator=draw), "use_cache": False}


def seconds(model: nn.Module, backend: str, length: int) -> float:
    """Of the backend, in the first call, nothing cached."""
    from torch._dynamo.utils import calculate_time_spent, compilation_time_metrics

    torch._dynamo.reset()
    compilation_time_metrics.clear()
    with torch._inductor.utils.fresh_cache(), torch.no_grad():
        torch.compile(model, backend=backend)(**tokens(length))
    return float(calculate_time_spent()["backend_compile"])


def measure(entry: zoo.Entry, sizes: Sizes) -> dict[str, object]:
    """One model."""
    model = deep(entry, sizes)
    alone, known = seconds(model, "inductor", sizes.length), attnopt.reports()[-1:]
    through = seconds(model, "attnopt", sizes.length)
    made = _since(known)
    passes = {
        name: sum(graph.seconds.get(name, 0.0) for report in made for graph in report.graphs)
        for name in PASSES
    }
    return {
        "model": entry.model,
        "nodes": sum(graph.nodes_before for report in made for graph in report.graphs),
        "rewritten": sum(len(report.having("rewritten")) for report in made),
        "inductor": alone,
        "attnopt": through,
        "passes": passes,
        "share": (passes["read"] + passes["choose"] + passes["validate"]) / alone,
        "share_of_all": sum(passes.values()) / alone,
    }


def _since(known: tuple[Report, ...]) -> list[Report]:
    found: list[Report] = []
    for report in reversed(attnopt.reports()):
        if known and report is known[0]:
            break
        found.append(report)
    return found


def main() -> int:
    """0 if the claim holds for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    sizes = Sizes(given.layers, given.width, given.length)
    coverage.quiet()
    coverage.warm_up()
    rows = []
    for entry in zoo.entries("causal"):
        if entry.model in (given.only or MODELS):
            rows.append(measure(entry, sizes))
            print(rows[-1], flush=True)
    shares = [float(str(row["share"])) for row in rows]
    payload = {
        "layers": sizes.layers, "width": sizes.width, "length": sizes.length, "median_share": median(shares),
        "largest_share": max(shares), "rows": rows,
    }  # fmt: skip
    if not given.only:
        print(f"written to {write('coverage_seconds', payload)}")
    print(f"read, choose and validate: {median(shares):.1%} of Inductor's time, at most {max(shares):.1%}")
    return int(max(shares) > 0.05)


if __name__ == "__main__":
    sys.exit(main())
