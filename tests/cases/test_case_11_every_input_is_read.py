"""What the graph reads the call reads: https://github.com/pytorch/pytorch/pull/155792."""

import pytest
import torch
from graphs import rewritten, site_of
from spellings import SPELLINGS, Spelling


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_the_operands_are_those_that_the_spec_names(spelling: Spelling) -> None:
    site = site_of(spelling.attend, *spelling.inputs())
    assert set(site.operands) == set(site.spec.operand_names())


@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s.scale != 0], ids=lambda s: s.name)
def test_a_change_of_any_input_shows(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    run = rewritten(spelling.attend, *inputs)
    before = run(*(x.clone() for x in inputs))
    for place, tensor in enumerate(inputs):
        changed = [x.clone() for x in inputs]
        changed[place] = ~tensor if tensor.dtype == torch.bool else 1 - tensor
        assert not torch.equal(run(*changed), before), f"input {place} is not read"
