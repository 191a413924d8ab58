"""SparqCache: whatever is done to it, it answers as a fresh cache with the same tokens would."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor

from attnopt.errors import OptionError, ShapeError
from attnopt.kernels.sparq.plain import sparq_reference
from attnopt.sparq_cache import Plan, SparqCache

PLAN = Plan(batch=2, kv_heads=2, capacity=24, d=8, dv=6, dtype=torch.float64)


@dataclass
class Twin:
    """A cache, and beside it the tokens of each row as lists."""

    cache: SparqCache = field(default_factory=lambda: SparqCache(PLAN))
    keys: list[Tensor] = field(default_factory=lambda: [torch.zeros(2, 0, 8).double()] * 2)
    values: list[Tensor] = field(default_factory=lambda: [torch.zeros(2, 0, 6).double()] * 2)

    def room(self) -> int:
        return self.cache.capacity - max(k.shape[1] for k in self.keys)

    def append(self, tokens: int) -> None:
        k, v = torch.randn(2, 2, tokens, 8).double(), torch.randn(2, 2, tokens, 6).double()
        self.cache.append(k, v)
        self._remember(k, v)

    def step(self) -> None:
        q, (k, v) = torch.randn(2, 4, 1, 8).double(), (torch.randn(2, 2, 1, n).double() for n in (8, 6))
        out = self.cache.step(q, k, v, rank=3, topk=5, local=2, mean_value=True)
        self._remember(k, v)
        self.assert_answers(q, out)

    def crop(self, lengths: list[int]) -> None:
        self.cache.crop(torch.tensor(lengths))
        self.keys = [k[:, :n] for k, n in zip(self.keys, lengths, strict=True)]
        self.values = [v[:, :n] for v, n in zip(self.values, lengths, strict=True)]

    def reorder(self, rows: list[int]) -> None:
        self.cache.reorder(torch.tensor(rows))
        self.keys, self.values = [self.keys[i] for i in rows], [self.values[i] for i in rows]

    def reset(self) -> None:
        self.cache.reset()
        self.keys, self.values = Twin().keys, Twin().values

    def _remember(self, k: Tensor, v: Tensor) -> None:
        self.keys = [torch.cat(pair, 1) for pair in zip(self.keys, k, strict=True)]
        self.values = [torch.cat(pair, 1) for pair in zip(self.values, v, strict=True)]

    def assert_answers(self, q: Tensor, out: Tensor) -> None:
        for b, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            want = sparq_reference(q[b : b + 1], k[None], v[None], rank=3, topk=5, local=2, mean_value=True)
            torch.testing.assert_close(out[b : b + 1], want, rtol=1e-10, atol=1e-11)

    def assert_in_step(self) -> None:
        c = self.cache
        for b, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            n = k.shape[1]
            assert int(c.lengths[b]) == n
            assert torch.equal(c.k[b, :, :n], k)
            assert torch.equal(c.v[b, :, :n], v)
            assert c.k_t is not None
            assert torch.equal(c.k_t[b, :, :, :n], k.mT)
            if n:
                torch.testing.assert_close(c.v_mean[b], v.mean(1), rtol=1e-11, atol=1e-12)


OPERATIONS = st.sampled_from(["append", "step", "step", "crop", "reorder", "reset"])


@settings(max_examples=40)
@given(st.lists(OPERATIONS, min_size=1, max_size=8), st.data())
def test_any_interleaving_equals_a_fresh_cache(operations: list[str], data: st.DataObject) -> None:
    twin = Twin()
    for name in operations:
        if name == "append":
            twin.append(data.draw(st.integers(0, min(7, twin.room()))))
        elif name == "step" and twin.room():
            twin.step()
        elif name == "crop":
            twin.crop([data.draw(st.integers(0, k.shape[1])) for k in twin.keys])
        elif name == "reorder":
            twin.reorder([data.draw(st.integers(0, 1)) for _ in range(2)])
        elif name == "reset":
            twin.reset()
        twin.assert_in_step()
    q = torch.randn(2, 4, 1, 8).double()
    twin.append(min(1, twin.room()))
    twin.assert_answers(q, twin.cache.attend(q, rank=3, topk=5, local=2, mean_value=True))


def filled(plan: Plan = PLAN, tokens: int = 10) -> SparqCache:
    cache = SparqCache(plan)
    sizes = (plan.batch, plan.kv_heads, tokens)
    cache.append(*(torch.randn(*sizes, n, dtype=plan.dtype) for n in (plan.d, plan.dv)))
    return cache


def test_buffers_never_move() -> None:
    cache = filled()
    before = [x.data_ptr() for x in cache._buffers()]
    cache.crop(4)
    cache.reorder(torch.tensor([1, 0]))
    cache.reset(torch.tensor([0, 3]))
    cache.append(torch.randn(2, 2, 5, 8).double(), torch.randn(2, 2, 5, 6).double())
    cache.step(*(torch.randn(2, h, 1, n).double() for h, n in ((4, 8), (2, 8), (2, 6))))
    assert [x.data_ptr() for x in cache._buffers()] == before


def test_left_padding_never_counts() -> None:
    k, v, q = (
        torch.randn(2, 2, 12, 8).double(),
        torch.randn(2, 2, 12, 6).double(),
        torch.randn(2, 2, 1, 8).double(),
    )
    k[0, :, :5], v[0, :, :5] = torch.nan, torch.inf
    cache = SparqCache(PLAN)
    cache.reset(torch.tensor([5, 0]))
    cache.append(k, v)
    out = cache.attend(q, rank=3, topk=4, local=2)
    for b, first in enumerate((5, 0)):
        want = sparq_reference(
            q[b : b + 1], k[b : b + 1, :, first:], v[b : b + 1, :, first:], rank=3, topk=4, local=2
        )
        torch.testing.assert_close(out[b : b + 1], want, rtol=1e-10, atol=1e-11)
    cache.crop(9)
    torch.testing.assert_close(cache.v_mean[0], v[0, :, 5:9].mean(1))
    cache.crop(3)
    assert (cache.attend(q)[0] == 0).all()


def test_a_prompt_padded_on_the_right_is_cropped_to_its_lengths() -> None:
    cache, alone = filled(), SparqCache(replace(PLAN, batch=1))
    cache.crop(torch.tensor([4, 10]))
    alone.append(cache.k[:1, :, :4], cache.v[:1, :, :4])
    token = [torch.randn(2, h, 1, n).double() for h, n in ((2, 8), (2, 8), (2, 6))]
    together = cache.step(*token, rank=3, topk=3, local=1)
    assert_same(together[:1], alone.step(*(x[:1] for x in token), rank=3, topk=3, local=1))


def test_selecting_rows_changes_the_batch_size() -> None:
    cache = filled()
    cache.crop(torch.tensor([7, 10]))
    other = cache.select(torch.tensor([1, 0, 1]))
    assert other.plan.batch == 3
    for mine, theirs in zip(cache._buffers(), other._buffers(), strict=True):
        assert torch.equal(mine[[1, 0, 1]], theirs)
    other.crop(2)
    assert cache.lengths.tolist() == [7, 10]


def test_one_key_layout_answers_the_same_and_takes_two_thirds_of_the_memory() -> None:
    plan = replace(PLAN, dv=8, capacity=4096)
    both, rows = filled(plan), SparqCache(replace(plan, keys="one"))
    rows.append(both.k[:, :, :10], both.v[:, :, :10])
    q = torch.randn(2, 4, 1, 8).double()
    assert_same(both.attend(q, rank=3, topk=4, local=1), rows.attend(q, rank=3, topk=4, local=1))
    plain = 2 * 2 * 2 * 4096 * 8 * 8
    assert plain <= rows.nbytes < 1.001 * plain
    assert 1.5 * plain <= both.nbytes < 1.501 * plain


def test_memory_tells_what_the_second_layout_takes() -> None:
    plan = replace(PLAN, dv=8, capacity=4096)
    both, one = SparqCache(plan).memory(), SparqCache(replace(plan, keys="one")).memory()
    plain = 2 * 2 * 2 * 4096 * 8 * 8
    assert (both.plain, both.by_channel, one.by_channel) == (plain, plain // 2, 0)
    assert both.total == SparqCache(plan).nbytes
    assert (both + one).total == both.total + one.total
    assert str(both).endswith("+50.0% beside a plain cache")
    assert str(one).endswith("+0.0% beside a plain cache")


def test_steps_compile_once_whatever_the_length() -> None:
    cache, plain = filled(), SparqCache(PLAN)
    plain.append(cache.k[:, :, :10], cache.v[:, :, :10])
    graphs: list[object] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: cache.step(q, k, v, topk=4, local=1), backend=counted, fullgraph=True
    )
    for _ in range(4):
        token = [torch.randn(2, h, 1, n).double() for h, n in ((4, 8), (2, 8), (2, 6))]
        assert_same(compiled(*token), plain.step(*token, topk=4, local=1))
    assert len(graphs) == 1
    assert cache.lengths.tolist() == [14, 14]


def test_choosing_every_position_is_exact_attention() -> None:
    cache = filled(replace(PLAN, dtype=torch.float32))
    q = torch.randn(2, 4, 1, 8)
    k, v = cache.k[:, :, :10], cache.v[:, :, :10]
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), enable_gqa=True
    )
    for topk in (10, 32):
        assert_same(cache.attend(q, topk=topk, local=0, mean_value=True), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": 0}, "capacity is 0; wanted at least 1"),
        ({"batch": -1}, "batch is -1"),
        ({"keys": "columns"}, "keys is 'columns'; wanted 'both' .layouts. or 'one'"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SparqCache(replace(PLAN, **change))


def test_what_does_not_fit_is_refused() -> None:
    cache = filled()
    with pytest.raises(ShapeError, match="has room for 32 positions, holds 10 and was given 23 more"):
        cache.append(torch.randn(2, 2, 23, 8).double(), torch.randn(2, 2, 23, 6).double())
    with pytest.raises(ShapeError, match=r"`select` changes the batch size"):
        cache.reorder(torch.tensor([0]))
    assert cache.lengths.tolist() == [10, 10]
