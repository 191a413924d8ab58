"""Laws of the mask calculus: what it proves is what the graph computes, at every length; what it cannot, it says."""

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import CASES, INF, MIN, Case, Site, any_lengths, as_many_keys, inputs, not_fewer_keys
from mask_programs import condition
from mask_trace import dense, inputs_of, results, roles_of, run, trace
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt.mask import band
from attnopt.passes.masks import (
    AdditiveReading,
    MaskReading,
    may_have_empty_rows,
    read_additive,
    read_visible,
)
from attnopt.passes.sizes import shape_of
from attnopt.rule import Reject

LENGTHS = range(1, 10)


@dataclass(frozen=True)
class Traced:
    """Several spellings in one graph, each with what was read from it."""

    module: GraphModule
    cases: tuple[Case, ...]
    readings: tuple[MaskReading | AdditiveReading | None, ...]


def sizes_of(module: GraphModule) -> dict:
    q, k = inputs_of(module)[:2]
    return {"b": shape_of(q)[0], "h": shape_of(q)[1], "i": shape_of(q)[2], "j": shape_of(k)[2]}


def read(kind: str, node: Node, module: GraphModule) -> MaskReading | AdditiveReading | None:
    """What is read where the graph returns the mask."""
    roles, sizes = roles_of(node.meta["val"]), sizes_of(module)
    end = module.graph.output_node()
    if kind == "additive":
        return read_additive(node, roles, sizes, at=end)
    return read_visible(node, roles, sizes, negated=kind == "hidden", at=end)


@functools.cache
def traced(sq: int, sk: int, fits=None, *, dynamic: bool = False) -> Traced:
    """All spellings that exist at these lengths, or those of one kind."""
    cases = tuple(c for c in CASES if c.fits(sq, sk) and fits in (None, c.fits))
    module = trace(lambda *given: [c.make(Site(*given)) for c in cases], *inputs(sq, sk), dynamic=dynamic)
    made = zip(cases, results(module), strict=True)
    return Traced(module, cases, tuple(read(c.kind, node, module) for c, node in made))


def lengths_traced(case: Case) -> tuple[int, int]:
    return (6, 6) if case.fits is as_many_keys else (5, 7)


def mask_of(reading: MaskReading | AdditiveReading | None) -> str:
    match reading:
        case MaskReading(mask):
            return str(mask)
        case AdditiveReading(visible):
            return str(visible.mask)
    return "none"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_spelling_has_its_name_at_symbolic_lengths(case):
    found = traced(*lengths_traced(case), case.fits, dynamic=True)
    assert mask_of(found.readings[found.cases.index(case)]) == case.expected


def assert_true_reading(case: Case, reading, node: Node, values: dict, sq: int, sk: int) -> None:
    """The reading, evaluated, is the mask that the graph computes: bit for bit."""
    if reading is None:
        return
    made = values[node]
    where = made == 0 if case.kind == "additive" else ~made if case.kind == "hidden" else made
    visible = reading.visible if isinstance(reading, AdditiveReading) else reading
    for words in (visible.mask, *visible.otherwise):
        claimed, actual = torch.broadcast_tensors(dense(visible, values, sq, sk, words), where)
        assert torch.equal(claimed, actual), f"{case.name} at {sq} x {sk}: read as {words}"
    if isinstance(reading, AdditiveReading):
        assert (made[made != 0] == reading.fill).all(), f"{case.name}: fill {reading.fill}"


def assert_all_true(found: Traced, sq: int, sk: int) -> None:
    values = run(found.module, *inputs(sq, sk))
    for case, reading, node in zip(found.cases, found.readings, results(found.module), strict=True):
        assert_true_reading(case, reading, node, values, sq, sk)


@pytest.mark.parametrize("fits", [any_lengths, not_fewer_keys, as_many_keys])
def test_what_is_proven_at_symbolic_lengths_holds_at_all_lengths(fits):
    found = traced(*(6, 6) if fits is as_many_keys else (5, 7), fits, dynamic=True)
    for sq, sk in itertools.product(range(2, 10), repeat=2):
        if fits(sq, sk) and sk > 2:
            assert_all_true(found, sq, sk)


@pytest.mark.parametrize(("sq", "sk"), list(itertools.product((1, 2, 4), (1, 3, 4))))
def test_what_is_proven_at_fixed_lengths_is_what_is_computed(sq, sk):
    assert_all_true(traced(sq, sk), sq, sk)


@pytest.mark.deep
@pytest.mark.parametrize(("sq", "sk"), list(itertools.product(LENGTHS, LENGTHS)))
def test_what_is_proven_at_each_fixed_length_is_what_is_computed(sq, sk):
    assert_all_true(traced(sq, sk), sq, sk)


@given(
    st.randoms(use_true_random=True), st.integers(2, 7), st.integers(3, 7), st.integers(1, 3), st.booleans()
)
def test_any_program_is_read_as_it_computes(rng, sq, sk, depth, dynamic):
    def program(*given: Tensor) -> Tensor:
        s = Site(*given)
        return condition(rng, s, depth).expand(2, 1, s.sq, s.sk)

    given_inputs = inputs(sq, sk)
    module = trace(program, *given_inputs, dynamic=dynamic)
    (node,) = results(module)
    reading = read("visible", node, module)
    values = run(module, *given_inputs)
    for words in (reading.mask, *reading.otherwise):
        claimed, actual = torch.broadcast_tensors(dense(reading, values, sq, sk, words), values[node])
        assert torch.equal(claimed, actual), words
    sizes = sizes_of(module)
    sees_a_key = not reading.leaves and not may_have_empty_rows(reading.mask, sizes["i"], sizes["j"])
    assert actual.any(-1).all() or not sees_a_key


def read_one(make, *given: Tensor, kind: str = "visible", dynamic: bool = True):
    module = trace(make, *given, dynamic=dynamic)
    return read(kind, results(module)[0], module)


def test_no_guard_is_installed():
    module = trace(lambda *given: Site(*given).ones().tril(), *inputs(5, 7), dynamic=True)
    (node,) = results(module)
    before = len(node.meta["val"].fake_mode.shape_env.guards)
    read("visible", node, module)
    assert len(node.meta["val"].fake_mode.shape_env.guards) == before


def test_the_leaf_of_a_padding_is_the_tensor_before_it_is_broadcast():
    reading = read_one(
        lambda *given: (Site(*given).given != 0)[:, None, None, :].expand(-1, 3, 5, -1), *inputs(5, 7)
    )
    leaf = reading.leaves["padding"]
    assert (leaf.node.name, leaf.roles, leaf.negated) == ("ne", ("b", "j"), False)


def test_a_leaf_is_negated_where_no_tensor_says_the_opposite():
    reading = read_one(
        lambda *given: (Site(*given).given == 0)[:, None, None, :], *inputs(5, 7), kind="hidden"
    )
    assert reading.leaves["padding"].negated


def test_a_slice_of_a_larger_tensor_is_the_leaf_not_that_tensor():
    reading = read_one(lambda *given: Site(*given).table[:, :, :6, :6], *inputs(6, 6), dynamic=False)
    assert reading.leaves["mask"].node.name.startswith("slice")


def test_a_second_padding_is_a_plain_tensor():
    """Kernels take one padding."""

    def two(*given):
        s = Site(*given)
        return ((s.given != 0) & (s.ids != 3))[:, None, None, :]

    reading = read_one(two, *inputs(5, 7))
    assert {name: leaf.roles for name, leaf in reading.leaves.items()} == {
        "padding": ("b", "j"),
        "mask": ("b", "j"),
    }


def test_one_query_may_see_a_window_of_the_cache():
    """A window alone is bounded on one side; the causal mask that hides nothing is stated with it."""

    def last(*given):
        s = Site(*given)
        return s.j > torch.arange(s.past, s.sk)[:, None] - 3

    reading = read_one(last, *inputs(1, 7), dynamic=False)
    assert str(reading.mask) == "causal(Sk-Sq) & window(3, Sk-Sq)"
    assert band(reading.mask) is not None


def test_a_mask_that_is_read_before_and_after_a_write_is_refused():
    def written_between(*given):
        mask = Site(*given).ones().tril()
        early = mask | False
        mask[:, :2] = True
        return mask, early, mask | False

    module = trace(written_between, *inputs(5, 7))
    with pytest.raises(Reject, match="written to in place"):
        read_visible(results(module)[0], ("i", "j"), sizes_of(module))


def test_a_mask_that_is_written_in_an_unknown_way_is_refused():
    def scattered(*given):
        mask = Site(*given).ones().tril()
        mask.diagonal().fill_(False)
        return mask

    module = trace(scattered, *inputs(5, 7))
    with pytest.raises(Reject, match="written to in place"):
        read("visible", results(module)[0], module)


def test_the_reader_of_a_mask_decides_which_writes_count():
    def read_between(*given):
        mask = Site(*given).ones().tril()
        used = mask | False
        mask[:, :2] = True
        return mask, used

    module = trace(read_between, *inputs(5, 7), dynamic=True)
    mask, used = results(module)
    roles, sizes = ("i", "j"), sizes_of(module)
    assert str(read_visible(mask, roles, sizes, at=used).mask) == "causal"
    last = list(module.graph.nodes)[-1]
    assert str(read_visible(mask, roles, sizes, at=last).mask) == "causal | first(2)"


def test_numbers_that_may_be_anything_are_no_mask():
    module = trace(lambda *given: Site(*given).given[:, None, None, :], *inputs(5, 7))
    with pytest.raises(Reject, match="not known to be 0 and 1"):
        read("visible", results(module)[0], module)


def test_a_boolean_that_is_added_is_a_bias():
    module = trace(lambda *given: Site(*given).ones().tril(), *inputs(5, 7))
    assert read("additive", results(module)[0], module) is None


@pytest.mark.parametrize(
    ("dtype", "fill", "hides"),
    [
        (torch.float32, -1e9, True),
        (torch.float32, -1e4, False),
        (torch.float32, MIN, True),
        (torch.float32, -65504.0, False),
        (torch.float16, -65504.0, True),
        (torch.float16, -1e4, False),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min, True),
        (torch.float64, -INF, True),
        (torch.float32, float("nan"), False),
    ],
)
def test_a_fill_hides_if_nothing_of_the_weight_is_left(dtype, fill, hides):
    module = trace(lambda *given: torch.full((5, 7), fill, dtype=dtype).triu(1), *inputs(5, 7))
    reading = read("additive", results(module)[0], module)
    assert (reading is not None) == hides
    assert reading is None or (str(reading.visible.mask), reading.fill) == ("causal", fill)


def test_a_mask_of_zeros_hides_nothing():
    module = trace(lambda *given: torch.zeros(5, 7), *inputs(5, 7))
    reading = read("additive", results(module)[0], module)
    assert (str(reading.visible.mask), reading.fill) == ("full", -INF)


def test_roles_may_be_in_any_order():
    module = trace(lambda *given: Site(*given).j.t() <= Site(*given).i.t(), *inputs(5, 7), dynamic=True)
    reading = read_visible(results(module)[0], ("j", "i"), sizes_of(module))
    assert str(reading.mask) == "causal"
