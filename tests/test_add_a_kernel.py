"""How to add a kernel, from beginning to end: one folder with `kernel.py`, no list to edit.

The kernel serves softmax attention without a mask by plain tensor code. It is put into a folder of its own that becomes
part of `attnopt.kernels`, as a contributor's folder would be.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

import attnopt.kernels
from attnopt.registry import kernels

THE_FILE = '''
"""Softmax attention without a mask in two products."""

from collections.abc import Mapping

from torch import Tensor

from attnopt.rule import Cost, SiteMeta
from attnopt.spec import AttentionSpec


class PlainKernel:
    """Unmasked softmax attention, each head with its own keys, by two products."""

    name = "plain"
    family = "softmax"
    exact = True
    reads = frozenset({"scale"})

    def refuse(self, site: SiteMeta) -> str | None:
        """It takes short sequences only."""
        return "more than 64 keys" if site.sizes.sk > 64 else None

    def cost(self, site: SiteMeta) -> Cost:
        """So cheap that it is chosen wherever it may be."""
        return Cost(1.0, 1.0, efficiency=1.0)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        """softmax(scale q k^T) v, in fp32 inside."""
        q, k, v = (operands[name] for name in "qkv")
        return ((q.float() * spec.scale) @ k.float().mT).softmax(-1).to(v.dtype) @ v


KERNEL = PlainKernel()
'''


@pytest.fixture
def with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The contributor's folder in place; afterwards everything is as before."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "kernel.py").write_text(THE_FILE)
    monkeypatch.setattr(attnopt.kernels, "__path__", [*attnopt.kernels.__path__, str(tmp_path)])
    kernels.cache_clear()
    yield
    kernels.cache_clear()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden, float("-inf")), -1) @ v


def inputs(length: int = 8) -> list[Tensor]:
    return [torch.randn(2, 4, length, 16) for _ in range(3)]


def test_the_kernel_serves_what_it_says_it_reads(with_the_folder: None) -> None:
    (site,) = check_like_eager(attend, inputs(), differentiable=3).attention
    assert (site.verdict, site.kernel) == ("rewritten", "plain")


def test_a_field_that_it_does_not_read_keeps_it_away(with_the_folder: None) -> None:
    (site,) = check_like_eager(attend_causally, inputs()).attention
    assert (site.verdict, site.kernel) == ("rewritten", "sdpa")


def test_its_own_refusal_keeps_it_away(with_the_folder: None) -> None:
    (site,) = check_like_eager(attend, inputs(65)).attention
    assert (site.verdict, site.kernel) == ("rewritten", "sdpa")


def test_it_can_be_denied_by_name(with_the_folder: None) -> None:
    (site,) = check_like_eager(attend, inputs(), deny=("plain",)).attention
    assert site.kernel == "sdpa"
