"""Data that rules and kernels exchange."""

import torch

from attnopt.rule import Cost, Reject, SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec


def meta(*shape: int) -> TensorMeta:
    return TensorMeta(shape, torch.float32, torch.device("cpu"))


def test_the_sizes_of_a_site_are_those_of_its_operands() -> None:
    site = SiteMeta(
        AttentionSpec("softmax"), {"q": meta(2, 6, 5, 16), "k": meta(2, 3, 9, 16), "v": meta(2, 3, 9, 24)}
    )
    s = site.sizes
    assert (s.batch, s.heads, s.kv_heads, s.sq, s.sk, s.d, s.dv) == (2, 6, 3, 5, 9, 16, 24)
    assert site.device == torch.device("cpu")


def test_effort_is_the_larger_of_arithmetic_and_traffic() -> None:
    busy, hungry = Cost(bytes=1.0, flops=1e6), Cost(bytes=1e6, flops=1.0)
    assert busy.effort == 1e6 / 0.5
    assert hungry.effort == 1e6 * Cost.INTENSITY / 0.5


def test_effort_falls_with_efficiency() -> None:
    assert Cost(1.0, 1e6, efficiency=1.0).effort < Cost(1.0, 1e6, efficiency=0.25).effort


def test_a_rejection_says_why_where_and_how_far_it_came() -> None:
    reject = Reject("because", depth=3)
    assert (str(reject), reject.reason, reject.node, reject.depth) == ("because", "because", None, 3)
