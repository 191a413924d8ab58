"""How large lightning's checks on a GPU are, and what they allow: the row rule, on the device where the tensors are."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from lightning_cases import Case
from lightning_judging import attend, backward, forward, results
from oracle import BITS

Excess = dict[str, float]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Sizes:
    """How large the checks are: as they should be, or as the interpreter bears them."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    million: int
    width: int
    #: Elements that a tensor must exceed, and rows at the borders that are compared.
    elements: int
    border: int
    #: Into how many parts those elements are cut by a stride.
    far_apart: int

    @property
    def interpreted(self) -> bool:
        """Whether kernels run on the CPU."""
        return self.device == "cpu"


LARGE = Sizes("cuda", DTYPES, 2**20 + 37, 64, 2**31, 300, 128)
SMALL = Sizes("cpu", (torch.float16, torch.float32), 150, 16, 2**16, 40, 8)


@dataclass(frozen=True)
class Check:
    """One claim: `run` returns by name how many times an error is over its allowance."""

    group: str
    name: str
    run: Callable[[], Excess]


# The row rule, where the tensors are.


def excess(got: Tensor, exact: Tensor, dtype: torch.dtype, what: str) -> float:
    """The worst row's error over its allowance; infinite where something is not finite."""
    if not got.isfinite().all():
        return math.inf
    factor = 3.0 if what.startswith("d_") else 2.0
    if got.dim() == 1:  # one number per head
        got, exact = got[:, None], exact[:, None]
    allowed = factor * 2.0 ** -BITS[dtype] * exact.norm(dim=-1)
    error = (got.double() - exact).norm(dim=-1)
    return float((error / allowed.clamp_min(torch.finfo(torch.float64).tiny)).max())


def excesses(got: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> Excess:
    """`excess` of each result."""
    return {name: excess(x, exact[name], dtype, name) for name, x in got.items()}


def computed(case: Case, sizes: Sizes) -> dict[str, Tensor]:
    """What the kernels make of a case: through the op on a GPU, called themselves where they are interpreted."""
    if not sizes.interpreted:
        return results(attend, case)
    out, state = forward(case)
    return {"out": out, "state": state, **{f"d_{name}": x for name, x in backward(case).items()}}
