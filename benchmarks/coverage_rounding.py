"""What rounding can do to a model: its program in fp64 throughout, and eager with its own roundings drawn anew.

Both tell a wrong rewrite from an ill-conditioned number. The fp64 program shows what the rewrite computes, all but free
of roundings; redrawn roundings (Monte Carlo arithmetic: D. S. Parker, UCLA CSD-970002, 1997) show how far eager itself
may be off, in its own dtype and in fp64, of which a single run is but one draw.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
#: What a rewritten site is made of, forwards and backwards: here a rewrite rounds otherwise than eager does.
ROUNDED = frozenset((
    aten.bmm.default, aten.baddbmm.default, aten._softmax.default, aten._softmax_backward_data.default,
    aten._safe_softmax.default, aten.cumsum.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
))  # fmt: skip


class Redrawn(TorchDispatchMode):
    """Moves every number that comes out of a product, a softmax or a running sum by one unit in its last place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return pytree.tree_map(self._moved, out) if func in ROUNDED else out

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        up = torch.randint(0, 2, x.shape, generator=self.draw).to(torch.bool)
        unit = torch.finfo(x.dtype).eps
        return torch.where(up, x * (1 + unit), x * (1 - unit))


class Widened(TorchFunctionMode):
    """Runs code that says float32 in float64: models compute norms, softmaxes and rotations in float32 by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        return func(*_widened(args), **_widened(kwargs or {}))


class _Outside(TorchDispatchMode):
    """As `Widened`, for what Dynamo leaves to Python, and not for Dynamo to read: it would put it into its graphs."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles nothing under other modes."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_widened(args), **_widened(kwargs or {}))


def widened_outside(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled model whose code between two graphs says float64, too, where it says float32."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _Outside():
            return compiled(*args, **kwargs)

    return call


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that nothing is changed in where a model is widened around it: what attnopt does, and its calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@contextmanager
def in_double() -> Iterator[None]:
    """New tensors are float64 where nothing is said."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def widen(module: GraphModule) -> None:
    """Makes a captured graph, and those in it, say float64 where they say float32."""
    for graph in (part for part in module.modules() if isinstance(part, GraphModule)):
        for node in graph.graph.nodes:
            node.args, node.kwargs = _widened(node.args), _widened(node.kwargs)
            if node.op == "call_method" and node.target == "float":
                node.target = "double"
        graph.recompile()


def _widened(arguments: Sequence[Any] | Mapping[str, Any]) -> Any:
    return pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, arguments)
