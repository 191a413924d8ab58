"""verify="first", "sample" and "always": kernels against the original graph on the user's own data, while it runs.

A checked call runs the shadow, hands each site's real operands to its kernel and judges every row against fp64 by
what the plain graph loses itself. A site that fails puts its kernel under quarantine for that spec; the caller gets the
original graph's answer, for that call and from then on.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from attnopt.errors import VerificationError
from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.options import Options
from attnopt.passes import emit
from attnopt.pipeline import Edit
from attnopt.policy import quarantine
from attnopt.verify import without_casts

#: verify="sample" checks the first call and then one in this many.
PERIOD = 100
#: Mantissa bits that one rounding leaves.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20, torch.float64: 48}


@dataclass(slots=True)
class Watched:
    """A compiled graph whose sites are checked on real data.

    compiled: the rewritten graph. original: a copy of the graph before. edits: the rewritten sites.
    """

    compiled: Callable[..., Any]
    original: GraphModule
    edits: Sequence[Edit]
    options: Options
    calls: int = 0
    failed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs: the compiled ones, or the original's where a check failed."""
        if self._is_due() and not self.failed:
            problems = list(check(self.edits, args))
            if problems:
                self._fail(problems)
        return self.original(*args) if self.failed else self.compiled(*args)

    def _is_due(self) -> bool:
        with self.lock:
            number, self.calls = self.calls, self.calls + 1
        return {"first": number == 0, "sample": number % PERIOD == 0, "always": True}[self.options.verify]

    def _fail(self, problems: Sequence[tuple[Edit, str]]) -> None:
        self.failed = True
        for edit, _ in problems:
            quarantine(edit.kernel.name, edit.spec)
        edit, problem = problems[0]
        message = f"kernel {edit.kernel.name} fails its check on real data ({edit.spec}): {problem}"
        if self.options.strict:
            raise VerificationError(
                f"{message}; it is under quarantine. Run with verify='off' or deny={edit.kernel.name!r}"
            )
        warnings.warn(f"{message}; the original graph answers from now on", RuntimeWarning, stacklevel=3)


def check(edits: Sequence[Edit], args: Sequence[Any]) -> Iterator[tuple[Edit, str]]:
    """The exact sites that fail on these inputs, each with what was seen; inputs are not written to."""
    exact = [edit for edit in edits if edit.site.spec == edit.spec]
    shadows = {id(edit.shadow): edit.shadow for edit in exact}
    for shadow in shadows.values():
        mine = [edit for edit in exact if edit.shadow is shadow]
        wanted = {node for edit in mine for node in (*emit.leaves(edit.site), edit.site.root)}
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        placeholders = [n for n in shadow.nodes if n.op == "placeholder"]
        if len(placeholders) != len(copies):
            continue  # a sub-graph: its inputs are not those of the whole
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            kept = _run(shadow.module, copies, wanted)
            yield from ((edit, problem) for edit in mine if (problem := judge(edit, kept)))


class _Keeper(Interpreter):
    """Runs a graph and keeps copies of some values, as they were when they were made."""

    def __init__(self, module: GraphModule, wanted: set[Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.kept: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def _run(module: GraphModule, args: Sequence[Any], wanted: set[Node]) -> dict[Node, Any]:
    keeper = _Keeper(module, wanted)
    keeper.run(*args)
    return keeper.kept


def judge(edit: Edit, kept: dict[Node, Any]) -> str:
    """What is wrong with the kernel's answer, or ""."""
    values = [kept[node] for node in emit.leaves(edit.site)]
    eager = kept[edit.site.root]
    out = emit.call(edit.site, edit.spec, edit.kernel.run, values)
    wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
    exact = emit.call(without_casts(edit.site), edit.site.spec, REFERENCE.run, wide)
    return row_rule(out, eager, exact)


def row_rule(out: Tensor, eager: Tensor, exact: Tensor) -> str:
    """What is wrong with `out`, or "": each row within twice eager's distance to fp64, or within two roundings."""
    if not torch.equal(torch.isfinite(out), torch.isfinite(exact.to(out.dtype))):
        return "NaN or infinity at other places than the graph's"
    wanted, got, plain = (
        torch.nan_to_num(x.double(), nan=0.0, posinf=0.0, neginf=0.0) for x in (exact, out, eager)
    )
    rounding = 2.0 ** -BITS.get(out.dtype, 8) * wanted.norm(dim=-1)
    allowed = 2 * torch.maximum((plain - wanted).norm(dim=-1), rounding)
    error = (got - wanted).norm(dim=-1)
    over = error > allowed + torch.finfo(torch.float64).tiny
    if not bool(over.any()):
        return ""
    return f"{int(over.sum())} of {over.numel()} rows are off, the worst by {float(error.max()):.2e}"
