"""Factors of queries: on q where the graph multiplies them into sums, on the output where the sums are finished.

Both are equal in mathematics. An infinite factor tells them apart: infinity times a sum is infinite, a sum of
infinities of both signs is NaN.
"""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from mutant_trials import Setting, judged
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.passes.linear_product import multiplied_last, product_of

B, S, H, D, DV = 2, 9, 2, 4, 6
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def tokens() -> tuple[Tensor, ...]:
    """q, k, v (B, S, H, ...) and a number for each query."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, S, H, width) for width in (D, D, DV))
    return q, k, v, torch.rand(B, S, H) + 0.5


def state(k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("nshd,nshv->nhdv", k, v)


def after_the_state(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.einsum("nlhd,nhdv,nlh->nlhv", q, state(k, v), f)


def before_the_state(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.einsum("nlh,nlhd,nhdv->nlhv", f, q, state(k, v))


def after_the_values(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    weights = torch.einsum("nlhd,nshd->nhls", q, k).tril()
    return torch.einsum("nhls,nshv,nlh->nlhv", weights, v, f)


def on_the_weights(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    weights = torch.einsum("nlhd,nshd->nhls", q, k).tril()
    return torch.einsum("nhls,nlh,nshv->nlhv", weights, f, v)


def all_at_once(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.einsum("nlhd,nshd,nshv,nlh->nlhv", q, k, v, f)


def before_anything_else(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.ops.aten.einsum("nlhd,nhdv,nlh->nlhv", [q, state(k, v), f], path=[0, 2, 0, 1])


def last_by_its_path(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    return torch.ops.aten.einsum("nlh,nlhd,nhdv->nlhv", [f, q, state(k, v)], path=[1, 2, 0, 1])


#: Whether a factor is on q, and what the report says then.
ON_Q: dict[Attend, str] = {
    before_the_state: "linear scale=tensor full", on_the_weights: "linear scale=tensor causal",
    before_anything_else: "linear scale=tensor full",
}  # fmt: skip
ON_OUTPUT: dict[Attend, str] = {
    after_the_state: "linear scale=1 full", after_the_values: "linear scale=1 causal",
    all_at_once: "linear scale=1 full", last_by_its_path: "linear scale=1 full",
}  # fmt: skip
SPELLINGS = {**ON_Q, **ON_OUTPUT}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attend", SPELLINGS)
def test_every_place_is_read_and_the_gradients_are_eagers(attend: Attend, *, dynamic: bool) -> None:
    report = check_like_eager(
        attend, tokens(), differentiable=4, dynamic=dynamic, fixed={H, D, DV}, inner="aot_eager"
    )
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", SPELLINGS[attend])


@pytest.mark.parametrize("number", [float("inf"), 0.0])
@pytest.mark.parametrize("attend", SPELLINGS)
def test_an_infinite_factor_gives_nan_where_the_graph_does(attend: Attend, number: float) -> None:
    q, k, v, f = (x.double() for x in tokens())
    f[:, 3:] = number
    eager = attend(q, k, v, f)
    found = judged(attend, (q, k, v, f), Setting(training=number == 0, kernels=("lightning",)))
    assert (found.wrong, found.verdicts) == ("", ("linear rewritten",))
    assert bool(eager.isnan().any()) == (attend in ON_Q and number != 0)


def normalised(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The factor is in the output alone."""
    total = torch.einsum("nlhd,nhd->nlh", q, k.sum(1)).unsqueeze(-1)
    return after_the_state(q, k, v, f) / (total + 0.5)


def normalised_with_the_factor(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The factor is in what the output is divided by as well, beside a number."""
    total = torch.einsum("nlhd,nhd,nlh->nlh", q, k.sum(1), f).unsqueeze(-1)
    return after_the_state(q, k, v, f) / (total + 0.5)


def normalised_by_the_factor(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
    """The factor is only in what the output is divided by: no such normaliser can be stated."""
    total = torch.einsum("nlhd,nhd,nlh->nlh", q, k.sum(1), f).unsqueeze(-1)
    return torch.einsum("nlhd,nhdv->nlhv", q, state(k, v)) / (total + 0.5)


@pytest.mark.parametrize(
    ("attend", "spec"),
    [
        (normalised, "linear scale=1 full normalised(eps=0.5, floor=None)"),
        (normalised_with_the_factor, "linear scale=tensor full normalised(eps=0.5, floor=None)"),
        (normalised_by_the_factor, "linear scale=1 full"),
    ],
)
def test_a_factor_beside_a_normaliser(attend: Attend, spec: str) -> None:
    q, k, v, f = tokens()
    inputs = (q.abs(), k.abs(), v, f)
    report = check_like_eager(attend, inputs, differentiable=4, inner="aot_eager")
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", spec)


@pytest.mark.parametrize(
    ("equation", "path", "last"),
    [
        ("id,de,i->ie", None, {2}),
        ("i,id,de->ie", None, set()),
        ("id,i,de->ie", None, set()),
        ("id,jd,je,i,e->ie", None, {3, 4}),
        ("id,de,i->ie", [0, 2, 0, 1], set()),
        ("i,id,de,i->ie", [1, 2, 0, 2, 0, 1], {0, 3}),
        ("i,id,de,i->ie", [0, 3, 0, 1, 0, 1], {0, 3}),
        ("id,de->ie", None, set()),
    ],
)
def test_what_pytorch_multiplies_last(equation: str, path: list[int] | None, last: set[int]) -> None:
    terms = equation.partition("->")[0].split(",")
    sizes = {"i": 5, "j": 7, "d": 3, "e": 4}

    def multiply(*tensors: Tensor) -> Tensor:
        return torch.ops.aten.einsum.default(equation, list(tensors), path=path)

    tensors = [torch.randn([sizes[x] for x in term]) for term in terms]
    graph = make_fx(multiply, pre_dispatch=True)(*tensors)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default)
    form = product_of(node)
    assert form is not None
    assert multiplied_last(form) == last
