"""One subject in one mode: independent counts, attnopt's report, the comparison with eager, Inductor's count."""

import copy
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import coverage_count as count
import torch
from coverage_compare import DRAWS, Result, differences, disproof
from coverage_modes import DTYPES, Mode
from coverage_rounding import Redrawn, Widened, as_it_is, in_double, widen, widened_outside
from coverage_subjects import Prepared, Subject
from torch import Tensor
from torch.utils import _pytree as pytree

import attnopt
from attnopt.backend import attnopt as attnopt_backend
from attnopt.report import Report, SiteReport

_LEFT = ("refused", "quarantined", "rejected")


@dataclass(slots=True)
class Row:
    """What one subject gave in one mode. Counts are of sites as often as they run."""

    family: str
    name: str
    mode: str
    softmaxes: int = 0  # >= 3-D softmaxes and whole calls in one eager forward
    structural: int | None = None  # sites by structure; None: not traceable as one graph
    causal: int = 0  # softmaxes whose weights are 0 above the diagonal
    verdicts: dict[str, int] = field(default_factory=dict)  # of softmax sites
    linear: dict[str, int] = field(default_factory=dict)  # of linear sites
    specs: dict[str, int] = field(default_factory=dict)  # of sites rewritten or kept
    left: list[list[Any]] = field(default_factory=list)  # [verdict, family, reason, where, times]
    inductor: int | None = None
    graphs: int = 0
    breaks: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    untouched: list[str] = field(
        default_factory=list
    )  # why a graph was left as it was, by attnopt's own decision
    notes: list[str] = field(default_factory=list)
    proven: bool = False  # the rewritten program equals eager's in fp64
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""  # why there is nothing else in the row

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        found = asdict(self).items()
        return {
            name: value for name, value in found if value is not False and value not in ({}, [], "", None)
        }


def measure(subject: Subject, mode: Mode, *, peers: bool = True) -> Row:
    """The row of a subject in a mode. peers: whether the sites are counted by structure and by Inductor as well."""
    row = Row(subject.family, subject.name, str(mode))
    try:
        held = subject.prepare(mode)
    except Exception as problem:  # noqa: BLE001 - a library may fail in any way; the row says how
        row.error = f"{type(problem).__name__}: {str(problem)[:240]}"
        return row
    held = _cast(held, DTYPES[mode.dtype])
    held.model.train(mode.training)
    wide = _wide(held)  # before it runs: some models keep tensors of their last run, which cannot be copied
    try:
        row.softmaxes, row.causal = _watched(held)
        eager = run(held, held.model, mode)
    except Exception as problem:  # noqa: BLE001 - no bf16 form, dropout in training, ...
        row.error = f"eager itself fails: {type(problem).__name__}: {str(problem)[:200]}"
        return row
    compiled = _compile(row, held, mode)
    if compiled is not None:
        _judge(row, held, wide, mode, compiled, eager)
    if peers:
        _ask_others(row, held, mode)
    return row


def _judge(row: Row, held: Prepared, wide: Prepared, mode: Mode, compiled: Result, eager: Result) -> None:
    """Fills in what is wrong, by the law of coverage_compare.py; in training every model is proven in fp64."""
    dtype, exact = DTYPES[mode.dtype], _exact(row, wide, mode)
    suspects = differences(compiled, [eager], exact, dtype)
    if suspects and differences(run(held, held.model, mode), [eager], None, dtype):
        row.notes.append(f"not compared, eager is not repeatable: {suspects[0]}")
        return
    if not suspects and not (mode.training and (row.verdicts | row.linear).get("rewritten")):
        return  # where nothing was rewritten there is nothing to prove
    proof = _in_fp64(row, wide, mode)
    if exact is None or proof is None:
        row.wrong = suspects
        return
    draws = [eager, *(_redrawn(held, mode) if suspects else ())]
    with in_double(), Widened():
        wider = _redrawn(wide, mode) if disproof(proof, exact, ()) else []
    row.wrong = differences(compiled, draws, exact, dtype) + disproof(proof, exact, wider)
    row.proven = not row.wrong
    if row.proven:
        row.notes += [f"rounding alone: {suspect}" for suspect in suspects]


def _redrawn(held: Prepared, mode: Mode) -> list[Result]:
    draws = []
    for seed in range(DRAWS):
        with Redrawn(seed):
            draws.append(run(held, held.model, mode))
    return draws


def _in_fp64(row: Row, wide: Prepared, mode: Mode) -> Result | None:
    """The rewritten program in fp64; None where it cannot be had, or is another one."""
    backend = _Counting(widened=True)
    torch._dynamo.reset()
    try:
        with in_double():
            compiled = torch.compile(wide.model, backend=as_it_is(backend), dynamic=mode.dynamic)
            got = run(wide, widened_outside(compiled), mode)
    except Exception as problem:  # noqa: BLE001 - as in `_compile`; the row says that there is no proof
        row.notes.append(f"not compiled in fp64: {type(problem).__name__}: {str(problem)[:100]}")
        return None
    if backend.verdicts() != Counter(row.verdicts) + Counter(row.linear):
        row.notes.append(f"rewritten otherwise in fp64: {backend.verdicts()}")
        return None
    return got


def _ask_others(row: Row, held: Prepared, mode: Mode) -> None:
    """The structural count, once for each spelling of attention; Inductor's, with and without a mask."""
    still = Mode(attention=mode.attention, mask=mode.mask)
    if mode == Mode(attention=mode.attention):
        row.structural = count.attention_sites(held.model, lambda model: run(held, model, still))
    if mode == Mode(mask=mode.mask):
        row.inductor = count.inductor_sites(held.model, lambda model: run(held, model, still), dynamic=False)


def run(held: Prepared, model: Callable[..., Any], mode: Mode) -> Result:
    """The floating-point outputs and, in training, the gradients of all parameters, of one forward."""
    torch.manual_seed(0)
    if not mode.training:
        with torch.no_grad():
            return Result(_floats(model(**held.inputs)), {})
    held.model.zero_grad()
    outputs = _floats(model(**held.inputs))
    roots = [x for x in outputs if x.requires_grad]
    torch.autograd.backward(roots, [_weights(x) for x in roots])
    gradients = {name: p.grad.clone() for name, p in held.model.named_parameters() if p.grad is not None}
    return Result([x.detach() for x in outputs], gradients)


def _weights(x: Tensor) -> Tensor:
    at = torch.arange(1.0, x.numel() + 1).view(x.shape)
    return at.div(x.numel()).cos().to(x.dtype)


def _watched(held: Prepared) -> tuple[int, int]:
    with torch.no_grad():
        seen = count.watch(lambda: held.model(**held.inputs))
    return seen.softmaxes, seen.causal


def _floats(out: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(out.to_tuple() if hasattr(out, "to_tuple") else out)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _cast(held: Prepared, dtype: torch.dtype) -> Prepared:
    return Prepared(
        held.model.to(dtype),
        {
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in held.inputs.items()
        },
    )


def _exact(row: Row, wide: Prepared, mode: Mode) -> Result | None:
    """The same in fp64; None for a model with an operator that has no fp64 form: then eager is the arbiter."""
    try:
        with in_double(), Widened():
            return run(wide, wide.model, mode)
    except (RuntimeError, ValueError, TypeError) as problem:
        row.notes.append(f"no fp64: {str(problem)[:100]}")
        return None


def _wide(held: Prepared) -> Prepared:
    model = copy.deepcopy(held.model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product of experts has no fp64 form
    return _cast(Prepared(model, held.inputs), torch.float64)


@dataclass(slots=True)
class _Counting:
    """A backend that runs attnopt's and notes, each time a graph runs, the report of its compilation.

    widened: the graph says float64 wherever it says float32.
    """

    widened: bool = False
    ran: list[Report] = field(default_factory=list)
    made: list[Report] = field(default_factory=list)

    def __call__(self, module: Any, inputs: Sequence[Any], **_: object) -> Callable[..., Any]:
        if self.widened:
            widen(module)
        compiled = attnopt_backend(module, inputs, options={"inner": "eager"})
        report = attnopt.reports()[-1]
        self.made.append(report)

        def call(*args: Any) -> Any:
            self.ran.append(report)
            return compiled(*args)

        return as_it_is(call)

    def verdicts(self) -> dict[str, int]:
        """Of the sites that ran."""
        return dict(Counter(site.verdict for report in self.ran for site in report.sites))


def _compile(row: Row, held: Prepared, mode: Mode) -> Result | None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    backend = _Counting()
    start = time.perf_counter()
    try:
        model = torch.compile(held.model, backend=backend, dynamic=mode.dynamic)
        return run(held, model, mode)
    except Exception as problem:  # noqa: BLE001 - told apart below: attnopt's failure, or Dynamo's own
        _blame(row, held, mode, problem)
        return None
    finally:
        _note(row, backend)
        row.seconds["first_call"] = round(time.perf_counter() - start, 3)
        row.breaks = [" ".join(str(reason).split())[:100] for reason in counters["graph_break"]]


def _blame(row: Row, held: Prepared, mode: Mode, problem: Exception) -> None:
    """Whether a failed compilation is attnopt's fault: Dynamo alone must manage without it."""
    told = f"{type(problem).__name__}: {' '.join(str(problem).split())[:240]}"
    torch._dynamo.reset()
    try:
        run(held, torch.compile(held.model, backend="eager", dynamic=mode.dynamic), mode)
    except Exception:  # noqa: BLE001
        row.error = f"Dynamo itself fails: {told}"
    else:
        row.crashes.append(told)


#: Where this machine keeps its packages.
_PLACE = re.compile(r"/\S*site-packages/")


#: The warning of an exception that attnopt did not raise itself (attnopt/backend.py names its class).
_FELL = re.compile(r"attnopt left a graph untouched: \w+: ")


def _note(row: Row, backend: _Counting) -> None:
    sites = [site for report in backend.ran for site in report.sites]
    row.graphs = len(backend.made)
    warnings = [_PLACE.sub("", warning)[:300] for report in backend.made for warning in report.warnings]
    row.crashes += [text for text in warnings if _FELL.match(text)]
    row.untouched = [text for text in warnings if not _FELL.match(text)]
    row.verdicts = dict(Counter(s.verdict for s in sites if s.family != "linear"))
    row.linear = dict(Counter(s.verdict for s in sites if s.family == "linear"))
    row.specs = dict(Counter(s.spec for s in sites if s.verdict not in _LEFT))
    left = Counter((s.verdict, s.family, s.reason, where(s)) for s in sites if s.verdict in _LEFT)
    row.left = [[*what, times] for what, times in left.items()]
    passes: Mapping[str, float] = sum(
        (Counter(graph.seconds) for report in backend.made for graph in report.graphs), Counter()
    )
    row.seconds = {name: round(value, 4) for name, value in passes.items()}


def where(site: SiteReport) -> str:
    """The user's line."""
    return f"{site.where} {site.code}"[:120]
