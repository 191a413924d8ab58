"""How fast a stream is: two parts of streaming_text_gpu.py. Each takes the bench and its seconds; returns a row."""

import gc
import time
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median

import torch
from _smollm2_gpu import Attention, Llama, random_model
from _streaming_text_plan import Bench, Clock, Row, spread
from _streaming_text_streams import (
    HEAD_CHUNK,
    Stepper,
    captured,
    eager_window,
    fused_window,
    plain,
    row_gaps,
    stream,
    through,
    wait,
)
from torch import Tensor

#: Steps between two looks at the clock.
STEPS = 1024
#: Ways to recompute a window: by the library's fused attention, and N x N.
WAYS: dict[str, Callable[[Llama, int], Attention]] = {"fused": fused_window, "eager": eager_window}
#: How many times faster than recomputation a step is at 4,096 keys, in figure 10 of the paper.
PAPER = 22.2
#: N x N in fp32 for all heads of a batch has to fit beside the model.
LARGEST_EAGER = 20 << 30


def milliseconds(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median wall time of a call that was made before."""
    found = []
    for _ in range(repeat):
        wait(device)
        begin = time.perf_counter()
        run()
        wait(device)
        found.append(1e3 * (time.perf_counter() - begin))
    return median(found)


# c. A prompt in parallel, and token by token.


def prefill(bench: Bench, seconds: float) -> Row:
    """Both ways through one prompt: seconds, and how far the logits are apart; the same in fp32 by plain torch."""
    plan, model, clock = bench.plan, bench.model, Clock(seconds)
    ids = bench.text.piece(0, plan.prefill, bench.device)

    def at_once() -> Tensor:
        return model.hidden(ids, through(stream(model, plan.sinks, plan.window)))

    parallel = at_once()
    spent = milliseconds(captured(at_once, at_once), bench.device, 5) / 1e3
    stepped, one_by_one = step_by_step(bench, ids, clock)
    done = stepped.shape[1]
    wide = bench.wide.hidden(ids[:, :done], plain(bench.wide, plan.sinks, plan.window))
    return {
        "tokens": plan.prefill,
        "parallel_seconds": spent,
        "stepped_tokens": done,
        "stepped_seconds": one_by_one,
        "times_faster": one_by_one / done * plan.prefill / spent,
        **agreement(bench, parallel[0, :done], stepped[0], wide[0]),
        "seconds": clock.spent,
    }


def step_by_step(bench: Bench, ids: Tensor, clock: Clock) -> tuple[Tensor, float]:
    """The states after each token, (1, N, W), as far as time goes; and the seconds of all steps but the first."""
    cache = stream(bench.model, bench.plan.sinks, bench.plan.window)
    found, total = [bench.model.hidden(ids[:, :1], through(cache))], 0.0
    stepper = Stepper(bench.model, cache)
    for piece in ids[:, 1:].split(STEPS, dim=1):
        states, spent = stepper.steps(piece)
        found.append(states)
        total += spent
        if clock.over(0.9):
            break
    return torch.cat(found, dim=1), total


def agreement(bench: Bench, parallel: Tensor, stepped: Tensor, wide: Tensor) -> Row:
    """Gaps between rows of logits, all states (N, W)."""
    gaps: dict[str, list[Tensor]] = {}
    first = []
    for some in zip(*(x.split(HEAD_CHUNK) for x in (parallel, stepped, wide)), strict=True):
        a, b, true = bench.model.logits(some[0]), bench.model.logits(some[1]), bench.wide.logits(some[2])
        for name, pair in (
            ("stepped_to_parallel", (b, a)),
            ("parallel_to_exact", (a, true)),
            ("stepped_to_exact", (b, true)),
        ):
            gaps.setdefault(name, []).append(row_gaps(*pair))
        first.append((a.argmax(-1) == b.argmax(-1)).double())
    return {
        **{name: spread(torch.cat(x)) for name, x in gaps.items()},
        "same_first_choice": float(torch.cat(first).mean()),
    }


# d. What a token costs.


def latency(bench: Bench, seconds: float) -> Row:
    """Milliseconds of a token for the whole model: one step of a stream, and a fresh window of as many keys."""
    clock, rows = Clock(seconds), []
    for name, model in models(bench):
        ready = model.compiled() if bench.plan.compiled else model
        for batch, keys in product(bench.plan.batches, reversed(bench.plan.caches)):
            if clock.over():
                break
            rows.append({"model": name, "batch": batch, "keys": keys, **one_token(bench, ready, batch, keys)})
            print(rows[-1], flush=True)
            release(bench.device)
    return {"rows": rows, "paper": PAPER, "compiled": bench.plan.compiled, "seconds": clock.spent}


def release(device: torch.device) -> None:
    """Gives the memory of the last row's graphs back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def models(bench: Bench) -> Iterator[tuple[str, Llama]]:
    """The model of the bench, and others with random weights."""
    yield "smollm2-135m", bench.model
    for name, sizes in bench.plan.shapes.items():
        yield name, random_model(sizes, bench.device, bench.model.embedding.dtype)


def one_token(bench: Bench, model: Llama, batch: int, keys: int) -> Row:
    """The two ways to the logits of the next token of `batch` sequences, both as CUDA graphs."""
    repeat = bench.plan.repeat
    step = milliseconds(stepping(bench, model, batch, keys), bench.device, 5 * repeat)
    found: Row = {"step_ms": step}
    for way, make in WAYS.items():
        if way == "eager" and 3 * 4 * batch * model.sizes.heads * keys**2 > LARGEST_EAGER:
            continue
        spent = milliseconds(
            recomputing(model, make(model, keys), batch, keys), bench.device, max(3, repeat // batch)
        )
        found |= {f"recomputed_{way}_ms": spent, f"times_faster_than_{way}": spent / step}
    return found


def stepping(bench: Bench, model: Llama, batch: int, keys: int) -> Callable[[], object]:
    """One step with a cache that is full, and the logits."""
    cache = stream(model, bench.plan.sinks, keys - bench.plan.sinks)
    ids = torch.randint(model.sizes.vocabulary, (batch, 1), device=bench.device)
    model.hidden(ids, through(cache))
    for ring in cache.layers.values():  # as after a text that has filled them
        ring.keys.normal_()
        ring.values.normal_()
        ring.seen += 2 * cache.span.slots
    stepper = Stepper(model, cache, model.logits)
    return lambda: stepper.step(ids)


def recomputing(model: Llama, attention: Attention, batch: int, keys: int) -> Callable[[], object]:
    """The last token's logits of windows that are read anew."""
    ids = torch.randint(model.sizes.vocabulary, (batch, keys), device=model.embedding.device)

    def run() -> Tensor:
        return model.logits(model.hidden(ids, attention)[:, -1:])

    return captured(run, run)
