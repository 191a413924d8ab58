"""The programs that mutants are made of: all spellings and near misses, as graphs in fp64, of fixed or free sizes."""

import importlib
import pkgutil
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compiling import widened
from mutant_outcomes import sealed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

#: Modules of programs: whatever in tests/ is called so.
SOURCES = ("spelling", "near_miss", "adversaries")
#: Reads memory that nobody has written.
LEFT_OUT = {"baddbmm_of_nothing"}


@dataclass(frozen=True)
class Program:
    """attend: a function of `inputs()`. fixed: sizes that stay numbers where others are symbolic."""

    name: str
    attend: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    fixed: frozenset[int]


@cache
def programs() -> dict[str, Program]:
    """All programs by name."""
    here = Path(__file__).parent
    names = sorted(m.name for m in pkgutil.iter_modules([str(here)]) if any(s in m.name for s in SOURCES))
    found: dict[str, Program] = {}
    for module in map(importlib.import_module, names):
        fixed = frozenset(getattr(module, "FIXED", ()))
        held = (x for value in vars(module).values() if isinstance(value, list | tuple) for x in value)
        for case in held:
            attend, inputs = getattr(case, "attend", None), getattr(case, "inputs", None)
            if callable(attend) and callable(inputs) and attend.__name__ not in LEFT_OUT:
                name = f"{attend.__module__}.{attend.__name__}"
                found.setdefault(name, Program(name, attend, inputs, fixed or _fixed_of(attend)))
    return found


def _fixed_of(attend: Callable[..., Any]) -> frozenset[int]:
    """The fixed sizes of the module from which a list of near misses borrows its inputs."""
    home = "linear_spellings" if "linear" in attend.__module__ else "spellings"
    return frozenset(importlib.import_module(home).FIXED)


@cache
def inputs_of(name: str) -> tuple[Any, ...]:
    """In fp64, always the same."""
    torch.manual_seed(0)
    return tuple(widened(programs()[name].inputs()))


def resized(name: str) -> tuple[Any, ...]:
    """Other values, and another number for each size that is not fixed."""
    fixed, generator = programs()[name].fixed, torch.Generator().manual_seed(5)

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = [s if s in fixed or s < 2 else s + 1 + s % 3 for s in x.shape]
        if x.dtype == torch.bool:
            return torch.rand(shape, generator=generator) < 0.7
        if not x.is_floating_point():
            least, most = (int(f()) for f in (x.min, x.max)) if x.numel() else (0, 0)
            return torch.randint(least, most + 1, shape, generator=generator, dtype=x.dtype)
        same_kind = torch.rand if bool((x >= 0).all()) else torch.randn
        return same_kind(shape, generator=generator, dtype=x.dtype)

    return tuple(draw(x) for x in inputs_of(name))


def fits(graph: GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether the inputs have the sizes that tracing has fixed, such as the length that a loop runs over."""
    held = (node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder")
    pairs = ((a, b) for a, b in zip(held, inputs, strict=True) if isinstance(a, Tensor))
    sizes = ((size, n) for a, b in pairs for size, n in zip(a.shape, b.shape, strict=True))
    known = ((size.node.expr if isinstance(size, torch.SymInt) else size, n) for size, n in sizes)
    return all(expr == n or getattr(expr, "free_symbols", None) for expr, n in known)


@cache
def _held(name: str, free: bool) -> list[GraphModule]:
    """The place of a graph that has been traced; empty before."""
    del name, free
    return []


def graph_of(name: str, *, free: bool) -> GraphModule:
    """The program as ATen before autograd, traced once. free: sizes that no model fixes are symbols."""
    held = _held(name, free)
    if not held:
        held.append(_traced(name, free=free))
    return held[0]


def forget(name: str, *, free: bool) -> None:
    """The graph will be traced anew: its symbols are shared by all its mutants, one of which has assumed something."""
    _held(name, free).clear()


def _traced(name: str, *, free: bool) -> GraphModule:
    program = programs()[name]
    return traced(program.attend, inputs_of(name), program.fixed if free else None)


@sealed()
def traced(
    attend: Callable[..., Any], inputs: Sequence[Any], fixed: Container[int] | None = None
) -> GraphModule:
    """A function as ATen before autograd, returning a tuple. fixed: sizes that are no symbols; None: all."""

    def returning_a_tuple(*args: Any) -> tuple[Any, ...]:
        out = attend(*args)
        return out if isinstance(out, tuple) else (out,)

    with _use_lazy_graph_module(True):
        return _as_aten(returning_a_tuple, inputs, fixed)


def _as_aten(attend: Callable[..., Any], inputs: Sequence[Any], fixed: Container[int] | None) -> GraphModule:
    if fixed is None:
        return make_fx(attend, pre_dispatch=True, tracing_mode="fake")(*inputs)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
        fakes = [_fake(mode, x, n, fixed) for n, x in enumerate(inputs)]
        return make_fx(attend, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)


def _fake(mode: FakeTensorMode, x: Any, number: int, fixed: Container[int]) -> Any:
    if not isinstance(x, Tensor):
        return x
    kinds = [DimDynamic.STATIC if s in fixed or s < 2 else DimDynamic.DUCK for s in x.shape]
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    return mode.from_tensor(
        x, symbolic_context=context, source=torch._dynamo.source.ConstantSource(f"input{number}")
    )


def guards_of(graph: GraphModule) -> int:
    """How many facts about its symbols have been assumed."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    modes = (getattr(x, "fake_mode", None) for x in values if isinstance(x, Tensor))
    environment = next((m.shape_env for m in modes if m is not None), None)
    return 0 if environment is None else len(environment.guards)
