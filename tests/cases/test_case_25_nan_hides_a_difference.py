"""A comparison in which NaN equals everything: https://github.com/tracel-ai/cubecl/pull/1070."""

import pytest
import torch
from oracle import assert_same

from attnopt.verify import row_error

SPECIAL = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("other", [0.0, *SPECIAL])
def test_special_values_must_stand_in_the_same_places(value: float, other: float) -> None:
    one, two = torch.ones(4, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)
    one[2, 3], two[2, 3] = value, other
    if str(value) == str(other):
        assert row_error(one, two) == 0
        return
    assert not row_error(one, two) <= 1e-9
    assert not row_error(two, one) <= 1e-9
    for out, exact in ((one, two), (two, one)):
        with pytest.raises(AssertionError):
            assert_same(out, exact, out)
