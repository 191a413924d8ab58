"""A whole model decodes one token at 32k to 128k of context: with SparQ, beside the same with dense attention.

    python benchmarks/sparq_model_gpu.py [--seconds 140] [--models llama-2-7b,llama-3.1-8b] [--out FILE]
    python benchmarks/sparq_model_gpu.py --tiny      two layers on the CPU; writes nothing unless --out

The shapes of Llama-2-7B and of Llama-3.1-8B (the embedding used as head), random weights, bf16. A step is all of it:
embedding, norms, projections, rotation, append to the caches, attention, feed-forward, logits. Times are the median
replay of its CUDA graph. Dense attention is the fastest of cuDNN and flash, by head or with the heads of a group
packed as queries; SparQ is `attnopt.ops.sparq_step` over `attnopt.caches.SparqCache`, rank 32, 128 positions. All else
is the same code, fused by Inductor, its products by the faster of cuBLAS and a plain kernel; `rest` is the model
without attention, which bounds what SparQ can win.

Dense and SparQ caches are claimed one after the other; settings that do not fit the card are left out. FILE is written
after each setting; none is begun after --seconds. Claim: above twice as fast, the range of arXiv 2312.04985.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, write
from _smollm2_gpu import Sizes
from _sparq_model import (
    Choices,
    Decoder,
    Place,
    Setting,
    Way,
    decoder,
    dense,
    filled,
    none,
    sparq,
    warm,
    ways,
)
from _sparq_model_checks import check
from _sparq_model_time import milliseconds, release, replay_apart, stepping, times
from _streaming_text_plan import LLAMA_2_7B, TINY_SIZES
from _streaming_text_streams import captured
from torch import Tensor

from attnopt.caches import SparqCache

Row = dict[str, Any]

NAME = "sparq_model_gpu"
#: How many times faster than dense a step is to be.
WANTED = 2.0
#: Side by side they compile SparQ's kernels, which takes most of the time otherwise.
PROCESSES = 14
#: How far the logits of a graph may be from those of single launches: 0 but for a choice between equals.
SAME = 0.02
#: Sequences up to which the kernel of _sparq_model_product.py may multiply, where it is faster than cuBLAS.
SMALL = 2
#: Bytes that are left to the driver, the libraries and the activations.
SPARE = 3 << 30
LLAMA_3_1_8B = replace(LLAMA_2_7B, kv_heads=8, inner=14_336, vocabulary=128_256, base=500_000.0)


def settings_of(name: str, sizes: Sizes, *shapes: tuple[int, int]) -> tuple[Setting, ...]:
    """(batch, context in units of 1,024)."""
    return tuple(Setting(name, sizes, batch, 1024 * context) for batch, context in shapes)


@dataclass(frozen=True)
class Work:
    """What is timed, by model in the order of its weight, and what is checked first, at the true widths."""

    place: Place
    timed: tuple[Setting, ...] = (
        *settings_of("llama-2-7b", LLAMA_2_7B, (1, 128), (1, 80), (1, 64), (2, 32), (1, 32)),
        *settings_of("llama-3.1-8b", LLAMA_3_1_8B, (1, 128), (4, 128), (2, 128), (4, 64), (8, 32)),
    )
    checked: tuple[Setting, ...] = tuple(
        Setting(f"{kv_heads} key heads", replace(LLAMA_2_7B, kv_heads=kv_heads, layers=2), batch, 4096)
        for kv_heads, batch in ((32, 1), (8, 2))
    )
    choices: Choices = field(default_factory=Choices)
    repeat: int = 12


def tiny() -> Work:
    """On the CPU."""
    shapes = tuple(Setting("tiny", replace(TINY_SIZES, kv_heads=n), 2, 64) for n in (4, 2))
    return Work(Place(torch.device("cpu"), torch.bfloat16), shapes, shapes, Choices(4, 16, 4), repeat=3)


# One setting.


def row_of(decoding: Decoder, setting: Setting, work: Work) -> Row:
    """Milliseconds of a step without attention, with dense attention, and with SparQ."""
    place = work.place
    decoding.move(setting.context - 1)
    rest = milliseconds(stepping(decoding, setting, place, none(setting, place)), place, work.repeat)
    full = dense_of(decoding, setting, work)
    release(place.device)
    caches = filled(setting, place, "both")
    step = stepping(decoding, setting, place, sparq(caches, work.choices))
    again = captured(step, step)
    beside = replay_apart(caches, step, again)
    mine = times(again, place, work.repeat)
    return {
        **told(setting), "weights_gb": 2e-9 * setting.weights, "cache_gb": 2e-9 * setting.cached,
        "rest": rest, "dense": full, "sparq": mine,
        "times_faster": full["ms"] / mine["ms"],
        "times_faster_beside_rest": (full["ms"] - rest["ms"]) / (mine["ms"] - rest["ms"]),
        "replay_apart": beside, "passed": beside <= SAME,
    }  # fmt: skip


def dense_of(decoding: Decoder, setting: Setting, work: Work) -> Row:
    """The times of the fastest dense way, and of attention alone by each way that takes these shapes."""
    place, sizes = work.place, setting.sizes
    caches, found = filled(setting, place, "one"), ways(setting, place.device)
    q = torch.randn(setting.batch, sizes.heads, 1, sizes.head, device=place.device, dtype=place.dtype)
    alone = {name: alone_ms(way, q, caches[0], work) for name, way in found.items()}
    served = {name: spent for name, spent in alone.items() if spent is not None}
    best = min(served, key=lambda name: served[name])
    step = milliseconds(stepping(decoding, setting, place, dense(caches, found[best])), place, work.repeat)
    return {**step, "by": best, "attention_ms": alone}


def alone_ms(way: Way, q: Tensor, cache: SparqCache, work: Work) -> float | None:
    """Milliseconds of dense attention over one layer's cache; None where the backend does not take it."""
    try:
        return milliseconds(lambda: way(q, cache.k, cache.v), work.place, work.repeat)["ms"]
    except RuntimeError as error:
        print(f"does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


# All settings.


def rows_of(work: Work, chosen: list[Setting], seconds: float) -> Iterator[Row]:
    """A row for each setting that fits and is begun in time, model by model; `left_out` says of others why."""
    begun = time.perf_counter()
    for sizes, group in groupby(chosen, key=lambda s: s.sizes):
        release(work.place.device)
        torch._dynamo.reset()
        decoding, spent = decoder(sizes, work.place), {}
        for setting in group:
            is_late = time.perf_counter() - begun > seconds
            reason = lacks(setting, work) or ("time is over" if is_late else None)
            if not reason:
                spent = spent or rests(decoding, setting, work)
                decoding.multiply_by(
                    min(spent, key=spent.__getitem__) if setting.batch <= SMALL else "cublas"
                )
            yield {**told(setting), "left_out": reason} if reason else row_or_reason(decoding, setting, work)
            release(work.place.device)
        del decoding


def rests(decoding: Decoder, setting: Setting, work: Work) -> dict[str, float]:
    """Milliseconds of a step without attention, by what multiplies: all of it is the same for dense and SparQ."""
    found = {}
    for name in decoding.sides if setting.batch <= SMALL else ["cublas"]:
        decoding.multiply_by(name)
        step = stepping(decoding, setting, work.place, none(setting, work.place))
        found[name] = milliseconds(step, work.place, work.repeat)["ms"]
    print("ms without attention:", {name: round(spent, 2) for name, spent in found.items()}, flush=True)
    return found


def row_or_reason(decoding: Decoder, setting: Setting, work: Work) -> Row:
    """`row_of`; a card that is too small after all becomes data."""
    try:
        return row_of(decoding, setting, work)
    except torch.OutOfMemoryError as error:
        return {**told(setting), "left_out": str(error).splitlines()[0]}


def told(setting: Setting) -> Row:
    """What a row is about."""
    return {"model": setting.name, "batch": setting.batch, "context": setting.context}


def compile_for(work: Work, chosen: list[Setting]) -> None:
    """Compiles what will run; on the CPU nothing has to be."""
    if work.place.device.type != "cuda":
        return
    wide = replace(work.place, dtype=torch.float32)
    jobs = [(s, work.place, work.choices) for s in (*work.checked, *chosen) if lacks(s, work) is None]
    jobs += [(s, wide, replace(work.choices, topk=s.context)) for s in work.checked]
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        list(pool.map(warm, *zip(*jobs, strict=True)))


def lacks(setting: Setting, work: Work) -> str | None:
    """How much memory is missing, if any: SparQ holds the keys twice."""
    if work.place.device.type != "cuda":
        return None
    there = torch.cuda.get_device_properties(work.place.device).total_memory
    wanted = work.place.dtype.itemsize * (setting.weights + setting.cached * 3 // 2) + SPARE
    return None if wanted <= there else f"needs {wanted / 1e9:.0f} GB of {there / 1e9:.0f}"


def run(work: Work, chosen: list[Setting], seconds: float, out: Path | None) -> Row:
    """The checks, then the rows, written as they come."""
    begun = time.perf_counter()
    compile_for(work, chosen)
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    found: Row = {"wanted": WANTED, "choices": vars(work.choices), "rows": []}
    found["checks"] = [check(s, work.place.device, work.place.dtype, work.choices) for s in work.checked]
    for row in found["checks"]:
        print({name: f"{x:.2g}" if isinstance(x, float) else x for name, x in row.items()}, flush=True)
    for row in rows_of(work, chosen, seconds - (time.perf_counter() - begun)):
        found["rows"].append(row)
        print(line(row), f"({time.perf_counter() - begun:.0f} s)", flush=True)
        if out is not None:
            write(NAME, found, out)
    return found


def line(row: Row) -> str:
    """One setting."""
    head = f"{row['model']:>12} B{row['batch']} S{row['context'] // 1024}k"
    if "left_out" in row:
        return f"{head}: left out, {row['left_out']}"
    spent = ", ".join(f"{name} {row[name]['ms']:.2f}" for name in ("dense", "sparq", "rest"))
    return (
        f"{head}: ms {spent}; {row['times_faster']:.2f} times faster, {row['times_faster_beside_rest']:.2f} beside the "
        f"rest; {row['cache_gb']:.0f} GB by {row['dense']['by']}"
    )


def verdict(found: Row) -> str:
    """The claim, and where it holds."""
    timed = [row for row in found["rows"] if "left_out" not in row]
    above = [row for row in timed if row["times_faster"] > WANTED]
    judged = [*found["checks"], *timed]
    right = sum(row["passed"] for row in judged)
    where = "".join(f", {row['model']} B{row['batch']} S{row['context'] // 1024}k" for row in above)
    return (
        f"{right} of {len(judged)} checks right; "
        f"above {WANTED} times at {len(above)} of {len(timed)} settings{where}"
    )


def main() -> int:
    """0 if all checks pass."""
    given = parse()
    work = tiny() if given.tiny else Work(Place(torch.device("cuda"), torch.bfloat16, fused=True))
    out = given.out or (None if given.tiny else RESULTS / f"{NAME}.json")
    names = given.models.split(",") if given.models else [s.name for s in work.timed]
    found = run(work, [s for s in work.timed if s.name in names], given.seconds, out)
    print(*map(line, found["rows"]), verdict(found), sep="\n")
    return 0 if all(row.get("passed", True) for row in (*found["checks"], *found["rows"])) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=140.0, help="begin no setting after so many")
    parser.add_argument("--models", help="only these, by a comma")
    parser.add_argument("--out", type=Path, help=f"where the JSON goes (default: results/{NAME}.json)")
    parser.add_argument("--tiny", action="store_true", help="two layers on the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
