"""The shadow: each node knows what it came from, holds its true dtype, and shows what it writes to."""

import pytest
import torch
from graphs import aten_graph, dynamo_graphs, nodes_of, shadow_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node, symbolic_trace
from torch.utils.checkpoint import checkpoint

from attnopt.errors import UnsupportedError
from attnopt.shadow import mutates, sub_graphs, trace, written

aten = torch.ops.aten
Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def one(module: torch.fx.GraphModule, target: object) -> Node:
    (node,) = nodes_of(module, target)
    return node


def test_every_node_with_a_value_has_one_in_the_shadow_of_the_same_shape() -> None:
    (module,) = dynamo_graphs(attend, Q, K, V)
    shadow = trace(module)
    for original, value in shadow.outputs.items():
        wanted = original.meta["example_value"]
        assert (value.meta["val"].shape, value.meta["val"].dtype) == (wanted.shape, wanted.dtype)
        assert shadow.outputs[shadow.value_of[value]] is value
    assert {n for n in module.graph.nodes if n.op != "output"} == {*shadow.outputs}


def test_a_shadow_node_knows_the_node_that_made_it() -> None:
    (module,) = dynamo_graphs(torch.nn.functional.multi_head_attention_forward, *multi_head())
    shadow = trace(module)
    made = [n for n in shadow.nodes if n.op == "call_function" and n.target is aten.bmm.default]
    whole = [n for n in module.graph.nodes if "multi_head" in str(n.target)]
    assert len(whole) == 1
    assert made
    assert {shadow.origin[n] for n in made} == {*whole}


def multi_head() -> tuple[object, ...]:
    x = torch.randn(5, 2, 8)
    return x, x, x, 8, 2, torch.randn(24, 8), torch.randn(24), None, None, False, 0.0, torch.randn(8, 8), None


def test_who_only_asks_for_a_shape_or_is_never_needed_is_no_user() -> None:
    def shaped(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        held = x.sin()
        held.cos()
        return torch.zeros_like(held) + y.expand_as(held), held.exp()

    shadow = shadow_of(shaped, torch.randn(3), torch.randn(1))
    users = shadow.users(one(shadow.module, aten.sin.default))
    assert [user.target for user in users] == [aten.exp.default]
    assert one(shadow.module, aten.cos.default) not in shadow.live


def test_the_body_of_a_checkpoint_is_a_graph_to_be_read_itself() -> None:
    def saved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=False).sin()

    (module,) = dynamo_graphs(saved, Q.clone().requires_grad_(), K, V)
    (body,) = sub_graphs(module)
    outer, inner = trace(module), trace(body)
    inside = one(outer.module, aten.softmax.int)
    assert outer.inlined(inside)
    assert not outer.inlined(one(outer.module, aten.sin.default))
    assert not inner.inlined(one(inner.module, aten.softmax.int))


def test_values_have_the_dtypes_that_autocast_gives_them() -> None:
    def lowered(q: Tensor, k: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = q @ k.transpose(-2, -1)
        return low.float() + q @ k.transpose(-2, -1)

    (module,) = dynamo_graphs(lowered, Q, K)
    products = nodes_of(trace(module).module, aten.matmul.default)
    assert [n.meta["val"].dtype for n in products] == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")


def test_a_node_that_writes_says_where() -> None:
    def writing(x: Tensor, y: Tensor) -> Tensor:
        x.add_(y)
        torch.mul(x, y, out=y)
        return x + y

    module = aten_graph(writing, torch.randn(3), torch.randn(3))
    x, y = (n for n in module.graph.nodes if n.op == "placeholder")
    add, mul, plain = (one(module, target) for target in (aten.add_.Tensor, aten.mul.out, aten.add.Tensor))
    assert (mutates(add), mutates(mul), mutates(plain)) == (True, True, False)
    assert written(plain) == []
    assert written(add) == [x]
    assert written(mul) == [y]
    shadow = trace(module)
    assert {aten.add_.Tensor, aten.mul.out} <= {n.target for n in shadow.live}


def test_a_graph_without_fake_values_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="graph inputs q, k, v have no example values"):
        trace(symbolic_trace(attend))


def test_a_graph_of_symbolic_sizes_alone_is_traced_without_real_tensors() -> None:
    """As behind a graph break, where a mask is made of a length (HF FSMT)."""
    seen = []

    def mask_and_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[-2]
        torch._dynamo.graph_break()
        later = torch.zeros(n, n).fill_(-torch.inf).triu(1)
        torch._dynamo.graph_break()
        return ((q @ k.mT) + later).softmax(-1) @ v

    def backend(module: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.append(
            [
                node.meta["val"]
                for node in trace(module).module.graph.nodes
                if node.meta.get("val") is not None
            ]
        )
        return module.forward

    out = torch.compile(mask_and_attention, backend=backend, dynamic=True)(Q, K, V)
    torch.testing.assert_close(out, mask_and_attention(Q, K, V))
    made = [value for graph in seen for value in graph if isinstance(value, Tensor)]
    assert made
    assert all(isinstance(value, FakeTensor) for value in made)
