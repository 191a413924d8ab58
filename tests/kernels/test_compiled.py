"""What the interpreter cannot reach, compiled for Hopper without a GPU: early launches, and how sums are formed."""

import os
import re
import subprocess
import sys

PROGRAM = """
import sys
import triton
from triton import compile as build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnopt.kernels.lightning.triton_step import _step_kernel
from attnopt.kernels.streaming.triton_decode import decode_kernel

def source(kernel, constants, pointer):
    signature, fixed = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[place,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = pointer
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    return ASTSource(kernel, signature=signature, constexprs=fixed)

def built(kernel, constants, pointer="*fp32"):
    return build(source(kernel, constants, pointer), target=GPUTarget("cuda", 90, 32)).asm
"""

STEP = """
for columns in (1, 16, 64):
    constants = dict(D=64, DV=columns, BLOCK_D=64, BLOCK_V=columns, NEAR=True, OVERLAP=True, AHEAD=True)
    print(built(_step_kernel, constants)["ptx"].count("prefetch.global.L2"))
"""

RING = """
constants = dict(
    slope_ptr=None, ticket_ptr=None, count_ptr=None, near_sd=1, far_sd=1, k_sd=1, v_sd=1,
    BLOCK=16, WHOLE=True, TWO=True, ROWS=8, AHEAD=0, D_PAD=128, CHUNK=32, PRECISION="ieee", OVERLAP=False,
    DV_PAD=32, HEADS_PAD=4, PARTS_PAD=1,
)
print(built(decode_kernel, constants)["ttgir"])
"""


def _run(program: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_a_state_narrower_than_a_cache_line_is_fetched_early_too() -> None:
    assert all(int(count) >= 1 for count in _run(STEP).split())


def test_parts_of_a_score_in_fp32_are_no_single_chain_of_multiply_adds() -> None:
    """A product that begins with another's sum goes on with its chain, and the rounding errors add up."""
    products = re.findall(r"(%\w+) = tt\.dot %\w+, %\w+, (%\w+)", _run(RING))
    assert len(products) == 5, "four parts of 32 channels, and weights times values"
    assert not {into for _, into in products} & {name for name, _ in products}
