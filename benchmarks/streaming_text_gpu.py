"""SmolLM2-135M reads all of Austen, and four million tokens, as a stream of attention sinks and a window.

    python benchmarks/_smollm2_pack.py build/smollm2 --texts Rdata.rdb     once, where the weights can be installed
    python benchmarks/streaming_text_gpu.py [--weights build/smollm2] [--parts a,b,c,d] [--seconds 90] [--out FILE]
    python benchmarks/streaming_text_gpu.py --tiny     random weights on the CPU; writes nothing unless --out
    python benchmarks/streaming_text_gpu.py --plot     draws docs/streaming_text.svg from FILE

a. All six novels as one text: perplexity of a stream of 4 sinks + 1,020 keys against a sliding window with
   recomputation (each token predicted from the last 1,024 tokens as a text of their own), against other numbers of
   sinks with as many keys, and against full attention over the first 32k tokens. The stream predicts every token, in
   segments, which is equal to one at a time (part c). Recomputation costs 1,024 tokens for each one, so that it is done
   at positions drawn at random, as many as time allows; both are compared at the same positions, and the standard error
   of that sample is told.
b. 4 million tokens, the novels repeated (a token depends on 30,574 before it, a round is 927,511 long): perplexity,
   memory, and ms of a token where some are decoded one by one. At 1,000 random positions the logits are compared with
   those of a fresh text of all that they depend on, which stands at other positions; at some, both with fp32 by plain
   torch.
c. A prompt of 64k tokens in parallel and token by token (CUDA graphs, both): equal, and how much faster.
d. Latency of a token, whole model and head, as CUDA graphs: a step of the stream against recomputing a window of as
   many keys (the library's fused attention; N x N spelled out). SmolLM2; and random weights in the shapes of
   Llama-2-7B, which the paper timed (its embedding used as head).

No part begins anything new after --seconds; each replaces its own figures in FILE. Claim: arXiv 2309.17453.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from _record import RESULTS, ROOT, environment, write
from _smollm2_gpu import LISTED, Llama, load, random_model, tokens
from _streaming_text_parts import millions, novels
from _streaming_text_plan import TINY, TINY_SIZES, Bench, Plan, Row, Text
from _streaming_text_report import PLOT, claims, plot, table
from _streaming_text_speed import latency, prefill

NAME = "streaming_text_gpu"
PARTS: dict[str, Callable[[Bench, float], Row]] = {"a": novels, "b": millions, "c": prefill, "d": latency}


def bench_of(plan: Plan, folder: Path, device: torch.device, dtype: torch.dtype) -> Bench:
    """SmolLM2 and the novels."""
    return Bench(plan, load(folder, device, dtype), load(folder, device, torch.float32), Text(tokens(folder)))


def tiny_bench(length: int = 500) -> Bench:
    """Random weights and a random text, on the CPU; the model's own dtype is bfloat16 here too."""
    cpu = torch.device("cpu")
    wide = random_model(TINY_SIZES, cpu, torch.float32)
    return Bench(TINY, narrowed(wide), wide, Text(torch.randint(TINY_SIZES.vocabulary, (length,))))


def narrowed(model: Llama) -> Llama:
    """The same weights, rounded to bfloat16."""
    other = random_model(model.sizes, torch.device("cpu"), torch.bfloat16)
    for mine, theirs in zip(other.tensors(), model.tensors(), strict=True):
        mine.copy_(theirs)
    return other


def run(bench: Bench, parts: list[str], seconds: float, out: Path | None) -> Row:
    """The rows of the parts; written to `out` after each, beside those that it has already."""
    held = json.loads(out.read_text())["parts"] if out is not None and out.exists() else {}
    for part in parts:
        held[part] = {**PARTS[part](bench, seconds), "environment": environment()}
        print(table({part: held[part]}), *claims({part: held[part]}), sep="\n", flush=True)
        if out is not None:
            write(NAME, {"parts": held}, out)
    return held


def main() -> int:
    """Runs the parts, or tells what is missing."""
    given = parse()
    out = given.out or (None if given.tiny else RESULTS / f"{NAME}.json")
    if given.plot:
        plot(json.loads((out or RESULTS / f"{NAME}.json").read_text())["parts"])
        print(PLOT)
        return 0
    if not given.tiny and not list(given.weights.glob(f"part*/{LISTED}")):
        print(
            f"left out: no weights in {given.weights}; run: python benchmarks/_smollm2_pack.py {given.weights}"
        )
        return 0
    place = torch.device(given.device), getattr(torch, given.dtype)
    bench = tiny_bench() if given.tiny else bench_of(Plan(compiled=given.compile), given.weights, *place)
    run(bench, given.parts.split(","), given.seconds, out)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=ROOT / "build" / "smollm2", help="the packed parts")
    parser.add_argument("--parts", default="a,b,c,d", help="which, in this order")
    parser.add_argument("--seconds", type=float, default=90.0, help="of each part")
    parser.add_argument("--compile", action="store_true", help="part d with Inductor, a minute or two more")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and cache")
    parser.add_argument("--out", type=Path, help=f"where the JSON is (default: results/{NAME}.json)")
    parser.add_argument("--tiny", action="store_true", help="random weights on the CPU")
    parser.add_argument("--plot", action="store_true", help=f"only draw {PLOT.name} from what is there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
