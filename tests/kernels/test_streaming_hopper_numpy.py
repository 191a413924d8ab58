"""The Hopper kernels' logic on a CPU: their source run by numpy, launched as on a GPU (see gluon_in_numpy)."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from gluon_in_numpy import OnNumpy
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same
from streaming_cases import Call, Structure, call, eager_gradients, plain_gradients, structures

from attnopt.kernels.streaming import triton_hopper

KERNELS = {"forward": "attend_kernel", "queries": "queries_kernel", "keys": "keys_kernel"}
PROCESSORS = 3


@pytest.fixture(autouse=True)
def _on_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "attnopt.kernels.streaming.triton_hopper_"
    parts = importlib.import_module(folder + "parts")
    for name, kernel in KERNELS.items():
        module = importlib.import_module(folder + name)
        monkeypatch.setattr(module, kernel, OnNumpy(getattr(module, kernel), [parts, module]))
    monkeypatch.setattr(triton_hopper, "_processors", lambda _x: PROCESSORS)


def check(structure: Structure, sq: int, sk: int, kv_heads: int = 1, group: int = 1) -> None:
    """o, lse, dq, dk and dv of a random call against fp64, on the terms of eager attention in fp16."""
    c = call(
        batch=1, kv_heads=kv_heads, group=group, sq=sq, sk=sk, d=64, dv=64, scale=0.125, structure=structure
    )
    c = replace(c, empty_row="zero").to(torch.float16)
    do = torch.randn(c.q.shape).to(c.q.dtype)
    exact = c.to(torch.float64)
    answer = triton_hopper.launch(c.problem)
    assert_same(answer.o, exact.plain(), c.plain())
    delta = (answer.o.float() * do.float()).sum(-1)
    tail = torch.where(answer.lse.isneginf(), torch.inf, answer.lse / math.log(2))
    made = torch.full_like(delta, torch.nan), torch.full_like(tail, torch.nan)
    dq, near = triton_hopper.queries(c.problem, do, *made, answer)
    torch.testing.assert_close(made, (delta, tail), atol=1e-5, rtol=1e-5)
    assert torch.equal(dq, triton_hopper.queries(c.problem, do, *made)[0])
    delta, tail = made
    found = [dq]
    if triton_hopper.serves_keys(c.problem):
        sums, done = near or beyond_the_window(exact, do.double()), c.problem.reach.head if near else 0
        found += triton_hopper.keys(c.problem, do, delta, tail, sums, done)
    wanted = plain_gradients(exact, do.double())
    yardstick = eager_gradients(c, do, wanted)
    for got, want, eager in zip(found, wanted, yardstick, strict=False):
        assert_same(got, want, eager, factor=3.0, what="gradient")


def beyond_the_window(c: Call, do: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `far_sinks` has for blocks of 128 keys, from the definition."""
    where, p = c.problem.reach, c.weights()
    sinks = where.sinks if where.windowed else 0
    v = c.v.repeat_interleave(c.problem.group, dim=1)
    scores = p * (do @ v.mT - (p @ v * do).sum(-1, keepdim=True))
    columns = torch.arange(where.columns)
    block = columns // triton_hopper.BLOCK * triton_hopper.BLOCK
    begin = (block + triton_hopper.BLOCK).clamp(max=where.columns) - 1 - where.lower
    far = (torch.arange(where.rows)[:, None] >= begin) & (block >= where.prefix)
    parts = ((x * far).mT @ y for x, y in ((scores, c.q), (p, do)))
    dk, dv = (
        x.unflatten(1, (-1, c.problem.group)).sum(2)[:, :, :sinks].flatten(0, 1)[:, None] for x in parts
    )
    return dk.float().contiguous(), dv.float().contiguous()


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(
    "structure",
    [
        Structure(),
        Structure(offset=0),
        Structure(offset=-70),
        Structure(offset=62),  # with 63 keys before the first query's, tiles lie on the edge of the full ones
        Structure(offset=0, window=127),  # as do these on the other edge
        Structure(offset=0, prefix=140),
        Structure(offset=0, window=1),
        Structure(offset=0, window=129, sinks=3),
        Structure(offset=3, window=33, sinks=20),
        Structure(offset=0, window=64, sinks=150),
        Structure(offset=-7, window=65, sinks=4, prefix=2),
        Structure(offset=0, window=0, sinks=18),
        Structure(offset=10**9, window=10**9 + 2, sinks=10**9),
    ],
    ids=str,
)
def test_each_structure_is_as_good_as_eager(
    structure: Structure, sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_hopper, "SHORT", 0 if sets == 1 else 2048)
    monkeypatch.setattr(triton_hopper, "KEYS_SETS", sets)
    check(structure, 420, 403, kv_heads=2, group=2)


@given(
    structure=structures(reach=300),
    sq=st.integers(1, 80).map(lambda n: 4 * n) | st.integers(1, 200),
    sk=st.integers(1, 400),
)
def test_so_is_any_other(structure: Structure, sq: int, sk: int) -> None:
    check(structure, sq, sk)
