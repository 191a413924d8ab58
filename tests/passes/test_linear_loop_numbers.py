"""A loop over positions that computes with a number made of symbolic sizes: exact at every size, or refused."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager, compiled
from torch import Tensor

Attend = Callable[..., Tensor]
Scaled = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def loop(scaled: Scaled, gate: Callable[[int], float] = lambda _: 1.0) -> Attend:
    """A recurrence over four tokens; `scaled`: what each has to do with the width, `gate`: the state's factor."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width, out = q.shape[-1], torch.empty_like(v)
        state = torch.zeros(2, 3, width, v.shape[-1], dtype=q.dtype)
        for t in range(4):
            q_t, k_t, v_t = scaled(q[:, t], k[:, t], v[:, t], width)
            state = state * gate(width) + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
            out[:, t] = torch.einsum("bhkv,bhk->bhv", state, q_t)
        return out

    return attend


def stepped(scaled: Scaled) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same from a first state on; the last one comes back."""

    def attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        width, out = q.shape[-1], torch.empty_like(v)
        for t in range(4):
            q_t, k_t, v_t = scaled(q[:, t], k[:, t], v[:, t], width)
            state = state + torch.einsum("bhk,bhv->bhkv", k_t, v_t)
            out[:, t] = torch.einsum("bhkv,bhk->bhv", state, q_t)
        return out, state

    return attend


FACTORS: dict[str, Scaled] = {
    "queries": lambda q, k, v, n: (q * n**-0.5, k, v),
    "queries divided": lambda q, k, v, n: (q / n**0.5, k, v),
    "keys": lambda q, k, v, n: (q, k * n**-0.5, v),
    "values": lambda q, k, v, n: (q, k, v / n**0.5),
    "both": lambda q, k, v, n: (q * n**-0.25, k * n**-0.25, v),
    "another power": lambda q, k, v, n: (q * n**-0.5, k * n**-0.5, v),
    "two numbers": lambda q, k, v, n: (q * n**-0.5, k * (n + 1) ** -0.25, v),
    "a number and a constant": lambda q, k, v, n: (0.5 * q * n**-0.5, k, v),
}


def inputs(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(3, 2, 4, 3, width, dtype=dtype).unbind()


@pytest.mark.parametrize("name", FACTORS)
def test_a_common_factor_made_of_a_symbolic_width_is_right_at_every_width(name: str) -> None:
    attend = loop(FACTORS[name])
    report = check_like_eager(attend, inputs(5), differentiable=3, fixed=(2, 4, 3))
    assert [site.verdict for site in report.sites] == ["rewritten"]
    assert "scale=" in report.sites[0].spec
    assert "scale=1 " not in report.sites[0].spec
    again = compiled(attend, dynamic=True)
    for width in (5, 7, 9):
        given = inputs(width, torch.float64)
        torch.testing.assert_close(again(*given), attend(*given))


@pytest.mark.parametrize("name", ["queries", "keys", "both", "two numbers"])
def test_a_common_factor_reaches_the_last_state_where_the_graph_has_it(name: str) -> None:
    """A factor of the keys multiplies what they add to the state, but not the first state."""
    attend = stepped(FACTORS[name])
    given = (*inputs(5), torch.randn(2, 3, 5, 5))
    check_like_eager(attend, given, differentiable=4, fixed=(2, 4, 3))
    again = compiled(attend, dynamic=True)
    for width in (5, 7, 9):
        wide = (*inputs(width, torch.float64), torch.randn(2, 3, width, width, dtype=torch.float64))
        torch.testing.assert_close(again(*wide), attend(*wide))


NEAR_MISSES: dict[str, Attend] = {
    "added": loop(lambda q, k, v, n: (q + n**-0.5, k, v)),
    "some of it": loop(lambda q, k, v, n: (q, k, v + v * n**-0.5)),
    "a power of the keys": loop(lambda q, k, v, n: (q, k ** (n**-0.5 + 1.0), v)),
    "a decay": loop(lambda q, k, v, _: (q, k, v), lambda n: n**-0.5),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_no_common_factor_is_refused(name: str) -> None:
    attend = NEAR_MISSES[name]
    given = [x.abs() + 0.1 for x in inputs(5)]
    report = check_like_eager(attend, given, fixed=(2, 4, 3))
    assert not report.having("rewritten")
    assert any("made of symbolic sizes" in (site.reason or "") for site in report.sites)
    again = compiled(attend, dynamic=True)
    for width in (5, 7, 9):
        wide = [x.abs() + 0.1 for x in inputs(width, torch.float64)]
        torch.testing.assert_close(again(*wide), attend(*wide))


def test_a_factor_of_some_tokens_is_no_common_factor() -> None:
    """Nor is one of the first state alone."""

    def attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
        scale, out = q.shape[-1] ** -0.5, []
        for t in range(4):
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale if t else q[:, t], state))
        return torch.stack(out, 1)

    report = check_like_eager(attend, (*inputs(5), torch.randn(2, 3, 5, 5)), fixed=(2, 4, 3))
    assert [site.verdict for site in report.sites] == ["refused"]
    assert "not as a factor of all" in report.sites[0].reason


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_layers_that_share_one_reading_keep_their_own_factors(sign: float) -> None:
    once = loop(FACTORS["queries"])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return once(q, k, (once(k, q, v) * sign).tanh())

    report = check_like_eager(attend, inputs(5), fixed=(2, 4, 3))
    assert [site.verdict for site in report.sites] == ["rewritten"] * 2
