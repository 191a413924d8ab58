"""A proven mask can be said in other words, with tensors of the graph; a kernel is served in those it does best."""

import pytest
import torch
from compiling import check_like_eager
from graphs import site_of
from mask_cases import Site, inputs
from mask_trace import results, roles_of, trace
from torch import Tensor

from attnopt.mask import Opaque
from attnopt.mask_blocks import Segments
from attnopt.options import Options
from attnopt.passes.masks import MaskReading, read_visible
from attnopt.passes.sizes import shape_of
from attnopt.pipeline import describe
from attnopt.policy import choose
from attnopt.registry import kernels
from attnopt.rule import Site as Attention
from attnopt.spec import EmptyRow

Q, K, V = torch.randn(3, 2, 3, 11, 8).unbind()
IDS = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2, [3] * 11])


def read(make, *, dynamic: bool = True) -> MaskReading:
    module = trace(lambda *given: make(Site(*given)), *inputs(6, 6), dynamic=dynamic)
    (node,) = results(module)
    q, k = [n for n in module.graph.nodes if n.op == "placeholder"][:2]
    sizes = {"b": shape_of(q)[0], "h": shape_of(q)[1], "i": shape_of(q)[2], "j": shape_of(k)[2]}
    return read_visible(node, roles_of(node.meta["val"]), sizes)


def words(reading: MaskReading) -> list[str]:
    return [str(mask) for mask in (reading.mask, *reading.otherwise)]


def test_what_blockwise_kernels_cannot_take_may_be_read_from_a_tensor() -> None:
    assert words(read(lambda s: (s.j <= s.i) & (s.j // 4 == s.i // 4))) == [
        "causal & chunk(4)", "causal & opaque", "opaque"
    ]  # fmt: skip


def test_what_they_can_take_may_be_read_as_a_whole() -> None:
    assert words(read(lambda s: (s.j <= s.i) & (s.i - s.j < 3))) == ["causal & window(3)", "opaque"]


def test_a_tensor_has_no_other_words() -> None:
    assert words(read(lambda s: s.pairs)) == ["opaque"]
    assert words(read(lambda s: (s.given > 0)[:, None, None, :])) == ["padding"]


def test_the_tensor_that_says_least_beyond_what_is_needed_is_read() -> None:
    def make(s: Site) -> Tensor:
        chunk = s.j // 4 == s.i // 4
        return chunk & (s.j <= s.i) & (s.given > 0)[:, None, None, :]

    reading = read(make)
    (part, whole) = reading.otherwise
    named = {name: reading.leaves[name].node.name for mask in (part, whole) for name in mask.operand_names()}
    assert {str(part), str(whole)} == {"causal & opaque & padding", "opaque"}
    assert {"eq", "gt"} < set(named.values())


def test_segments_read_the_numbers_and_know_when_both_sides_are_the_same() -> None:
    reading = read(lambda s: s.ids[:, None, :, None] == s.ids[:, None, None, :])
    assert reading.mask == Segments("query_ids", "key_ids", aligned=True)
    assert [leaf.roles for leaf in reading.leaves.values()][:2] == [("b", "i"), ("b", "j")]
    other = read(lambda s: s.ids[:, None, :, None] == s.given[:, None, None, :])
    assert other.mask == Segments("query_ids", "key_ids", aligned=False)


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = (j <= i) & (j // 4 == i // 4)
    return (q @ k.transpose(-2, -1)).masked_fill(~seen, -1e9).softmax(-1) @ v


def packed(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    seen = (j <= i) & (ids[:, None, :, None] == ids[:, None, None, :])
    return (q @ k.transpose(-2, -1) + torch.where(seen, 0.0, -torch.inf)).softmax(-1) @ v


def chosen(site: Attention) -> tuple[str, str]:
    choice = choose(describe(site, gradient=False), kernels(), Options())
    assert choice.kernel is not None
    return choice.kernel.name, str(choice.spec.mask)


def test_a_query_sees_itself_in_its_chunk_and_in_its_segment() -> None:
    assert site_of(chunked, Q, K, V).spec.empty_row is EmptyRow.NEVER
    assert site_of(packed, Q, K, V, IDS).spec.empty_row is EmptyRow.NEVER


def test_the_library_reads_the_mask_that_the_graph_holds() -> None:
    site = site_of(chunked, Q, K, V)
    assert str(site.spec.mask) == "causal & chunk(4)"
    assert [set(other.operands) - {"q", "k", "v"} for other in site.otherwise] == [{"held"}, {"held1"}]
    assert chosen(site) == ("sdpa", "opaque")
    assert isinstance(site.otherwise[-1].spec.mask, Opaque)


@pytest.mark.parametrize("dynamic", [False, True])
def test_chunks_compute_what_eager_computes(dynamic: bool) -> None:
    (site,) = check_like_eager(chunked, (Q, K, V), differentiable=3, dynamic=dynamic).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1 causal & chunk(4)")


@pytest.mark.parametrize("dynamic", [False, True])
def test_segments_compute_what_eager_computes(dynamic: bool) -> None:
    (site,) = check_like_eager(packed, (Q, K, V, IDS), differentiable=3, dynamic=dynamic).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1 causal & segments")


@pytest.mark.parametrize("allow", ["reference", "sdpa", "streaming"])
@pytest.mark.parametrize(("attend", "more"), [(chunked, ()), (packed, (IDS,))])
def test_each_kernel_serves_them(attend, more, allow: str) -> None:
    (site,) = check_like_eager(attend, (Q, K, V, *more), allow=allow).attention
    assert (site.verdict, site.kernel) == ("rewritten", allow)


def test_a_mask_over_half_of_the_heads_is_proven_all_the_same() -> None:
    """The mask has a dimension that is a part of the batch of the site: it does not depend on it."""

    def halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(2, 1, 1, 11, 11, dtype=torch.bool).tril()
        scores = (q.view(2, 3, 1, 11, 8) @ k.view(2, 3, 1, 11, 8).transpose(-2, -1)).masked_fill(~seen, -1e9)
        return scores.softmax(-1) @ v.view(2, 3, 1, 11, 8)

    assert str(site_of(halves, Q, K, V).spec.mask) == "causal"
