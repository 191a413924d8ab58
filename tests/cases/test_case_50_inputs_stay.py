"""Nothing writes to its inputs: https://github.com/linkedin/Liger-Kernel/issues/272, https://github.com/NVIDIA/apex/issues/1587."""

import pytest
import torch
from graphs import rewritten
from spellings import SPELLINGS, Spelling


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("spelling", SPELLINGS[::3], ids=lambda s: s.name)
def test_inputs_are_the_same_before_and_after(spelling: Spelling, kernel: str) -> None:
    inputs = [x.requires_grad_(x.is_floating_point()) for x in spelling.inputs()]
    before = [x.detach().clone() for x in inputs]
    versions = [x._version for x in inputs]
    out = rewritten(spelling.attend, *(x.detach() for x in inputs), allow=(kernel,))(*inputs)
    out.sum().backward()
    assert [x._version for x in inputs] == versions
    assert all(torch.equal(x.detach(), y) for x, y in zip(inputs, before, strict=True))
