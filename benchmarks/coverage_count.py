"""How many attention sites a model has, counted without attnopt: as it runs, by structure, and by Inductor.

As it runs: softmaxes over a tensor of at least three dimensions, and whole-attention calls, in one eager forward.
By structure: those of them with a contraction above and, below, one over the softmaxed dimension, on a functional ATen
trace; what is left are decoys (routers, softmaxes over channels) that must stay as they are.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)
_WHOLE = (
    aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default,
)  # fmt: skip
_PRODUCTS = (aten.bmm.default, aten.mm.default, aten.baddbmm.default, aten.addmm.default)
_FAILURES = (
    RuntimeError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    KeyError,
)
#: How many nodes above and below a softmax are looked at.
_REACH = 120


@dataclass(frozen=True, slots=True)
class Seen:
    """softmaxes: of at least 3 dimensions, and whole calls. causal: those whose weights were 0 above the diagonal."""

    softmaxes: int
    causal: int


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.softmaxes = self.causal = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _WHOLE:
            self.softmaxes += 1
        elif func in _SOFTMAX and out.dim() >= 3:
            self.softmaxes += 1
            self.causal += _is_causal(out)
        return out


def _is_causal(weights: Tensor) -> bool:
    """Whether no query of a square has weight on a later key."""
    square = weights.shape[-1] == weights.shape[-2] > 1
    return (
        square and not bool(weights.nan_to_num().triu(1).any()) and bool(weights.nan_to_num().tril(-1).any())
    )


def watch(run: Callable[[], object]) -> Seen:
    """What one eager run computes."""
    with _Watch() as seen:
        run()
    return Seen(seen.softmaxes, seen.causal)


def attention_sites(model: torch.nn.Module, run: Callable[[Any], object]) -> int | None:
    """Sites by structure, as often as they run; None if the model cannot be captured."""
    from torch._dynamo.backends.common import aot_autograd

    ran: list[int] = []

    def count(graph: GraphModule, _: object) -> Callable[..., Any]:
        sites = count_structure(graph)
        forward = make_boxed_func(graph.forward)

        def call(args: list[Any]) -> Any:
            ran.append(sites)
            return forward(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    torch._dynamo.reset()
    try:
        run(torch.compile(model, backend=aot_autograd(fw_compiler=count), dynamic=False))
    except _FAILURES:
        return None
    return sum(ran)


def count_structure(graph: GraphModule) -> int:
    """Sites in a functional ATen trace."""
    nodes = [n for n in graph.graph.nodes if n.op == "call_function"]
    whole = sum(n.target in _WHOLE for n in nodes)
    softmaxes = [n for n in nodes if n.target in _SOFTMAX]
    return whole + sum(_has_product_above(n) and _weighs_values(n) for n in softmaxes)


def _has_product_above(start: Node) -> bool:
    """Whether a product of two computed tensors is met on the way up, before any product with a weight."""
    pending, seen = deque([start]), {start}
    while pending and len(seen) < _REACH:
        for node in pending.popleft().all_input_nodes:
            if _is_product(node):
                return True
            if node not in seen and node.target not in _PRODUCTS:
                seen.add(node)
                pending.append(node)
    return False


def _is_product(node: Node) -> bool:
    """A batched product, or sum(a * b), of two tensors that are no weights as they stand."""
    if node.target in (aten.bmm.default, aten.baddbmm.default):
        return True
    if node.target == aten.sum.dim_IntList:
        factor = node.args[0]
        return isinstance(factor, Node) and factor.target == aten.mul.Tensor and _mixes(factor)
    return node.target in _PRODUCTS and all(_depth(n) > 2 for n in node.all_input_nodes[-2:])


def _mixes(product: Node) -> bool:
    """Whether both factors are full tensors, so that summing their product is a contraction."""
    factors = product.all_input_nodes
    return len(factors) == 2 and all(n.meta["val"].is_floating_point() and _depth(n) > 1 for n in factors)


def _depth(node: Node) -> int:
    """Steps to the nearest input or constant, at most 3."""
    level, steps = [node], 0
    while steps < 3 and not any(n.op in ("placeholder", "get_attr") for n in level):
        level, steps = [i for n in level for i in n.all_input_nodes], steps + 1
        if not level:
            break
    return steps


def _weighs_values(softmax: Node) -> bool:
    """Whether a product below sums over the dimension of the softmax."""
    dim = int(softmax.args[1])  # type: ignore[arg-type]
    pending, seen = deque([(softmax, dim % softmax.meta["val"].dim())]), {softmax}
    while pending and len(seen) < _REACH:
        node, dim = pending.popleft()
        for user in node.users:
            if user in seen or not isinstance(user.meta.get("val"), Tensor):
                continue
            seen.add(user)
            if _contracts(user, node, dim):
                return True
            moved = _carried(user, node, dim)
            if moved is not None:
                pending.append((user, moved))
    return False


def _contracts(user: Node, node: Node, dim: int) -> bool:
    if user.target in (aten.bmm.default, aten.mm.default):
        last = user.meta["val"].dim() - 1
        return (user.args[0] is node and dim == last) or (user.args[1] is node and dim == last - 1)
    if user.target in (aten.baddbmm.default, aten.addmm.default):
        last = user.meta["val"].dim() - 1
        return (user.args[1] is node and dim == last) or (user.args[2] is node and dim == last - 1)
    if user.target == aten.sum.dim_IntList and node.target == aten.mul.Tensor and _mixes(node):
        return dim in [int(d) % node.meta["val"].dim() for d in user.args[1]]  # type: ignore[union-attr]
    return False


def _carried(user: Node, node: Node, dim: int) -> int | None:
    """Where the dimension is in the result of `user`; None if it is gone or the operation mixes along it."""
    before, after = node.meta["val"].shape, user.meta["val"].shape
    if user.target == aten.permute.default:
        return [int(d) % len(before) for d in user.args[1]].index(dim)  # type: ignore[union-attr]
    if user.target == aten.transpose.int:
        a, b = (int(d) % len(before) for d in user.args[1:3])  # type: ignore[arg-type]
        return {a: b, b: a}.get(dim, dim)
    if user.target == aten.unsqueeze.default:
        return dim + (int(user.args[1]) % len(after) <= dim)  # type: ignore[arg-type]
    if user.target in (
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.view_copy.default,
    ):
        return _viewed(before, after, dim)
    if user.target in _PRODUCTS or "sum" in str(user.target):
        return None
    moved = dim + len(after) - len(before)
    return (
        moved
        if 0 <= moved < len(after) and (len(after) == len(before) or after[moved] == before[dim])
        else None
    )


def _viewed(before: Sequence[int], after: Sequence[int], dim: int) -> int | None:
    ahead = math.prod(before[:dim])
    return next(
        (i for i, size in enumerate(after) if size == before[dim] and math.prod(after[:i]) == ahead), None
    )


def inductor_sites(model: torch.nn.Module, run: Callable[[Any], object], *, dynamic: bool) -> int | None:
    """Sites that Inductor's own attention patterns replace: all its passes up to code generation, which is left out."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    torch._dynamo.reset()
    counters.clear()
    backend = functools.partial(compile_fx, inner_compile=_as_it_is)
    try:
        run(torch.compile(model, backend=backend, dynamic=dynamic))
    except _FAILURES:
        return None
    return counters["inductor"]["fuse_attention"]


def _as_it_is(graph: GraphModule, _inputs: object, **_: object) -> Callable[..., Any]:
    """Stands where Inductor would generate code."""
    return make_boxed_func(graph.forward)
