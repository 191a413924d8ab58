"""How well a graph determines its own results: they are computed again with one more rounding after each operation.

Where scores are multiplied by 1e9, or sums cancel, eager mode in fp64 knows a gradient to a few digits only, or to
none. The law of `oracle` holds there, too: an error may be as large as eager's own, twice in an output and three times
in a gradient. What eager loses in fp64 is measured, as no wider type is at hand, by stochastic arithmetic (Vignes 1993,
"A stochastic arithmetic for reliable scientific computing", doi:10.1016/0378-4754(93)90003-D).
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node


class Shaken(Interpreter):
    """Runs a graph; each element of each floating-point result is rounded up or down at random, or left as it is."""

    def __init__(self, graph: GraphModule, seed: int) -> None:
        super().__init__(graph)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        return self._shaken(value) if _makes_anew(n) or self._casts(n, value) else value

    def _casts(self, node: Node, value: Any) -> bool:
        source = self.env.get(node.all_input_nodes[0]) if node.target == torch.ops.aten.to.dtype else None
        return isinstance(source, Tensor) and source.dtype != value.dtype

    def _shaken(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        steps = torch.randint(-1, 2, value.shape, generator=self.generator).to(value.dtype)
        return value * (1.0 + torch.finfo(value.dtype).eps * steps)


#: Operations that choose, move or count: their results are as they should be.
_EXACT = frozenset(
    {
        "where", "masked_fill", "full", "full_like", "new_full", "zeros", "zeros_like", "new_zeros", "ones",
        "ones_like", "new_ones", "scalar_tensor", "lift_fresh_copy", "arange", "eye", "tril", "triu", "cat", "stack",
        "index", "index_select", "gather", "embedding", "roll", "flip", "repeat", "repeat_interleave", "pad",
        "constant_pad_nd", "clone", "neg", "abs", "sign", "relu", "clamp", "clamp_min", "clamp_max", "maximum",
        "minimum", "max", "min", "amax", "amin", "nan_to_num", "floor", "ceil", "round", "trunc", "one_hot", "dropout",
    }
)  # fmt: skip


def _makes_anew(node: Node) -> bool:
    """Whether a node computes with a rounding: inputs, views, writes in place and mere choices do not."""
    schema = getattr(node.target, "_schema", None)
    return (
        node.op == "call_function"
        and schema is not None
        and schema.name.removeprefix("aten::") not in _EXACT
        and not any(a.alias_info for a in (*schema.arguments, *schema.returns))
    )
