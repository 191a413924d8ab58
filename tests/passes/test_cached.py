"""Which cache a decoding site reads, told from what its graph writes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from attnopt import ops
from attnopt.passes.cached import Held, held
from attnopt.passes.layout import Axis
from attnopt.reading import read
from attnopt.registry import expansions, rules
from attnopt.shadow import trace
from attnopt.sparq_cache import Plan, SparqCache


def found_in(function: Callable[..., Tensor], *inputs: object) -> Held:
    """What is known of the cache of the one site of a function."""
    seen: list[Held] = []

    def look(module: GraphModule, given: object) -> GraphModule:
        del given
        shadow = trace(module, expansions())
        seen.extend(held(each.site) for each in read(shadow, rules()) if each.site is not None)
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=look, fullgraph=True)(*inputs)
    (only,) = seen
    return only


Q, K, V = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 6)


def a_cache(**changes: object) -> SparqCache:
    return SparqCache(Plan(2, 2, 32, 8, 6, **changes))


def append(cache: SparqCache, *, k_t: Tensor | None) -> None:
    ops.sparq_append(K, V, cache.k, cache.v, lengths=cache.lengths, k_t=k_t, v_mean=cache.v_mean)


def test_the_operands_beside_an_append_have_the_axes_of_its_buffers() -> None:
    def step(cache: SparqCache) -> Tensor:
        append(cache, k_t=cache.k_t)
        return scaled_dot_product_attention(Q, cache.k, cache.v, enable_gqa=True)

    found = found_in(step, a_cache())
    assert found.origin == "appended"
    assert list(found.beside) == ["k_t", "v_mean"]
    by_channel, mean = found.beside["k_t"], found.beside["v_mean"]
    assert [tuple(axis.size for axis in axes) for axes in by_channel.dims] == [(2,), (2,), (8,), (32,)]
    assert [tuple(axis.size for axis in axes) for axes in mean.dims] == [(2,), (2,), (6,)]
    assert by_channel.layout == by_channel.dims
    assert all(isinstance(axis, Axis) for axes in mean.dims for axis in axes)
    assert by_channel.node is not mean.node


def test_without_a_second_layout_the_mean_is_left() -> None:
    def step(cache: SparqCache) -> Tensor:
        append(cache, k_t=None)
        return scaled_dot_product_attention(Q, cache.k, cache.v, enable_gqa=True)

    assert list(found_in(step, a_cache(keys="one")).beside) == ["v_mean"]


@pytest.mark.parametrize("name", ["k", "v", "k_t", "v_mean"])
def test_another_write_to_any_of_the_four_breaks_the_step(name: str) -> None:
    def step(cache: SparqCache) -> Tensor:
        append(cache, k_t=cache.k_t)
        getattr(cache, name).add_(1.0)
        return scaled_dot_product_attention(Q, cache.k, cache.v, enable_gqa=True)

    found = found_in(step, a_cache())
    assert (found.origin, dict(found.beside)) == ("given", {})


def test_a_write_through_a_view_is_a_write() -> None:
    def step(cache: SparqCache) -> Tensor:
        cache.k_t[:, 0].zero_()
        append(cache, k_t=cache.k_t)
        return scaled_dot_product_attention(Q, cache.k, cache.v, enable_gqa=True)

    assert not found_in(step, a_cache()).beside


def test_a_cache_that_grows_is_copied() -> None:
    def step(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(Q, torch.cat([k, K], 2), torch.cat([v, V], 2), enable_gqa=True)

    found = found_in(step, torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6))
    assert (found.origin, dict(found.beside)) == ("copied", {})


def test_a_cache_that_is_written_in_place_is_given() -> None:
    def step(k: Tensor, v: Tensor) -> Tensor:
        k[:, :, 3:4] = K
        v[:, :, 3:4] = V
        return scaled_dot_product_attention(Q, k, v, enable_gqa=True)

    assert found_in(step, torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)).origin == "given"
