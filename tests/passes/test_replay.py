"""The slice between operands and root, run in fp64: the function itself, at its own sizes or at smaller ones."""

import torch
from graphs import shadow_of
from torch import Tensor

from attnopt.passes import emit
from attnopt.passes.replay import Replay, normal_form
from attnopt.passes.sizes import Concrete
from attnopt.pipeline import read
from attnopt.registry import rules
from attnopt.rule import Site
from attnopt.shadow import Shadow

LONG, SHORT = 40, 9


def draw(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, 2, 3, length, 4, dtype=dtype).unbind())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = q.shape[-2]
    scores = (q @ k.transpose(-2, -1)) / 2
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def sites(shadow: Shadow) -> list[Site]:
    return [found.site for found in read(shadow, rules()) if found.site is not None]


def test_the_slice_is_the_function_at_its_own_sizes() -> None:
    inputs = draw(LONG)
    shadow = shadow_of(attend, *inputs)
    (site,) = sites(shadow)
    wide = [x.double() for x in inputs]
    got = Replay.of(shadow, site).run(dict(zip(emit.leaves(site), wide, strict=True)), Concrete())
    torch.testing.assert_close(got, attend(*wide), rtol=1e-12, atol=1e-12)


def test_the_slice_is_the_function_at_reduced_sizes() -> None:
    shadow = shadow_of(attend, *draw(LONG))
    (site,) = sites(shadow)
    small = draw(SHORT, torch.float64)
    values = dict(zip(emit.leaves(site), small, strict=True))
    got = Replay.of(shadow, site).run(values, Concrete({LONG: SHORT}))
    torch.testing.assert_close(got, attend(*small), rtol=1e-12, atol=1e-12)


def test_replaying_leaves_the_values_as_they_were() -> None:
    def overwrites(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        scores.mul_(0.5)
        return scores.softmax(-1) @ v

    shadow = shadow_of(overwrites, *draw(SHORT))
    (site,) = sites(shadow)
    given = draw(SHORT, torch.float64)
    kept = [x.clone() for x in given]
    got = Replay.of(shadow, site).run(dict(zip(emit.leaves(site), given, strict=True)), Concrete())
    torch.testing.assert_close(got, overwrites(*kept), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_numbers_that_are_no_sizes_are_told() -> None:
    def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(LONG, LONG, dtype=torch.bool).triu(17)
        return (q @ k.transpose(-2, -1)).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    shadow = shadow_of(shifted, *draw(LONG))
    (site,) = sites(shadow)
    numbers = Replay.of(shadow, site).numbers
    assert 17 in numbers
    assert LONG not in numbers


def test_equal_sites_have_one_normal_form_and_others_another() -> None:
    def thrice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        once = attend(q, k, v)
        twice = attend(q, k, once.sin())
        return (q @ k.transpose(-2, -1) / 2).softmax(-1) @ twice.sin()

    shadow = shadow_of(thrice, *draw(SHORT))
    forms = [normal_form(Replay.of(shadow, site), site) for site in sites(shadow)]
    assert len(forms) == 3
    assert forms[0] == forms[1] != forms[2]


def test_sites_that_differ_in_a_number_that_the_program_holds_have_different_forms() -> None:
    def attend_with(table: Tensor) -> str:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ((q @ k.transpose(-2, -1)) * torch.tensor(table.tolist())).softmax(-1) @ v

        shadow = shadow_of(attend, *draw(SHORT))
        (site,) = sites(shadow)
        return normal_form(Replay.of(shadow, site), site)

    one, same, other = (attend_with(torch.tensor(x)) for x in (0.5, 0.5, 0.25))
    assert one == same != other
