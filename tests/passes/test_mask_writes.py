"""Laws of in-place writes: what is read is what was there at that time, or nothing is claimed."""

import pytest
import torch
from mask_trace import inputs_of, interpret, results, trace

from attnopt.passes.mask_formula import Data, NotUnderstood
from attnopt.passes.mask_reader import index_of
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.mask_writes import arguments, is_settled, operation, writes_after, written_by

N, M = 4, 5


def then(*steps):
    """A program that makes a tensor and writes to it step by step."""

    def program(x):
        mask = torch.ones(N, M).tril()
        for step in steps:
            step(mask)
        return mask

    return program


WRITES = {
    "columns": then(lambda m: m[:, :2].fill_(7)),
    "rows from the end": then(lambda m: m[-2:].zero_()),
    "one row": then(lambda m: m[1].fill_(3)),
    "one column from the end": then(lambda m: m.select(1, -1).fill_(3)),
    "one element": then(lambda m: m[2, 3].fill_(9)),
    "a block of a block": then(lambda m: m[1:][:, 1:3].fill_(5)),
    "one after the other": then(
        lambda m: m[:, :2].fill_(7), lambda m: m[:2].fill_(8), lambda m: m[0].zero_()
    ),
    "all of it": then(lambda m: m.masked_fill_(torch.arange(M) > 2, -1.0)),
    "all of it through a slice": then(lambda m: m[:, :].mul_(2)),
    "a copy": then(lambda m: m[:, 1:3].copy_(torch.arange(N)[:, None])),
    "assignment": then(lambda m: m.__setitem__((slice(None), slice(0, 3)), 4.0)),
    "assignment of what was there": then(lambda m: m.__setitem__(slice(1, 3), m[1:3] + 1)),
    "part, then all": then(lambda m: m[0].fill_(2), lambda m: m.mul_(3)),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_to_blocks_are_followed(name):
    seen = interpret(WRITES[name], torch.ones(2))
    assert torch.equal(seen.claimed, seen.actual)
    assert not seen.reads_data


def unknown(*steps):
    (node,) = results(trace(then(*steps), torch.ones(2)))
    sizes = {"b": 1, "h": 1, "i": N, "j": M}
    return reader_for(node, sizes).element_at(node, index_of(("i", "j")), None)


UNKNOWN = {
    "every other row": lambda m: m[::2].fill_(7),
    "a diagonal": lambda m: m.diagonal().fill_(7),
    "a transposed block": lambda m: m.t()[:2].fill_(7),
    "flattened": lambda m: m.view(-1)[:3].fill_(7),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_writes_to_anything_else_are_not_understood(name):
    with pytest.raises(NotUnderstood):
        unknown(UNKNOWN[name])


def test_what_an_unknown_write_puts_into_a_block_is_data():
    value = unknown(lambda m: m.select(0, 1).index_fill_(0, torch.tensor([0]), 1.0))
    assert [leaf.node.name for leaf in value if isinstance(leaf, Data)] == ["index_fill_"]


def test_a_view_sees_what_is_written_to_its_base_later():
    def program(x):
        base = torch.ones(N, M).tril()
        view = base[1:]
        base.fill_(5)
        return view

    (node,) = results(trace(program, torch.ones(2)))
    with pytest.raises(NotUnderstood):
        reader_for(node, {"b": 1, "h": 1, "i": N - 1, "j": M}).element_at(node, index_of(("i", "j")), None)


def test_a_copy_does_not():
    def program(x):
        base = torch.ones(N, M).tril()
        copy = base.clone()
        base.fill_(5)
        return copy

    seen = interpret(program, torch.ones(2))
    assert torch.equal(seen.claimed, seen.actual)
    assert not seen.reads_data


def test_writes_are_listed_in_order_and_up_to_the_reader():
    def program(x):
        mask = torch.ones(N, M).tril()
        mask[0].fill_(2)
        used = mask + 1
        mask[:, 1].fill_(3)
        return mask, used

    mask, used = results(trace(program, torch.ones(2)))
    everything = writes_after(mask, None)
    assert [operation(w) for w in everything] == ["fill", "fill"]
    assert writes_after(mask, used) == everything[:1]
    assert writes_after(used, None) == []


def mask_read(*, before: bool, after: bool):
    def program(x):
        mask = torch.ones(N, M).tril()
        first = mask[1:] + 1 if before else x
        mask[:, 1].fill_(3)
        last = mask.t() + 1 if after else x
        return mask, first, last

    return results(trace(program, torch.ones(2)))[0]


def test_a_tensor_is_settled_if_it_is_read_after_all_writes():
    assert is_settled(mask_read(before=False, after=True))
    assert not is_settled(mask_read(before=True, after=True))
    assert not is_settled(mask_read(before=True, after=False))


def test_operations_have_one_name_in_place_or_not():
    def program(x):
        y = x.clone()
        y.add_(1).clamp_(0)
        z = x > 0
        z &= z
        return y.detach_(), z, torch.add(x, 1), x @ x

    module = trace(program, torch.ones(3, 3))
    names = [operation(n) for n in module.graph.nodes if n.op == "call_function"]
    assert names == ["clone", "add", "clamp", "gt", "__and__", "detach", "add", "matmul"]
    assert [operation(n) for n in inputs_of(module)] == [""]


def test_arguments_are_known_by_name_with_their_defaults():
    (node,) = results(trace(lambda x: torch.diff(x, prepend=x), torch.ones(3)))
    held = arguments(node)
    assert (held["n"], held["dim"], held["append"]) == (1, -1, None)
    assert held["prepend"] is held["self"]


def test_what_writes_is_known_by_its_schema():
    module = trace(lambda x: x.clone().fill_(1).detach_() + 1, torch.ones(3))
    writing = [n.name for n in module.graph.nodes if written_by(n) is not None]
    assert writing == ["fill_"]
