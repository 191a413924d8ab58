"""What a stream is worth: two parts of streaming_text_gpu.py. Each takes the bench and its seconds; returns a row."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from _smollm2_gpu import Llama
from _streaming_text_plan import Bench, Clock, Row, curve, perplexity, spread
from _streaming_text_streams import (
    Stepper,
    allocated,
    divergence,
    fresh_texts,
    losses,
    plain,
    reading,
    recomputed_losses,
    replayed,
    row_gaps,
    stream,
    streamed_losses,
    through,
)
from torch import Tensor

#: Tokens in one point of a curve.
BUCKET = 4096


# a. Perplexity over all novels.


def novels(bench: Bench, seconds: float) -> Row:
    """Sinks and a window, beside a fresh window for each token (sampled), a window alone, and full attention."""
    plan, clock, ids = bench.plan, Clock(seconds), bench.text.ids.to(bench.device)
    found = {
        n: streamed_losses(bench.model, stream(bench.model, n, plan.budget - n), ids, plan.segment)
        for n in (plan.sinks, *plan.other_sinks)
    }
    full = ids[: plan.full + 1]
    dense = losses(bench.model, bench.model.hidden(full[None, :-1])[0], full[1:])
    return {
        "tokens": ids.shape[0],
        "trained_length": bench.model.sizes.trained,
        "budget": plan.budget,
        "perplexity_by_sinks": {str(n): perplexity(x) for n, x in found.items()},
        "recomputed": against_windows(bench, ids, found, clock),
        "bucket": min(BUCKET, plan.full // 4),
        "curves": {
            "full attention": curve(dense, min(BUCKET, plan.full // 4)),
            **{f"{n} sinks": curve(found[n], min(BUCKET, plan.full // 4)) for n in (plan.sinks, 0)},
        },
        "seconds": clock.spent,
    }


def against_windows(bench: Bench, ids: Tensor, streamed: dict[int, Tensor], clock: Clock) -> Row:
    """Sliding window with recomputation at positions drawn at random, and each stream at the same ones."""
    plan = bench.plan
    order = torch.randperm(ids.shape[0] - plan.budget, generator=torch.Generator().manual_seed(0))
    ends, pieces = order[: plan.windows] + plan.budget - 1, []
    for some in ends.split(plan.windows_at_once):
        pieces.append(recomputed_losses(bench.model, ids, some.to(bench.device), plan.budget))
        if clock.over():
            break
    windows = torch.cat(pieces)
    at = ends[: windows.shape[0]]
    return {
        "windows": windows.shape[0],
        "perplexity": perplexity(windows),
        "by_sinks": {str(n): paired(x[at], windows) for n, x in streamed.items()},
    }


def paired(mine: Tensor, theirs: Tensor) -> Row:
    """How perplexities compare, token by token: their ratio, and the standard error that sampling leaves it."""
    apart = (mine - theirs).double()
    ratio = float(apart.mean().exp())
    error = ratio * float(apart.std()) / math.sqrt(apart.shape[0])
    return {"perplexity": perplexity(mine), "ratio": ratio, "standard_error": error}


# b. Four million tokens.


@dataclass(eq=False)
class Journey:
    """What is noted on the way; tensors on the CPU, so that the memory of the GPU is the stream's own."""

    costs: list[Tensor] = field(default_factory=list)
    memory: list[int | None] = field(default_factory=list)
    decoding: list[Row] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)


def millions(bench: Bench, seconds: float) -> Row:
    """The novels, repeated: perplexity, memory and time of a token on the way; logits beside those of a fresh text."""
    plan, clock = bench.plan, Clock(seconds)
    reach = plan.reach(bench.model.sizes.layers)
    generator = torch.Generator().manual_seed(1)
    ends = reach + torch.randperm(plan.total - reach, generator=generator)[: plan.checks]
    ends = ends.sort().values
    trip = Journey()
    for _ in travel(bench, ends, trip):
        if clock.over(0.5):
            break
    walked = clock.spent
    states = torch.cat(trip.states)
    return {
        "tokens": sum(len(x) for x in trip.costs),
        "seconds_of_the_stream": walked,
        "bucket": plan.bucket,
        "perplexity_by_bucket": curve(torch.cat(trip.costs), plan.bucket),
        "perplexity_by_round": curve(torch.cat(trip.costs), bench.text.ids.shape[0]),
        "allocated_bytes": trip.memory,
        "decoding": trip.decoding,
        "checks": compared(bench, ends[: len(states)], states, clock),
        "seconds": clock.spent,
    }


def travel(bench: Bench, ends: Tensor, trip: Journey) -> Iterator[int]:
    """Segments in parallel; after some of them a few tokens one by one. Yields how far it is."""
    plan, model, text, at = bench.plan, bench.model, bench.text, 0
    cache = stream(model, plan.sinks, plan.window)
    read = reading(model, cache, text.piece(at, plan.segment, bench.device))
    stepper: Stepper | None = None
    for number in range(math.ceil(plan.total / plan.segment)):
        ids = text.piece(at, min(plan.segment, plan.total - at), bench.device)
        at = noted(bench, trip, ends, at, read(ids))
        stepper = stepper or Stepper(model, cache, lambda states: _with_logits(model, states))
        trip.memory.append(allocated(bench.device))
        if number % plan.decode_every == 0 and at + plan.decoded <= plan.total:
            hidden, spent = stepper.steps(text.piece(at, plan.decoded, bench.device))
            trip.decoding.append({"position": at, "milliseconds_per_token": 1e3 * spent / plan.decoded})
            at = noted(bench, trip, ends, at, hidden)
        yield at


def _with_logits(model: Llama, states: Tensor) -> Tensor:
    """The states, after the logits were computed as well: the time of a step is that of the whole model."""
    model.logits(states)
    return states


def noted(bench: Bench, trip: Journey, ends: Tensor, at: int, hidden: Tensor) -> int:
    """Writes down the losses after position `at`, and the states at check points; where the stream is then."""
    length = hidden.shape[1]
    targets = bench.text.piece(at + 1, length, bench.device)[0]
    trip.costs.append(losses(bench.model, hidden[0], targets))
    here = ends[(ends >= at) & (ends < at + length)] - at
    trip.states.append(hidden[0, here.to(bench.device)].cpu())
    return at + length


def compared(bench: Bench, ends: Tensor, states: Tensor, clock: Clock) -> Row:
    """The stream's logits beside those of a fresh text, and of the same in fp32 by plain torch, as far as time goes."""
    new = last_states(fresh(bench, ends), ends.split(bench.plan.fresh_at_once), clock, 0.85)
    chosen = torch.randperm(len(new), generator=torch.Generator().manual_seed(2))[: bench.plan.exact]
    true = last_states(lambda some: _exact(bench, some), ends[chosen].split(1), clock, 1.0)
    chosen = chosen[: len(true)]
    mine, new = (bench.model.logits(x.to(bench.device)) for x in (states[: len(new)], new))
    true = bench.wide.logits(true.to(bench.device))
    own, other = row_gaps(mine[chosen], true), row_gaps(new[chosen], true)
    rounding = torch.finfo(mine.dtype).eps / 2
    return {
        "points": len(new),
        "tokens_of_a_fresh_text": 1 + bench.plan.reach(bench.model.sizes.layers),
        "stream_to_fresh": {**spread(row_gaps(mine, new)), "divergence": spread(divergence(new, mine))},
        "same_first_choice": float((mine.argmax(-1) == new.argmax(-1)).double().mean()),
        "exact_points": len(true),
        "stream_to_exact": {**spread(own), "divergence": spread(divergence(true, mine[chosen]))},
        "fresh_to_exact": {**spread(other), "divergence": spread(divergence(true, new[chosen]))},
        "worst_times_fresh_error": float((own / other.clamp(min=rounding)).max()),
    }


def last_states(
    run: Callable[[Tensor], Tensor], pieces: tuple[Tensor, ...], clock: Clock, share: float
) -> Tensor:
    """What `run` returns of each piece, on the CPU, until that share of the time is over; of one at least."""
    found = []
    for piece in pieces:
        found.append(run(piece).cpu())
        if clock.over(share):
            break
    return torch.cat(found)


def fresh(bench: Bench, ends: Tensor) -> Callable[[Tensor], Tensor]:
    """From positions to the states there, of texts of all that they depend on."""
    plan, model = bench.plan, bench.model
    cache = stream(model, plan.sinks, plan.window)

    def run(ids: Tensor) -> Tensor:
        cache.reset()
        return model.hidden(ids, through(cache))[:, -1]

    def texts(some: Tensor) -> Tensor:
        return fresh_texts(bench.text, some, model.sizes.layers, cache).to(bench.device)

    first = ends[: plan.fresh_at_once]
    read = replayed(run, texts(first))  # of as many texts each time: the cache has rows for no other number
    return lambda some: read(texts(torch.cat([some, first[len(some) :]])))[: len(some)]


def _exact(bench: Bench, ends: Tensor) -> Tensor:
    plan = bench.plan
    cache = stream(bench.wide, plan.sinks, plan.window)
    ids = fresh_texts(bench.text, ends, bench.wide.sizes.layers, cache).to(bench.device)
    return bench.wide.hidden(ids, plain(bench.wide, plan.sinks, plan.window))[:, -1]
