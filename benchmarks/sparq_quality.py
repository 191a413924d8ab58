"""What SparQ costs in quality, beside a window with sinks of the same traffic: SmolLM2-135M at 4,096 tokens.

    python benchmarks/sparq_quality.py --weights FOLDER [--tokens 4096] [--budget 140] [--device auto] [--plot out.svg]

FOLDER holds the parts that benchmarks/_smollm2_pack.py writes (with transformers and gguf installed they are written
first). Three tasks, all methods on the same trials: perplexity on Austen's *Emma* over the last quarter of each window;
copying (words in no order, hidden in a novel and begun again at the end: share of tokens that go on as before); needles
(a secret number of five digits, of four hidden in a novel, asked for last: share that comes out whole). What precedes
the passage that is decoded is a prompt, attended to exactly; the rest is decoded teacher-forced, a step a position.
Traffic: see benchmarks/_sparq_tasks.py. Trials are added in turns until the budget, in seconds, is spent.
Writes results/sparq_quality.json after each task.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any

import _smollm2_gpu as smollm2
import torch
from _record import ROOT, write
from _sparq_tasks import (
    COPIED,
    Dense,
    Method,
    Rotating,
    Trial,
    copying,
    loss,
    needles,
    reading,
    right,
    sparq_at,
    window_at,
)
from torch import Tensor

TRAFFIC = (1 / 2, 1 / 4, 1 / 8)
#: *Emma* begins with these tokens: "Emma Woodhouse, handsome, clever, and rich, ...".
OPENING = (10809, 2432, 7817, 4404, 28, 35012, 28, 15355, 28, 284, 3428, 28, 351, 253, 6761, 1478)
EMMA = 200_000
#: The shortest context in which all tasks fit.
LEAST = 272

Scores = dict[str, list[float]]


def methods(n: float, d: int) -> list[Method]:
    """Dense, then SparQ and the window at each traffic for length n."""
    return [Dense(), *(make(t, n, d) for t in TRAFFIC for make in (sparq_at, window_at))]


def label(method: Method) -> str:
    """A name for the method and what it reads."""
    return method.name if isinstance(method, Dense) else f"{method.name} 1/{round(1 / method.traffic)}"


@torch.no_grad()
def answer(model: smollm2.Llama, method: Method, trial: Trial) -> Tensor:
    """(1, N - first + 1, V): the logits from the last position of the prompt on."""
    ids = trial.ids.to(model.embedding.device)
    hidden = model.hidden(ids, Rotating(method, model.rotary, trial.first))
    return model.logits(hidden[:, trial.first - 1 :])


def perplexity(model: smollm2.Llama, chosen: list[Method], trial: Trial) -> Iterator[tuple[str, list[float]]]:
    """Nats of each decoded token."""
    for method in chosen:
        yield label(method), loss(answer(model, method, trial), trial).tolist()


def words_copied(
    model: smollm2.Llama, chosen: list[Method], trial: Trial
) -> Iterator[tuple[str, list[float]]]:
    """1 for each token that is right."""
    for method in chosen:
        yield label(method), right(answer(model, method, trial), trial).float().tolist()


def needle_found(
    model: smollm2.Llama, chosen: list[Method], trial: Trial
) -> Iterator[tuple[str, list[float]]]:
    """1 if all digits are right."""
    for method in chosen:
        yield label(method), [float(right(answer(model, method, trial), trial).all())]


def spend(
    seconds: float, trials: Iterator[Trial], measure: Callable[[Trial], Iterator[tuple[str, list[float]]]]
) -> Scores:
    """Scores by method, of as many trials as fit; at least one."""
    found: Scores = defaultdict(list)
    start = time.perf_counter()
    for trial in trials:
        for name, values in measure(trial):
            found[name] += values
        if time.perf_counter() - start > seconds:
            break
    return dict(found)


def run(
    model: smollm2.Llama,
    novels: Tensor,
    context: int,
    budget: float,
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """The three tasks, each with its share of the budget; after each, `keep` is given what there is."""
    emma, d = from_emma(novels), model.sizes.head
    chosen = {
        "perplexity": methods(context * 7 / 8, d),
        "copying": methods(context, d),
        "needles": methods(context, d),
    }
    tasks = {
        "perplexity": (0.5, reading(emma, context), perplexity),
        "copying": (0.25, (copying(novels, context, seed) for seed in count()), words_copied),
        "needles": (0.25, (needles(novels, context, seed) for seed in count()), needle_found),
    }
    found: dict[str, Any] = {}
    for name, (share, trials, measure) in tasks.items():
        scores = spend(share * budget, trials, lambda t, m=measure, c=chosen[name]: m(model, c, t))
        found[name] = {
            label(method): {**read_of(method), **summary(name, scores[label(method)])}
            for method in chosen[name]
        }
        print(table(name, found[name]), flush=True)
        keep(found)
    return found


def from_emma(novels: Tensor) -> Tensor:
    """The tokens from the opening of *Emma* on; all of them if it is not found."""
    wanted = torch.tensor(OPENING)
    windows = novels.unfold(0, len(OPENING), 1)
    at = (windows == wanted).all(1).nonzero().flatten()
    return novels[int(at[0]) :][:EMMA] if len(at) else novels[:EMMA]


def read_of(method: Method) -> dict[str, Any]:
    """What the method reads."""
    said = {name: value for name, value in vars(method).items() if name != "name"}
    return said | {"traffic": round(method.traffic, 4)}


def summary(task: str, values: list[float]) -> dict[str, Any]:
    """The score of a task over its tokens, or its trials."""
    if task == "perplexity":
        return {"perplexity": torch.tensor(values).double().mean().exp().item(), "tokens": len(values)}
    if task == "copying":
        return {"copied": mean(values), "trials": len(values) // COPIED}
    return {"found": mean(values), "trials": len(values)}


def table(task: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores as text, perplexity with its change."""
    key = {"perplexity": "perplexity", "copying": "copied", "needles": "found"}[task]
    dense = rows["dense"][key]
    lines = [f"{task} ({rows['dense'].get('tokens') or rows['dense']['trials']} measured)"]
    for name, row in rows.items():
        change = f"  {100 * (row[key] / dense - 1):+.2f} %" if task == "perplexity" else ""
        lines.append(f"  {name:12} traffic {row['traffic']:.3f}  {row[key]:8.3f}{change}")
    return "\n".join(lines)


def plot(found: Mapping[str, Any], path: Path) -> None:
    """A panel for each task: its score over the traffic."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "attnopt"
    from matplotlib import pyplot as plt

    titles = {
        "perplexity": ("perplexity", "perplexity on Emma"),
        "copying": ("copied", "share of words copied"),
        "needles": ("found", "share of needles found"),
    }
    figure, panels = plt.subplots(1, len(titles), figsize=(12, 3.6), layout="constrained")
    for axes, (task, (key, title)) in zip(panels, titles.items(), strict=True):
        rows = found[task]
        for kind, color, said in (("sparq", "#2a6f97", "SparQ"), ("window", "#bc6c25", "sinks + window")):
            points = [
                (r["traffic"], r[key]) for name, r in rows.items() if name.split()[0] in (kind, "dense")
            ]
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=said)
        axes.axhline(rows["dense"][key], color="#888888", linewidth=1, linestyle=":", label="dense")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("traffic, of dense")
        axes.set_title(title, fontsize=10)
    panels[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def texts(folder: Path) -> Tensor:
    """The packed novels, or the opening of *Emma* where the weights were packed without."""
    if list(folder.rglob(smollm2.TEXT)):
        return smollm2.tokens(folder)
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    import smollm2 as example

    return example.text_ids(10**6)[0]


def main() -> None:
    """Loads, measures, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder with the packed parts")
    parser.add_argument("--tokens", type=int, default=4096, help="context")
    parser.add_argument("--budget", type=float, default=140.0, help="seconds for the three tasks together")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plot", type=Path, help="an SVG to draw")
    parser.add_argument("--out", type=Path, help="where the JSON goes instead of results/")
    given = parser.parse_args()
    if given.tokens < LEAST:
        parser.error(f"--tokens {given.tokens}: the tasks need at least {LEAST}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    if not given.weights.exists():
        from _smollm2_pack import pack

        pack(given.weights)
    model = smollm2.load(given.weights, torch.device(device), getattr(torch, given.dtype))
    settings = {
        "context": given.tokens,
        "dtype": given.dtype,
        "device_used": device,
        "traffic": list(TRAFFIC),
    }

    def keep(tasks: dict[str, Any]) -> Path:
        return write("sparq_quality", {"model": "SmolLM2-135M", **settings, "tasks": tasks}, given.out)

    found = run(model, texts(given.weights), given.tokens, given.budget, keep)
    if given.plot:
        plot(found, given.plot)
    print(f"written to {keep(found)}")


if __name__ == "__main__":
    main()
