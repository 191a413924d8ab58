"""Trials of a loop hold few elements of what it treats alike: which dimensions those are, and what that saves."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from compiling import check_like_eager
from graphs import found_in, shadow_of
from loop_spellings import SPELLINGS, Spelling, blocks, slopes
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.passes import linear_loop_probe
from attnopt.passes.linear_loop_few import few
from attnopt.passes.linear_loop_probe import Draw, run
from attnopt.passes.replay import evaluate
from attnopt.passes.reroll import candidates, regions
from attnopt.passes.reroll_cut import Region
from attnopt.passes.sizes import Concrete
from attnopt.reading import read
from attnopt.registry import rules

#: The sizes of the spellings (batch, heads, features of values), and larger ones.
LARGER = {2: 4, 3: 8, 5: 9}
B, H, S, D, E, C = 4, 8, 24, 6, 9, 8


def region_of(function: Callable[..., Any], inputs: list[Tensor]) -> Region:
    shadow = shadow_of(function, *inputs)
    return next(region for candidate in candidates(shadow) for region in regions(shadow, candidate))


def larger(spelling: Spelling) -> list[Tensor]:
    """Its inputs with more batches, heads and features."""
    return [torch.randn([LARGER.get(n, n) for n in x.shape]) for x in spelling.inputs()]


def shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def taken(value: Tensor, sizes: Any) -> Tensor:
    """The first elements along each dimension."""
    return value[tuple(slice(int(n)) for n in sizes)]


def assert_few_do_as_all(region: Region) -> None:
    """The first elements of the result come from the first elements of what enters."""
    shapes = few(region, ())
    trial = run(region, (), Draw(3), {})
    given = {leaf: taken(value, shapes.get(leaf, value.shape)) for leaf, value in trial.given.items()}
    values = evaluate(region.nodes, given, Concrete(), shapes)  # type: ignore[arg-type]
    for end in (region.root, *([region.state] if region.state is not None else [])):
        expected = taken(trial.values[end], values[end].shape)
        torch.testing.assert_close(values[end], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_few_elements_of_a_spelling_compute_what_they_do_among_all(spelling: Spelling) -> None:
    region = region_of(spelling.attend, larger(spelling))
    assert few(region, ())
    assert_few_do_as_all(region)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_what_is_summed_over_or_in_order_keeps_its_size(spelling: Spelling) -> None:
    region = region_of(spelling.attend, larger(spelling))
    root = few(region, ())[region.root]
    assert root[region.dim] == shape(region.root)[region.dim]
    kept = {n for leaf in region.leaves for n in few(region, ()).get(leaf, shape(leaf))}
    assert 4 in kept  # the features of queries and keys


def test_batch_heads_and_features_of_values_are_cut_short() -> None:
    region = region_of(blocks, [torch.randn(B, H, S, n) for n in (D, D, E)] + [torch.rand(H, 1, 1)])
    cut = [few(region, ()).get(leaf, shape(leaf)) for leaf in region.leaves]
    assert sorted(cut) == sorted([(2, 1, 1), (3, 2, S, D), (3, 2, S, D), (3, 2, S, 4)])


def changed(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A loop over blocks in which something is done to the state, given the number of each head."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, state = [], q.new_zeros(B, H, D, E)
        for start in range(0, S, C):
            now = slice(start, start + C)
            scores = (q[:, :, now] @ k[:, :, now].mT).tril()
            rows.append(scores @ v[:, :, now] + q[:, :, now] @ state)
            state = state + k[:, :, now].mT @ v[:, :, now]
            state = change(state, torch.arange(H).view(-1, 1, 1)) if start == C else state
        return torch.cat(rows, 2)

    return attend


def without_last_head(state: Tensor, head: Tensor) -> Tensor:
    return state * (head < H - 1)


def one_head_in_place(state: Tensor, head: Tensor) -> Tensor:
    del head
    state[:, H - 1] *= 0.5
    return state


CHANGES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the last head forgets": without_last_head,
    "the last head forgets half, in place": one_head_in_place,
    "the last sequence takes the state of the first": lambda s, _: torch.cat([s[:-1], s[:1]]),
    "heads in another order": lambda s, _: s.flip(1),
    "heads rolled": lambda s, _: s.roll(1, 1),
    "each head with those before it": lambda s, _: s.cumsum(1),
    "all heads summed": lambda s, _: s.sum(1, keepdim=True).expand(B, H, D, E),
    "heads mixed": lambda s, _: torch.einsum("bhde,gh->bgde", s, s.new_ones(H, H).triu()),
    "heads and batch regrouped": lambda s, _: s.reshape(H, B, D, E).transpose(0, 1),
    "features regrouped": lambda s, _: s.reshape(B, H, E, D).mT,
    "features below the diagonal": lambda s, _: s.tril(),
    "features shifted": lambda s, _: torch.nn.functional.pad(s, (1, -1)),
    "the last features apart": lambda s, _: torch.cat([s[..., :4], -s[..., 4:]], -1),
    "one part of the features apart": lambda s, _: torch.stack([s[..., 0], *s.unbind(-1)[1:-1], -s[..., 8]], -1),
    "features of three parts in another order": lambda s, _: torch.cat(s.split(3, -1)[::-1], -1),
    "the first features repeated": lambda s, _: s[..., :3].repeat(1, 1, 1, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_where_elements_differ_all_are_tried(name: str) -> None:
    inputs = [torch.randn(B, H, S, n) for n in (D, D, E)]
    attend = changed(CHANGES[name])
    report = check_like_eager(attend, inputs, differentiable=3)
    assert all(site.nearest_rule != "linear loop" for site in report.having("rewritten"))
    assert_few_do_as_all(region_of(attend, inputs))


def test_the_loop_that_is_changed_is_read() -> None:
    inputs = [torch.randn(B, H, S, n) for n in (D, D, E)]
    report = check_like_eager(changed(lambda state, _: state), inputs, differentiable=3)
    assert [site.nearest_rule for site in report.having("rewritten")] == ["linear loop"]


class Elements(TorchDispatchMode):
    """Counts the elements of all that is computed in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if type(made) is Tensor and made.dtype == torch.float64:
            self.count += made.numel()
        return made


def test_reading_computes_no_more_for_more_sequences_heads_and_features() -> None:
    def work(batch: int, heads: int, features: int) -> int:
        inputs = [torch.randn(batch, heads, 64, n) for n in (16, 16, features)]
        shadow = shadow_of(blocks, *inputs, torch.rand(heads, 1, 1))
        with Elements() as elements:
            assert any(found.site is not None for found in read(shadow, rules()))
        return elements.count

    assert work(8, 32, 64) == work(5, 6, 7) > 0


def test_equal_layers_are_tried_once_and_each_trial_runs_the_loop_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[int] = []

    def counted(nodes: Any, *rest: Any) -> Any:
        runs.append(len(nodes))
        return evaluate(nodes, *rest)

    def layers(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        for _ in range(3):
            q = blocks(q, k, v, slope).sin()
        return q

    monkeypatch.setattr(linear_loop_probe, "evaluate", counted)
    inputs = [torch.randn(2, 3, S, 4) for _ in range(3)]
    found = found_in(layers, *inputs, slopes())
    assert [each.site is not None for each in found] == [True] * 3
    assert len(runs) == 4  # one to see what it is, three to compare it
