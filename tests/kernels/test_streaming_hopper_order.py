"""In which order the Hopper kernels do their pieces of work: each once, and all programs end at about the same time."""

import importlib
from collections.abc import Iterator
from typing import Any

import gluon_in_numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnopt.kernels.streaming import triton_hopper
from attnopt.kernels.streaming.problem import Problem
from attnopt.kernels.streaming.reach import reach

PROCESSORS, BLOCK = 132, triton_hopper.BLOCK


def places(lines: int, blocks: int, light: int, programs: int) -> Iterator[list[tuple[int, int]]]:
    """(line, block) of the pieces of work of each program, in turn."""
    parts = importlib.import_module("attnopt.kernels.streaming.triton_hopper_parts")
    works = lines * blocks
    for program in range(programs):
        names = gluon_in_numpy.Machine(program, programs).names()
        own: dict[str, Any] = gluon_in_numpy._rebuilt(parts, names)
        turns = range(int(own["turns_of"](works)))
        found = [own["block_of"](own["work_of"](turn), works, blocks, light) for turn in turns]
        yield [(int(line), int(block)) for line, block in found]


@given(data=st.data(), lines=st.integers(1, 9), blocks=st.integers(1, 12), programs=st.integers(1, 30))
def test_each_piece_of_work_is_done_once(data: st.DataObject, lines: int, blocks: int, programs: int) -> None:
    light = data.draw(st.integers(0, blocks))
    done = [piece for mine in places(lines, blocks, light, programs) for piece in mine]
    assert sorted(done) == [(line, block) for line in range(lines) for block in range(blocks)]


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "window"), [(1, 16384, 4096), (1, 16384, 1024), (4, 4096, 1024), (2, 8192, 8000)]
)
def test_no_program_has_much_more_to_do_than_its_part(
    batch: int, length: int, window: int, *, by_keys: bool
) -> None:
    where = reach(offset=0, window=window, sinks=4, prefix=0, rows=length, columns=length)
    x = torch.empty(1, 1, 1, 1).expand(batch, 32, length, 128)
    blocks = length // BLOCK
    problem = Problem(x, x, x, None, None, None, None, 0.1, where, None, "zero")
    light = triton_hopper._light(problem, blocks, by_keys=by_keys)
    # The first block of keys, and the last of queries, from which `place_queries` counts, has the whole window.
    cost = [min(window + BLOCK, length - block * BLOCK) for block in range(blocks)]
    loads = [sum(cost[block] for _, block in mine) for mine in places(32 * batch, blocks, light, PROCESSORS)]
    assert max(loads) < 1.03 * sum(loads) / PROCESSORS
