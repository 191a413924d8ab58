"""What a graph says of masks that it returns is what they are, at every length; of other results it says nothing."""

from collections.abc import Callable, Mapping

import pytest
import torch
from mask_trace import results, trace
from torch import Tensor
from torch.fx import GraphModule

from attnopt.passes.mask_handed import form_of_plane, forms_made
from attnopt.passes.mask_literals import Planes, plane

LENGTHS = [(sq, sk) for sq in range(2, 10) for sk in range(2, 10)]
LOWEST = torch.finfo(torch.float32).min


def distance(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[0]) - torch.arange(q.shape[0])[:, None]


MASKS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda q, k: distance(q, k) <= 0,
    "bottom right": lambda q, k: torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(2),
    "window": lambda q, k: (distance(q, k) <= 0) & (distance(q, k) > -3),
    "both sides": lambda q, k: distance(q, k).abs() <= 2,
    "filled": lambda q, k: torch.full((q.shape[0], k.shape[0]), LOWEST).triu(1),
    "infinite, with heads": lambda q, k: torch.where(distance(q, k) <= 0, 0.0, -torch.inf).expand(
        2, 3, -1, -1
    ),
    "written in place": lambda q, k: torch.zeros(q.shape[0], k.shape[0]).fill_(-torch.inf).triu(diagonal=1),
    "half": lambda q, k: torch.full((1, 1, q.shape[0], k.shape[0]), -65504.0).triu(1).half(),
    "nothing hidden": lambda q, k: torch.zeros(q.shape[0], k.shape[0]),
    "a table": lambda q, k: (distance(q, k) <= 0).float() * 3 + (distance(q, k) <= -2).float(),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_form_is_the_mask_at_all_lengths(name: str) -> None:
    forms = set()
    for sq, sk in LENGTHS:
        q, k = torch.ones(sq), torch.ones(sk)
        (node,) = results(trace(MASKS[name], q, k))
        form = form_of_plane(node)
        assert form is not None
        made = MASKS[name](q, k)
        assert torch.equal(plane(form, made.shape, made.dtype), made)
        forms.add(form)
    (node,) = results(trace(MASKS[name], torch.ones(8), torch.ones(7), dynamic=True))
    form = form_of_plane(node)
    assert isinstance(form, Planes)
    assert form in forms


UNKNOWN: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by columns": lambda q, k: torch.arange(k.shape[0]).expand(q.shape[0], -1) < 3,
    "by sums": lambda q, k: (torch.arange(q.shape[0])[:, None] + torch.arange(k.shape[0])) < 5,
    "by chunks": lambda q, k: torch.arange(q.shape[0])[:, None] // 3 == torch.arange(k.shape[0]) // 3,
    "data": lambda q, k: (distance(q, k) <= 0) & (k > 0),
    "slopes": lambda q, k: distance(q, k).float(),
    "twice as steep": lambda q, k: torch.arange(k.shape[0]) <= 2 * torch.arange(q.shape[0])[:, None],
    "to the last key": lambda q, k: distance(q, k) <= k.shape[0] - q.shape[0],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_results_have_no_form(name: str) -> None:
    (node,) = results(trace(UNKNOWN[name], torch.ones(8), torch.ones(7), dynamic=True))
    assert form_of_plane(node) is None


def captured(function: Callable[..., object], *inputs: Tensor, dynamic: bool = False) -> GraphModule:
    """The Dynamo graph of a function."""
    found: list[GraphModule] = []

    def keep(module: GraphModule, given: list[Tensor]) -> Callable[..., object]:
        del given
        found.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=dynamic)(*inputs)
    (module,) = found
    return module


def causal(n: int) -> Tensor:
    return torch.full((n, n), -torch.inf).triu(1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_are_found_among_the_results(dynamic: bool) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        return x * 2, causal(n), torch.ones(n, n, dtype=torch.bool).tril(), torch.arange(n), causal(n) + x

    made = forms_made(captured(function, torch.ones(7), dynamic=dynamic))
    assert made == {1: Planes(((0, 0.0),), -torch.inf), 2: Planes(((0, 1.0),), 0.0)}


def test_what_data_may_have_written_to_is_no_mask() -> None:
    def in_place(x: Tensor) -> Tensor:
        mask = causal(x.shape[0])
        mask[2].add_(x)
        return mask

    def assigned(x: Tensor) -> Tensor:
        mask = causal(x.shape[0])
        mask[0] = x
        return mask

    def into(x: Tensor) -> Tensor:
        mask = causal(x.shape[0])
        torch.add(x, x[:, None], out=mask)
        return mask

    for function in (in_place, assigned, into):
        assert forms_made(captured(function, torch.ones(7))) == {}


def test_other_writes_do_not_matter() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        x *= torch.arange(x.shape[0])
        return x, causal(x.shape[0]).add_(torch.zeros(x.shape[0]))

    assert forms_made(captured(function, torch.ones(7))) == {1: Planes(((0, 0.0),), -torch.inf)}
