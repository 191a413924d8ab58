"""Which graphs are worth reading: a look at the names of the calls, long before anything is traced.

An attention needs a product of two computed tensors. A graph in which every call is known to make none (elementwise
arithmetic, views, products with weights, convolutions, norms) is left alone; one unknown name is enough to read it.
"""

import re

from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attnopt.errors import UnsupportedError

_NAMES = """
abs abs_ adaptive_avg_pool2d add add_ alias all and_ any arange argmax avg_pool2d batch_norm bernoulli bool
broadcast_to cat ceil chunk clamp clamp_ clamp_max clamp_min clone contiguous conv1d conv2d conv3d
conv_transpose1d conv_transpose2d convolution cos cpu cross_entropy cuda detach detach_ detach_copy dim div
div_ double dropout dropout_ embedding empty empty_like eq expand expand_as eye flatten flip float floor
floordiv full full_like gather ge gelu getattr getitem group_norm gt half hardsigmoid hardswish hardtanh
iadd idiv imul index_select instance_norm int interpolate invert is_contiguous isinf isnan isub item
itruediv layer_norm le leaky_relu lift_fresh_copy linear logical_and logical_not logical_or lt manual_seed
masked_fill masked_fill_ max_pool1d max_pool2d mean mish mod mse_loss mul mul_ narrow native_dropout
native_layer_norm ne neg new_full new_ones new_zeros nll_loss not_ numel ones ones_like or_ pad permute pow
relu relu6 relu_ repeat repeat_interleave requires_grad_ reshape rms_norm roll round rsqrt rsub
scalar_tensor select setitem sigmoid sign silu silu_ sin size softplus split sqrt square squeeze stack
stride sub sub_ swapaxes sym_float sym_int sym_max sym_min sym_size sym_sum t tan tanh tensor tensor_split
to transpose tril triu truediv type type_as unbind unflatten unsqueeze upsample_nearest2d view view_as where
xor zeros zeros_like __add__ __getitem__ __mul__ __neg__ __radd__ __rmul__ __rsub__ __sub__ __truediv__
_assert _assert_async _assert_tensor_metadata _native_batch_norm_legit _set_grad_enabled _to_copy
set_inplace_requires_grad_allowed
"""

#: Functions and methods that neither multiply two computed tensors along a sum, nor normalise, nor accumulate.
HARMLESS = frozenset(re.findall(r"\w+", _NAMES))


def may_hold_attention(module: GraphModule) -> bool:
    """Whether some call of the graph could be a part of an attention; a backward pass by itself holds none."""
    return any(_is_suspicious(node) for node in module.graph.nodes) and not _is_backward(module)


def _is_backward(module: GraphModule) -> bool:
    """Whether it is the graph of compiled autograd: of all graphs of Dynamo, that one gets its inputs as a list."""
    inputs = (node for node in module.graph.nodes if node.op == "placeholder")
    return any(isinstance(node.meta.get("example_value"), list) or node.type is list for node in inputs)


def _is_suspicious(node: Node) -> bool:
    if node.op in ("call_function", "call_method"):
        name = name_of(node.target)
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        return name not in HARMLESS or (name == "linear" and not _is_input(weight))
    return node.op == "call_module"


def _is_input(value: object) -> bool:
    return isinstance(value, Node) and value.op in ("placeholder", "get_attr")


def name_of(target: object) -> str:
    """`softmax` for torch.softmax, Tensor.softmax and aten.softmax.int alike."""
    packet = getattr(target, "overloadpacket", target)
    return target if isinstance(target, str) else str(getattr(packet, "__name__", packet))


def check_readable(module: GraphModule) -> None:
    """Raises UnsupportedError for a graph that cannot be traced by itself, naming the line and what to do."""
    for node in module.graph.nodes:
        owner = getattr(node.target, "__module__", None) or ""
        is_transform = owner.startswith(_TRANSFORMS) and node.op == "call_function"
        if is_transform and name_of(node.target) not in _VMAP | _AROUND_LEAVES:
            raise UnsupportedError(
                f"torch.func (grad, jvp, functionalize) is used inside the compiled function{line_of(node)}, and its "
                "inner values belong to it alone. Compile the function that torch.func transforms instead"
            )


def nesting(node: Node) -> int:
    """1 for a node that opens a torch.vmap, -1 for one that closes it, else 0."""
    return _NESTING.get(name_of(node.target), 0) if node.op == "call_function" else 0


_TRANSFORMS = ("torch._functorch", "torch._C._functorch")
_NESTING = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}
#: What stands around `x.requires_grad_()`: it allows that inside of torch.func, and transforms nothing.
_AROUND_LEAVES = frozenset({"set_inplace_requires_grad_allowed"})
#: What torch.vmap leaves in a graph.
_VMAP = frozenset({*_NESTING, "_add_batch_dim", "_remove_batch_dim", "lazy_load_decompositions"})


def check_plain(node: Node, value: object) -> None:
    """Raises UnsupportedError for a value that is a tensor of tensors (DTensor, nested, quantised, ...)."""
    for leaf in pytree.tree_leaves(value):
        if is_traceable_wrapper_subclass(leaf):
            raise UnsupportedError(
                f"{node.name} is a {type(leaf).__name__}{line_of(node)}: tensor subclasses are left to the inner "
                "compiler. Convert to plain tensors before the attention, or compile the part that has plain ones"
            )


def line_of(node: Node) -> str:
    """The user's line in brackets, for a message; nothing where it is not known."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return f" ({frames[-1]})" if frames else ""
