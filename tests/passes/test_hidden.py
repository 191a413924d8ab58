"""Several sources of hidden keys are one mask, in which each keeps its own tensors."""

import torch
from graphs import site_of
from torch import Tensor

from attnopt.mask import FULL, Causal, KeyPadding
from attnopt.passes.hidden import Hidden, together, visible_in

Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()
KEEP = torch.rand(2, 7) > 0.2


def test_no_source_hides_nothing() -> None:
    assert together([]) == (FULL, {})
    assert visible_in([]) == FULL


def test_sources_of_equal_names_keep_their_own_tensors() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)).masked_fill(~keep[:, None, None, :], -torch.inf)
        return scores.softmax(-1) @ v

    padding = site_of(attend, Q, K, V, KEEP).operands["padding"]
    one = Hidden(KeyPadding("padding"), {"padding": padding}, -torch.inf)
    mask, operands = together([one, Hidden(Causal(), {}, -torch.inf), one])
    assert list(operands) == ["padding", "padding1"]
    assert mask == Causal() & KeyPadding("padding") & KeyPadding("padding1")
    assert visible_in([one.mask, Causal()]) == Causal() & KeyPadding("padding")
