"""A language model of 382 million parameters trained at 1k to 128k tokens: a linear one through attnopt, and its peers.

    python benchmarks/linear_model_gpu.py [--seconds 240] [--out FILE]    goes on where FILE stopped; a table at the end
    python benchmarks/linear_model_gpu.py --quick    two layers at two lengths, a minute; writes nothing unless --out
    python benchmarks/linear_model_gpu.py --tiny     two layers on the CPU; writes nothing unless --out
    python benchmarks/linear_model_gpu.py --plot     draws docs/linear_model.svg from FILE

Claim: trained with as many tokens in each step, a TransNormer spelled N x N keeps 95 % of its tokens/s from 1k to 128k,
while softmax attention falls (Lightning Attention-2, arXiv:2401.04658, figure 1).

Alike in all forms: 131,072 tokens a step, bf16 weights and AdamW states, every layer checkpointed (without, 24 layers
of that many tokens do not fit 80 GB), the loss in chunks of 8,192 tokens, random ids of which a few are frequent.
A layer is compiled by itself, once for all 24, and anew for each length. The forms:
    attnopt    TransNormer spelled N x N, through torch.compile(backend="attnopt")
    fla        the same, with fla's chunk_simple_gla called by hand, under Inductor
    softmax    LLaMA with SDPA (cuDNN, or flash where that cannot), under Inductor
    plain      TransNormer spelled N x N under Inductor alone, where that fits
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from _linear_model_report import PLOT, Row, line, plot, summary, table
from _linear_models import (
    Decoder,
    FlaLayer,
    LlamaLayer,
    Place,
    RunLayer,
    Sizes,
    TransNormerLayer,
    batches,
    call_layer,
    chunked_loss,
    cross_entropy_sum,
    parameters_of,
)
from _record import RESULTS, write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnopt
from attnopt.backend import attnopt as compiler
from attnopt.report import Report

NAME = "linear_model_gpu"
LAYERS: dict[str, type[nn.Module]] = {
    "attnopt": TransNormerLayer,
    "fla": FlaLayer,
    "softmax": LlamaLayer,
    "plain": TransNormerLayer,
}
LONGEST_PLAIN = 4096
#: Seconds after which two timed steps are enough.
ENOUGH = 8.0
#: What the linear model must keep of its tokens/s at the shortest length.
LEAST_KEPT = 0.95


@dataclass(frozen=True)
class Plan:
    """What is run: `lengths` in the order of their weight for the claim, each for all forms before the next.

    tokens: of one step, in all sequences together. inner: who compiles what attnopt leaves, and the other forms.
    """

    sizes: Sizes = field(default_factory=Sizes)
    tokens: int = 131072
    lengths: tuple[int, ...] = (131072, 1024, 16384, 4096, 65536, 2048, 32768, 8192)
    forms: tuple[str, ...] = tuple(LAYERS)
    steps: int = 3
    chunk: int = 8192
    device: str = "cuda"
    dtype: str = "bfloat16"
    inner: str = "inductor"

    @property
    def place(self) -> Place:
        """Of the parameters."""
        return Place(torch.device(self.device), getattr(torch, self.dtype))

    @property
    def points(self) -> Iterator[tuple[str, int]]:
        """(form, length), the plain form last."""
        for plain in (False, True):
            for length in self.lengths:
                for form in self.forms:
                    if (form == "plain") == plain and (not plain or length <= LONGEST_PLAIN):
                        yield form, length


QUICK = Plan(sizes=Sizes(layers=2), lengths=(131072, 1024), steps=2)
TINY = Plan(
    Sizes(layers=2, heads=2, dim=16, inner=48, llama_inner=56, vocabulary=256), 512, (512, 128), steps=2,
    chunk=200, device="cpu", dtype="float32", inner="aot_eager",
)  # fmt: skip


# One point.


@dataclass(frozen=True)
class Trainer:
    """A model, and what runs its layers and its loss."""

    model: Decoder
    run_layer: RunLayer
    run_loss: Callable[..., Tensor]
    optimiser: torch.optim.Optimizer
    chunk: int

    def step(self, ids: Tensor) -> Tensor:
        """One step on (B, N); the loss before it. Each token is asked for the next."""
        self.optimiser.zero_grad()
        hidden = self.model(ids, self.run_layer)
        weight = self.model.embedding.weight
        loss = chunked_loss(hidden, weight, ids.roll(-1, 1), self.chunk, self.run_loss)
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def trainer(form: str, plan: Plan) -> Trainer:
    """A fresh model, the same for each length."""
    gc.collect()
    torch.manual_seed(0)
    model = Decoder(LAYERS[form], plan.sizes, plan.place)
    options = {"inner": plan.inner, "strict": True} if form == "attnopt" else None
    backend = (
        compiler if form == "attnopt" else plan.inner
    )  # by value: a checkout on the path registers no name
    return Trainer(
        model,
        torch.compile(call_layer, backend=backend, options=options, dynamic=False),
        torch.compile(cross_entropy_sum, backend=plan.inner, dynamic=False),
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        plan.chunk,
    )


def seconds_of(run: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """How long one call takes on the device, and the number that it returns."""
    wait(device)
    begin = time.perf_counter()
    value = run()
    wait(device)
    return time.perf_counter() - begin, value.item()


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def kernels_of_softmax(device: str) -> AbstractContextManager[None]:
    """cuDNN's attention where it can serve, else flash; never N x N."""
    if device != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)


def run_point(form: str, length: int, plan: Plan) -> Row:
    """Trains for a few steps and reports; the first step compiles, and is not counted."""
    earlier = attnopt.reports()
    train, data = trainer(form, plan), batches(length, plan.tokens, plan.sizes, plan.device)
    row: Row = {"form": form, "length": length, "parameters": parameters_of(train.model)}
    row["bytes_before"] = held_bytes(plan.device)
    with kernels_of_softmax(plan.device), torch._dynamo.config.patch(recompile_limit=len(LAYERS) * 2**5):
        first, loss = seconds_of(lambda: train.step(next(data)), plan.device)
        row["gradient_norm"] = gradient_norm(train.model)
        begin_counting(plan.device)
        seconds, losses = [], [loss]
        while len(seconds) < plan.steps and (len(seconds) < 2 or sum(seconds) < ENOUGH):
            ids = next(data)
            spent, loss = seconds_of(lambda ids=ids: train.step(ids), plan.device)
            seconds.append(spent)
            losses.append(loss)
    row |= {"first_step_seconds": first, "seconds": seconds, "losses": losses}
    row |= {"tokens_per_second": plan.tokens / median(seconds), "peak_bytes": peak_bytes(plan.device)}
    return row | ({"sites": sites_since(earlier)} if form == "attnopt" else {})


def gradient_norm(model: Decoder) -> float:
    """Of all projections into heads, after the first step: by it forms that compute the same can be told to agree."""
    found = [layer.project.weight.grad.float().norm() for layer in model.layers]
    return torch.stack(found).norm().item()


def begin_counting(device: str) -> None:
    """Peak memory counts from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def held_bytes(device: str) -> int | None:
    """What tensors take on the GPU now: the weights, if nothing is left of an earlier point."""
    return torch.cuda.memory_allocated() if device == "cuda" else None


def peak_bytes(device: str) -> int | None:
    """The most memory that tensors took on the GPU, weights and states included."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def sites_since(earlier: Iterable[Report]) -> list[str]:
    """What became of the attention: one line, as one compilation serves all layers."""
    old = {id(report) for report in earlier}
    new = [report for report in attnopt.reports() if id(report) not in old]
    return [f"{s.verdict} {s.kernel}: {s.spec}" for report in new for s in report.attention]


def run_or_tell(form: str, length: int, plan: Plan) -> Row:
    """`run_point`; what a form cannot do (not installed, out of memory, a kernel that fails) becomes data."""
    try:
        return run_point(form, length, plan)
    except (RuntimeError, ImportError) as error:
        return {"form": form, "length": length, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        if plan.device == "cuda":
            torch.cuda.empty_cache()


# All points.


def run_all(plan: Plan, out: Path | None, budget: float) -> list[Row]:
    """Each point that `out` does not have yet, written as it comes; none is begun after `budget` seconds."""
    begin = time.perf_counter()
    settings = json.loads(json.dumps(asdict(replace(plan, lengths=(), forms=(), steps=0))))
    rows = rows_in(out, settings)
    for form, length in plan.points:
        if any((row["form"], row["length"]) == (form, length) for row in rows):
            continue
        if time.perf_counter() - begin > budget:
            print(f"{budget:.0f} s are over: run it again to go on", flush=True)
            break
        rows.append(run_or_tell(form, length, plan))
        print(line(rows[-1]), flush=True)
        if out is not None:
            write(NAME, {"plan": settings, "summary": summary(rows), "rows": rows}, out)
    return rows


def rows_in(out: Path | None, settings: Row) -> list[Row]:
    """The rows of an earlier run with the same settings."""
    if out is None or not out.exists():
        return []
    held = json.loads(out.read_text())
    return [row for row in held["rows"] if "error" not in row] if held["plan"] == settings else []


def main() -> int:
    """0 if the claim holds, or if there is nothing to judge it by."""
    arguments = parse()
    out = arguments.out or (None if arguments.quick or arguments.tiny else RESULTS / f"{NAME}.json")
    if arguments.plot:
        plot(json.loads((out or RESULTS / f"{NAME}.json").read_text())["rows"])
        print(PLOT)
        return 0
    plan = TINY if arguments.tiny else QUICK if arguments.quick else Plan()
    plan = replace(plan, forms=tuple(arguments.forms), lengths=tuple(arguments.lengths or plan.lengths))
    rows = run_all(plan, out, arguments.seconds or (45.0 if arguments.quick else 240.0))
    print(table(rows))
    print(json.dumps(summary(rows)))
    kept = summary(rows)["kept"].get("attnopt", 1.0)
    return 0 if kept >= LEAST_KEPT or plan.device == "cpu" else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two layers at two lengths")
    parser.add_argument("--tiny", action="store_true", help="two layers on the CPU")
    parser.add_argument("--plot", action="store_true", help=f"only draw {PLOT.name} from what is there")
    parser.add_argument(
        "--seconds", type=float, help="begin no point after so many (default: 240; quick: 45)"
    )
    parser.add_argument("--out", type=Path, help=f"where the JSON is (default: results/{NAME}.json)")
    parser.add_argument("--forms", nargs="+", choices=LAYERS, default=[*LAYERS], help="only these")
    parser.add_argument("--lengths", nargs="+", type=int, help="only these, in this order")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
