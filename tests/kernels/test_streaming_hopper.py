"""The Hopper kernels of streaming attention: on such a GPU the laws of the others; anywhere, that they compile well.

Their logic is run on a CPU in test_streaming_hopper_numpy.py.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracle import assert_same
from streaming_cases import Call, Structure, call, eager_gradients, laid_out, plain_gradients

from attnopt.kernels.streaming import triton_backward, triton_hopper
from attnopt.kernels.streaming.problem import Answer, Gradients

STREAM = Structure(offset=0, window=100, sinks=4)
STRUCTURES = [
    Structure(),
    Structure(offset=0),
    Structure(offset=-70),
    Structure(offset=14),
    Structure(offset=5, prefix=20),
    Structure(offset=0, prefix=140),
    Structure(offset=0, window=1),
    Structure(offset=0, window=129, sinks=3),
    Structure(offset=3, window=33, sinks=20),
    Structure(offset=0, window=64, sinks=150),
    Structure(offset=-7, window=65, sinks=4, prefix=2),
    Structure(offset=0, window=0, sinks=18),
    Structure(offset=10**9, window=10**9 + 2, sinks=10**9),
]
Backward = Callable[[Call, torch.Tensor], Gradients]
HALVES = [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16)]


def forward(c: Call) -> Answer:
    assert triton_hopper.serves(c.problem)
    return triton_hopper.launch(c.problem)


@pytest.fixture(params=["made on the way", "made before", "keys by triton"])
def backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backward:
    """The backward; where delta and tail are made, or who makes dk and dv."""
    if request.param == "keys by triton":
        monkeypatch.setattr(triton_hopper, "serves_keys", lambda _problem: False)

    def run(c: Call, do: torch.Tensor) -> Gradients:
        answer = forward(c)
        dlse = torch.zeros_like(answer.lse) if request.param == "made before" else None
        return triton_backward.launch(c.problem, answer, do, dlse)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_tracer_shows_the_mask_bit_for_bit(structure: Structure) -> None:
    for sq, sk in ((1, 1), (17, 33), (130, 64), (300, 128)):
        values = torch.eye(sk, 128).expand(1, 1, sk, 128)
        c = Call(
            torch.zeros(1, 2, sq, 128),
            torch.randn(1, 1, sk, 128),
            values,
            structure=structure,
            empty_row="zero",
        )
        want = c.visible().expand(1, 2, sq, sk)
        o = forward(c.to(torch.bfloat16).to("cuda")).o.cpu().float()[..., :sk]
        assert torch.equal(torch.round(o * want.sum(-1, keepdim=True)), want.float()), (sq, sk)


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "dtype"), HALVES)
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_rows_and_gradients_are_as_good_as_eager(
    structure: Structure, d: int, dtype: torch.dtype, backward: Backward
) -> None:
    c = call(kv_heads=2, group=2, sq=420, sk=403, d=d, dv=d, scale=d**-0.5, structure=structure)
    c = replace(c, empty_row="zero").to(dtype)
    do = torch.randn(2, 4, 420, d).to(dtype)
    exact = c.to(torch.float64)
    assert_same(forward(c.to("cuda")).o.cpu(), exact.plain(), c.plain())
    found = backward(c.to("cuda"), do.cuda())
    wanted = plain_gradients(exact, do.double())
    yardstick = eager_gradients(c, do, wanted)
    for got, want, eager in zip((found.q, found.k, found.v), wanted, yardstick, strict=True):
        assert_same(got.cpu(), want, eager, factor=3.0, what="gradient")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 127, 128, 129, 191, 256, 257, 1000, 3001])
def test_any_length_is_the_other_kernels_answer(rows: int, backward: Backward) -> None:
    c = call(sq=rows, sk=rows, d=64, dv=64, scale=0.1, structure=STREAM).to(torch.bfloat16).to("cuda")
    do, tiles = torch.randn_like(c.q), triton_backward.BY_KEYS[1]
    found, other = forward(c), triton_backward.launch(c.problem, forward(c), do, None, tiles, tiles)
    exact = c.to(torch.float64)
    assert_same(found.o.cpu(), exact.plain(), c.plain())
    mine = backward(c, do)
    for x, y in ((mine.q, other.q), (mine.k, other.k), (mine.v, other.v)):
        torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("meaning", ["zero", "nan", "uniform"])
def test_empty_rows_return_what_they_mean(meaning: str) -> None:
    structure = Structure(offset=-70, window=65, sinks=4)
    c = replace(call(sq=200, sk=150, d=64, dv=64, structure=structure), empty_row=meaning).to(torch.bfloat16)
    assert_same(forward(c.to("cuda")).o.cpu(), c.to(torch.float64).plain(), c.plain())


@pytest.mark.gpu
def test_it_gives_the_same_bits_each_time(backward: Backward) -> None:
    c = (
        call(kv_heads=2, group=2, sq=700, sk=700, d=128, dv=128, structure=STREAM)
        .to(torch.bfloat16)
        .to("cuda")
    )
    do = torch.randn_like(c.q)
    first = [forward(c).o, *(getattr(backward(c, do), name) for name in "qkv")]
    for _ in range(100):
        again = [forward(c).o, *(getattr(backward(c, do), name) for name in "qkv")]
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
def test_heads_may_lie_beside_each_other() -> None:
    c = call(sq=300, sk=300, d=64, dv=64, structure=STREAM).to(torch.bfloat16).to("cuda")
    turned = replace(c, **{name: laid_out(getattr(c, name), "transposed") for name in "qkv"})
    assert torch.equal(forward(turned).o, forward(c).o)


@pytest.mark.gpu
def test_a_graph_is_replayed_with_new_values() -> None:
    c = call(sq=300, sk=300, d=128, dv=128, structure=STREAM).to(torch.bfloat16).to("cuda")
    forward(c)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = forward(c).o
    c.q.copy_(torch.randn_like(c.q))
    graph.replay()
    assert torch.equal(o, forward(c).o)


def test_what_they_do_not_state_goes_elsewhere() -> None:
    c = call(d=64, dv=64, structure=STREAM).to(torch.bfloat16)
    assert not triton_hopper.serves(c.problem)  # it lies on the CPU
    assert triton_hopper.is_bulk(c.q)
    assert not triton_hopper.is_bulk(laid_out(c.q, "sliced"))
    assert not triton_hopper.is_bulk(c.q[:, :, :, 1:])
    assert not triton_hopper.is_bulk(c.q[:, :1].expand(c.q.shape))


PROGRAM = """
import re
from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout
from attnopt.kernels.streaming import triton_hopper_forward, triton_hopper_keys, triton_hopper_queries

ROWS = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
NUMBERS = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
CONSTANTS = {"STAGES": 2, "SETS": 2, "WINDOWED": True, "HEAD": "narrow", "EMPTY_IS_ZERO": False}
CONSTANTS |= {"SUMS": True, "ROWS_KNOWN": False}

def source(kernel, loaded):
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in CONSTANTS:
            signature[name], constants[place,] = "constexpr", CONSTANTS[name]
        elif name in ("tail_desc", "delta_desc"):
            signature[name] = f"tensordesc<fp32[1, 64],{NUMBERS!r}>"
        elif name.endswith("_desc"):
            rows = 16 if name.startswith("narrow") else loaded if name in ("k_desc", "v_desc") else 64
            signature[name] = f"tensordesc<bf16[1, 1, {rows}, 128],{ROWS!r}>"
        else:
            number = "fp32" if name in ("unit", "scale", "factor") else "i32"
            signature[name] = "*fp32" if name.endswith("_ptr") else number
    return GluonASTSource(kernel, signature=signature, constexprs=constants, attrs={})

for kernel, loaded in (
    (triton_hopper_forward.attend_kernel, 128),
    (triton_hopper_queries.queries_kernel, 64),
    (triton_hopper_keys.keys_kernel, 64),
):
    built = build(source(kernel, loaded), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    products, loads = (built.asm["ptx"].count(word) for word in ("wgmma.mma_async", "cp.async.bulk.tensor"))
    counters = re.findall(r"scf.for %turn\\w* = .* iter_args\\(%n", built.asm["ttgir"])
    print(built.metadata.shared, products, loads, len(counters))
"""


def test_they_compile_for_hopper_into_tensor_cores_and_bulk_loads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = [
        tuple(map(int, line.split())) for line in re.findall(r"^\d+ \d+ \d+ \d+$", ran.stdout, re.MULTILINE)
    ]
    assert len(found) == 3
    for shared, products, loads, counters in found:
        assert shared <= 227 * 1024
        assert products > 0
        assert loads > 0
        # One kernel like these lost the count of its tiles to Triton's "loop-aware CSE", and waited for good.
        assert counters == 3
