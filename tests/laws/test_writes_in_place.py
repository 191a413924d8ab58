"""What the graph writes in place shows under every name of the memory: after a rewrite as before it."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import aten_graph, nodes_of
from torch import Tensor

from attnopt.options import Options
from attnopt.pipeline import optimise

aten = torch.ops.aten
B, H, S, D = 2, 3, 7, 4
torch.manual_seed(0)
INPUTS = (*torch.randn(3, B, H, S, D, dtype=torch.float64).unbind(), torch.randn(D, 5, dtype=torch.float64))

#: Divides an output by a total, in place: the result is the very tensor that was divided.
DIVISIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "div_": lambda out, total: out.div_(total),
    "itruediv": lambda out, total: out.__itruediv__(total),
    "mul_": lambda out, total: out.mul_(1 / total),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda x: x.add_(1.0),
    "zero_": lambda x: x.zero_(),
    "copy_": lambda x: x.copy_(torch.ones_like(x)),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.5),
    "setitem": lambda x: x.__setitem__((..., 0), 3.0),
    "addcmul_": lambda x: x.addcmul_(x, x),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "select": lambda x: x.select(3, 0),
    "slice": lambda x: x[:, :, 1:],
    "transpose": lambda x: x.transpose(1, 2),
    "reshape": lambda x: x.reshape(B, H, -1),
    "contiguous": lambda x: x.contiguous(),
}


def linear_weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q.sigmoid() @ k.sigmoid().mT).tril()
    return weights, weights.sum(-1, keepdim=True) + 1e-5


def verdicts(attend: Callable[..., object], *, training: bool = False) -> list[str]:
    inner = "aot_eager" if training else "eager"  # plain autograd forbids to write to what a call has saved
    report = check_like_eager(attend, INPUTS, differentiable=3 * training, inner=inner)
    return [site.verdict for site in report.attention]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("division", DIVISIONS)
def test_an_output_divided_in_place_is_one_tensor_under_both_names(division: str, *, training: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        weights, total = linear_weights(q, k)
        out = weights @ v
        divided = DIVISIONS[division](out, total)
        out[..., 0].add_(1.0)
        return divided * 1, out @ w

    assert verdicts(attend, training=training) == ["rewritten"]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_write_under_the_old_name_shows_under_the_new_one(view: str, write: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        weights, total = linear_weights(q, k)
        out = weights @ v
        divided = out.div_(total)
        WRITES[write](VIEWS[view](out))
        return divided @ w

    assert verdicts(attend) == ["rewritten"]


@pytest.mark.parametrize("view", VIEWS)
def test_a_write_to_the_output_of_a_softmax_shows_under_every_name(view: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out = (q @ k.mT).softmax(-1) @ v
        part = VIEWS[view](out)
        part.mul_(2.0)
        return out @ w, part.sum(-1)

    assert verdicts(attend) == ["rewritten"]


def test_nothing_of_the_old_output_is_left_to_compute() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        weights, total = linear_weights(q, k)
        out = weights @ v
        out.div_(total)
        return out.transpose(1, 2) @ w

    module = aten_graph(attend, *INPUTS)
    assert [site.verdict for site in optimise(module, Options(), gradient=False).sites] == ["rewritten"]
    assert nodes_of(module, aten.tril.default) == nodes_of(module, aten.div_.Tensor) == []


def handed_on_as_it_is(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    weights, total = linear_weights(q, k)
    out = weights @ v
    divided = out.to(out.dtype).div_(total)
    out.add_(1.0)
    return divided @ w


def total_written_to_afterwards(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    weights, total = linear_weights(q, k)
    divided = (weights @ v).div_(total)
    total.add_(3.0)
    return divided @ w, total * 1


def total_written_to_before(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    weights, total = linear_weights(q, k)
    out = weights @ v
    total[:, :, 1:].add_(3.0)
    return out.div_(total) @ w


def weights_written_to_between(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    weights, _ = linear_weights(q, k)
    out = weights @ v
    weights[..., 0].add_(1.0)
    return out.div_(weights.sum(-1, keepdim=True)) @ w


def product_written_to_before_the_division(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    weights, total = linear_weights(q, k)
    out = weights @ v
    out.select(3, 0).add_(1.0)
    return out.div_(total) @ w


def scores_written_to_afterwards(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    scaled = scores.mul_(0.5)
    out = scores.softmax(-1) @ v
    scaled.add_(1.0)
    return out @ w, scores @ v


def queries_written_to_between(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    own = q * 1
    scaled = own.mul_(0.5)
    scores = scaled @ k.mT
    own.add_(1.0)
    return scores.softmax(-1) @ v @ w, scaled @ w


def keys_turned_back_in_place(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    own = k * 1
    turned = own.transpose_(-1, -2)
    scores = q @ turned
    own.transpose_(-1, -2)
    return scores.softmax(-1) @ v @ w, turned @ w


def state_written_to_after_the_product(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    q, k = q.sigmoid(), k.sigmoid()
    state = k.mT @ v
    out = q @ state
    state.add_(1.0)
    return out.div_((q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)) @ w, state * 1


NEAR_MISSES = (
    handed_on_as_it_is, total_written_to_afterwards, total_written_to_before, weights_written_to_between,
    product_written_to_before_the_division, scores_written_to_afterwards, queries_written_to_between,
    keys_turned_back_in_place, state_written_to_after_the_product,
)  # fmt: skip


@pytest.mark.parametrize("attend", NEAR_MISSES, ids=lambda f: f.__name__)
def test_writes_in_other_places_are_refused(attend: Callable[..., object]) -> None:
    assert "rewritten" not in verdicts(attend)


def queries_detached(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    own = q.sin()
    scores = own @ k.mT
    own.detach_()
    return scores.softmax(-1) @ v @ w


def values_detached(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    weights, total = linear_weights(q, k)
    own = v.cos()
    out = weights @ own
    own.detach_()
    return out.div_(total) @ w


@pytest.mark.parametrize("attend", [queries_detached, values_detached], ids=lambda f: f.__name__)
def test_an_operand_detached_after_its_use_keeps_its_gradient(attend: Callable[..., object]) -> None:
    assert verdicts(attend, training=True) == ["refused"]
    with torch.no_grad():
        assert verdicts(attend) == ["rewritten"]
