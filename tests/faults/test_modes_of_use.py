"""Models in the ways people run them: what is compiled beside an attention must neither be written to nor misread."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import check_like_eager, compiled, reports_after
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan, scan
from torch._higher_order_ops import map as mapped
from torch.func import functional_call, stack_module_state
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import attnopt


class Attend(nn.Module):
    """A block of causal attention with one head, tokens x (B, S, 8) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return x + self.out((q @ k.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ v)


def block(seed: int = 0) -> Attend:
    torch.manual_seed(seed)
    return Attend().double()


def tokens(length: int = 5) -> Tensor:
    return torch.randn(2, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def verdicts(before: Any) -> list[str]:
    return [site.verdict for site in reports_after(before).attention]


# ---- state that a graph holds itself ----

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adam of all at once": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
}


def states_after_steps(
    name: str, how: Callable[[Callable[[], object]], Callable[[], object]]
) -> list[Tensor]:
    """The parameters, and all that the optimizer keeps, after three steps in a function that is compiled."""
    model = block()
    optimizer = OPTIMIZERS[name](model.parameters())

    def step() -> Tensor:
        loss = model(tokens()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = how(step)
    for _ in range(3):
        run()
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return [x.detach() for x in (*model.parameters(), *kept)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiling_an_optimizer_does_not_step_it(name: str) -> None:
    before = attnopt.reports()
    got = states_after_steps(name, compiled)
    assert verdicts(before) == ["rewritten"]
    torch._dynamo.reset()
    want = states_after_steps(name, lambda step: torch.compile(step, backend="eager"))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


class Teacher(nn.Module):
    """A student, and its moving average that is written in the forward pass and run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.student = block()
        self.teacher = copy.deepcopy(self.student)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.mul_(0.5).add_(new, alpha=0.7)
            told = self.teacher(x)
        return (self.student(x) - told).square().mean()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_moving_average_moves_as_in_eager_and_learns_nothing(inner: str) -> None:
    model, before = Teacher(), attnopt.reports()
    twin = copy.deepcopy(model)
    run = compiled(twin, inner=inner)
    for _ in range(2):
        model(tokens()).backward()
        run(tokens()).backward()
    assert verdicts(before) == ["rewritten"] * 2
    assert all(p.grad is None for p in twin.teacher.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach())
        torch.testing.assert_close(q.grad, p.grad)


class Cached(Attend):
    """One token at a time, x (2, 1, 8); keys and values are written into buffers."""

    k: Tensor
    v: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(2, 6, 8))
        self.register_buffer("v", torch.zeros(2, 6, 8))

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        keys, values = self.k.index_copy_(1, place, k), self.v.index_copy_(1, place, v)
        hidden = torch.arange(6) > place
        return (q @ keys.mT * 0.3).masked_fill(hidden, -torch.inf).softmax(-1) @ values


def test_a_program_that_writes_its_cache_may_be_exported_with_gradients_on() -> None:
    torch.manual_seed(0)
    model = Cached().double()
    program = torch.export.export(copy.deepcopy(model), (tokens(1), torch.tensor([0])))
    rewritten, report = attnopt.rewrite(program)
    assert [site.verdict for site in report.attention] == ["rewritten"]
    run = rewritten.module()
    with torch.no_grad():
        for n in range(4):
            held = (torch.randn(2, 1, 8, dtype=torch.float64), torch.tensor([n]))
            torch.testing.assert_close(run(*held), model(*held))
    torch.testing.assert_close(dict(run.named_buffers()), dict(model.named_buffers()))


# ---- operators with bodies that are not run once, argument by argument ----


def scores_doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [x[:, None] for x in (q, k, v)]
    return flex_attention(*heads, score_mod=lambda score, b, h, i, j: score * 2)[:, 0]  # type: ignore[return-value]


def scores_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = [x[:, None] for x in (q, k, v)]
    masked = flex_attention(*heads, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf))
    return masked[:, 0]  # type: ignore[return-value]


def running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return associative_scan(lambda a, b: a + b, q + k + v, 0, combine_mode="generic")


def carried(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scan(lambda c, y: (c + y, c * 2), torch.zeros_like(q[0]), q + k + v)[1]


def row_by_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return mapped(lambda row, w: row @ w, q, k[0].mT @ v[0])


@pytest.mark.parametrize(
    "other", [scores_doubled, scores_masked, running_sums, carried, row_by_row], ids=lambda f: f.__name__
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_body_with_as_many_inputs_as_arguments_is_not_run_in_place_of_its_operator(
    other: Callable[..., Tensor],
) -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v + other(q, k, v)

    inputs = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0)).unbind()
    report = check_like_eager(both, inputs)
    assert "rewritten" in [site.verdict for site in report.attention]


# ---- transforms of functions ----


def test_dropout_that_drops_nothing_draws_no_random_numbers_under_vmap() -> None:
    def mapped_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.0))(q, k, v)

    def evaluated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.vmap(lambda q, k: nn.functional.dropout(q @ k.mT, 0.5, training=False))(q, k)
        return weights.softmax(-1) @ v

    inputs = torch.randn(3, 2, 3, 7, 8).unbind()
    assert {site.verdict for site in check_like_eager(mapped_call, inputs).attention} <= {"refused"}
    assert [site.verdict for site in check_like_eager(evaluated, inputs).attention] == ["rewritten"]


def test_random_numbers_under_vmap_are_left_alone() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held = torch.vmap(lambda q, k: nn.functional.dropout(q @ k.mT, 0.5), randomness="same")(q, k)
        return held.softmax(-1) @ v

    with pytest.warns(RuntimeWarning, match=r"random numbers are drawn inside torch\.vmap"):
        compiled(dropped)(*torch.randn(3, 2, 3, 7, 8).unbind())


def test_an_ensemble_is_eagers() -> None:
    models = [block(n) for n in range(3)]
    parameters, buffers = stack_module_state(models)

    def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(models[0], (p, b), (x,))

    def run(x: Tensor) -> Tensor:
        return torch.vmap(one, in_dims=(0, 0, None))(parameters, buffers, x)

    torch.testing.assert_close(compiled(run)(tokens()), torch.stack([m(tokens()) for m in models]))
