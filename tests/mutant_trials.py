"""One mutant: drawn from a seed, run as it is and as attnopt makes it, and the two compared in fp64, gradients too."""

import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mutants_more  # noqa: F401 - more operators
import torch
from mutant_dropout import noted, without_dropout
from mutant_outcomes import (
    EXACT,
    NO_PROGRAM,
    Outcome,
    apart,
    beyond_of,
    compare,
    difference,
    noise_of,
    precision,
    run,
    sealed,
)
from mutant_programs import fits, forget, graph_of, guards_of, inputs_of, programs, resized, traced
from mutants import OPERATORS, NoPlace, mutate
from torch import Tensor
from torch.fx import GraphModule

from attnopt.backend import attnopt, reports

#: What autograd says when a tensor that it needs was written to.
_WRITTEN = "modified by an inplace operation"
#: How often one seed draws until a mutant runs and differs from its program; the last one that ran is taken else.
DRAWS = 12
#: How many places the same operators try before others are drawn.
PLACES = 4
#: The share of mutants with symbolic sizes.
FREE = 0.2
#: Operators that find a place in few graphs are drawn more often.
RARE = {"literal": 2, "offset": 3, "mutation_of_a_condition": 4, "polarity": 4}


@dataclass(frozen=True)
class Setting:
    """free: symbolic sizes. training: gradients are compared. kernels: those that may serve, () for any."""

    free: bool = False
    training: bool = False
    kernels: tuple[str, ...] = ()


@dataclass
class Trial:
    """What became of one seed. drawn: "operator outcome" -> count, with outcome broken, same, differs or no place.

    differs: None if no mutant of this seed ran. wrong: what was wrong, "" for nothing. unsettled: a difference no
    larger than what eager's own rounding makes.
    """

    seed: int
    name: str
    setting: Setting
    operators: tuple[str, ...] = ()
    differs: bool | None = None
    verdicts: tuple[str, ...] = ()
    wrong: str = ""
    unsettled: str = ""
    drawn: Counter[str] = field(default_factory=Counter)


def trial(seed: int, names: Sequence[str] = ()) -> Trial:
    """Draws a program, a setting and a mutant of it, and checks what attnopt makes of that."""
    name = random.Random(f"name {seed}").choice(list(names) or sorted(programs()))  # noqa: S311 - no secrets here
    rng = random.Random(f"{name} {seed}")  # noqa: S311 - the same mutant, whatever other programs there are
    kernels = rng.choice([(), (), ("streaming",), ("lightning",) if "linear" in name else ("sdpa",)])
    setting = Setting(rng.random() < FREE, rng.random() < 0.5, kernels)
    found = Trial(seed, name, setting)
    mutant = _draw(found, rng)
    if mutant is not None:
        judge(found, *mutant, inputs_of(name))
    return found


# --- drawing ---


def _draw(found: Trial, rng: random.Random) -> tuple[GraphModule, Outcome] | None:
    """A mutant that runs, and what it gives: the first that differs from its program, else the last one."""
    plain = _unchanged(found.name, free=found.setting.free)
    if plain is None:
        return None
    last, tried, operators = None, 0, _operators(rng)
    for _ in range(DRAWS):
        if tried == PLACES:
            tried, operators = 0, _operators(rng)
        outcome, mutant = _mutant(found, operators, rng)
        tried = PLACES if outcome == "no place" else tried + 1
        if mutant is not None:
            last, found.operators, found.differs = mutant, operators, False
            found.differs = bool(difference(mutant[1].results, plain.results, [EXACT] * 99))
            outcome = "differs" if found.differs else "same"
        if len(operators) == 1:
            found.drawn[f"{operators[0]} {outcome}"] += 1
        if found.differs:
            break
    return last


def _operators(rng: random.Random) -> tuple[str, ...]:
    names = sorted(OPERATORS)
    return tuple(rng.choices(names, [RARE.get(n, 1) for n in names], k=rng.choice([1, 1, 1, 1, 2, 3])))


def _mutant(
    found: Trial, operators: Sequence[str], rng: random.Random
) -> tuple[str, tuple[GraphModule, Outcome] | None]:
    """A mutant and what it gives; None, and why, if the graph has no place for these operators, or it does not run."""
    mutant = copy.deepcopy(graph_of(found.name, free=found.setting.free))
    try:
        for operator in operators:
            mutate(mutant, operator, rng.randrange)
        return "", (mutant, run(apart(mutant), inputs_of(found.name), training=found.setting.training))
    except NoPlace:
        return "no place", None
    except NO_PROGRAM:
        return "broken", None


@cache
def _unchanged(name: str, *, free: bool) -> Outcome | None:
    """What the program itself gives; None if it cannot be traced so, or not run in fp64."""
    try:
        return run(apart(graph_of(name, free=free)), inputs_of(name), training=False)
    except (*NO_PROGRAM, AssertionError):
        return None


# --- judging ---


def judge(found: Trial, mutant: GraphModule, wanted: Outcome, inputs: Sequence[Any]) -> None:
    """Fills in what attnopt made of the mutant, which gives `wanted` on `inputs`."""
    plain = copy.deepcopy(mutant)
    _judge(found, mutant, wanted, inputs)
    if found.wrong and noted(plain, reports()[-1].sites):
        calm, found.wrong = without_dropout(plain), ""
        _judge(found, calm, run(apart(calm), inputs, training=found.setting.training), inputs)


def _judge(found: Trial, mutant: GraphModule, wanted: Outcome, inputs: Sequence[Any]) -> None:
    before, plain = guards_of(mutant), copy.deepcopy(mutant)
    made = _made(mutant, inputs, found.setting, "eager")
    report = reports()[-1]
    found.verdicts = tuple(f"{site.family} {site.verdict}" for site in report.sites)
    assumed = guards_of(mutant) != before
    if report.warnings and not _is_traced(plain, inputs):
        found.differs = None
        return
    found.wrong = "; ".join(report.warnings) or _differing(made, plain, inputs, wanted, found)
    if assumed:
        forget(found.name, free=found.setting.free)
    elif found.setting.free and not found.wrong:
        found.wrong = _at_other_sizes(made, plain, found)


def judged(attend: Callable[..., Any], inputs: Sequence[Any], setting: Setting) -> Trial:
    """The same for a function; the sizes are those of `inputs`."""
    graph = traced(attend, inputs)
    found = Trial(-1, getattr(attend, "__name__", ""), setting)
    judge(found, graph, run(apart(graph), inputs, training=setting.training), inputs)
    return found


@sealed()
def _made(graph: GraphModule, inputs: Sequence[Any], setting: Setting, inner: str) -> Any:
    with warnings.catch_warnings(), torch.set_grad_enabled(setting.training):
        warnings.simplefilter("ignore")
        if setting.training:
            _train(graph)
        return attnopt(graph, list(inputs), options={"inner": inner, "allow": setting.kernels})


def _is_traced(plain: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether torch.compile could have made the graph: tensors without elements take less than real ones do."""
    try:
        traced(plain, inputs)
    except NO_PROGRAM:
        return False
    return True


def _train(graph: GraphModule) -> None:
    """The inputs are to have gradients, and are none that a graph may not write to, as Dynamo would say of them."""
    for node in graph.graph.nodes:
        held = node.meta.get("val")
        if node.op == "placeholder" and isinstance(held, Tensor) and held.is_floating_point():
            node.meta["val"] = held.detach().requires_grad_() * 1


def _differing(made: Any, plain: GraphModule, inputs: Sequence[Any], wanted: Outcome, found: Trial) -> str:
    """What is wrong with what attnopt made; where eager itself is not settled, that is noted instead."""
    training, tolerance = found.setting.training, precision(plain)
    wrong = compare(made, wanted, inputs, tolerance, training=training)
    if _WRITTEN in wrong:
        # Plain autograd forbids to write to what a call has saved; AOTAutograd, which users run, takes the writes out.
        roots = [
            x.clone().requires_grad_(training and x.is_floating_point()) if isinstance(x, Tensor) else x
            for x in inputs
        ]
        try:
            made = _made(copy.deepcopy(plain), roots, found.setting, "aot_eager")
        except NO_PROGRAM as problem:
            return f"under aot_eager: {type(problem).__name__}: {str(problem).splitlines()[0]}"
        wrong = compare(made, wanted, inputs, tolerance, training=training)
    if not wrong:
        return ""
    beyond = beyond_of(plain, inputs, linear=_is_linear(found))
    if not compare(made, wanted, inputs, tolerance, beyond=beyond, training=training):
        return ""
    noise = noise_of(plain, wanted, inputs, training=training)
    still = compare(made, wanted, inputs, tolerance, noise, beyond, training=training)
    found.unsettled = "" if still else wrong
    return still


def _is_linear(found: Trial) -> bool:
    """Whether linear attention, and nothing else, was rewritten."""
    rewritten = {said.split()[0] for said in found.verdicts if said.endswith(" rewritten")}
    return rewritten == {"linear"}


def _at_other_sizes(made: Any, plain: GraphModule, found: Trial) -> str:
    inputs = resized(found.name)
    if not fits(plain, inputs):
        return ""
    try:
        wanted = run(apart(plain), inputs, training=found.setting.training)
    except NO_PROGRAM:
        return ""
    wrong = _differing(made, plain, inputs, wanted, found)
    return wrong and f"at other sizes: {wrong}"
