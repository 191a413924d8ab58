"""Nothing is replaced across a write in place: https://github.com/pytorch/pytorch/pull/164273, 170318."""

import copy

import mutants_more  # noqa: F401 - more operators
import torch
from graphs import aten_graph
from hypothesis import given
from hypothesis import strategies as st
from mutants import NoPlace, mutate
from spellings import SPELLINGS

from attnopt.backend import attnopt

PROGRAMS = {s.name: s for s in SPELLINGS if s.name != "baddbmm_of_nothing"}


@given(name=st.sampled_from(sorted(PROGRAMS)), count=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_writes_in_place_anywhere_leave_the_result_as_it_is(name: str, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [x.double() if x.is_floating_point() else x for x in PROGRAMS[name].inputs()]
    graph = aten_graph(PROGRAMS[name].attend, *inputs)
    try:
        for _ in range(count):
            mutate(graph, "mutation", lambda n: int(torch.randint(n, ())))
        wanted = copy.deepcopy(graph)(*(x.clone() for x in inputs))
    except (NoPlace, RuntimeError):
        return
    got = attnopt(graph, inputs, options={"inner": "eager"})(*(x.clone() for x in inputs))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
