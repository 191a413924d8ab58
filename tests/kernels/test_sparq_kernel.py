"""SparQ at a site: what it refuses, and that with every key chosen it computes the spec that the site has."""

import re
from dataclasses import replace

import pytest
import torch
from oracle import assert_same
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.kernels.sparq.kernel import KERNEL
from attnopt.mask import BOTTOM_RIGHT, FULL, TOP_LEFT, Causal, First, KeyPadding, Length, Mask, Opaque, Window
from attnopt.rule import Kernel, SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec, EmptyRow, Heads, Sparse, unread_fields

SPEC = AttentionSpec("softmax", scale=0.3, heads=Heads(share=2), sparse=Sparse(rank=3, topk=6, local=2))
MASKS = [
    FULL,
    Causal(BOTTOM_RIGHT),
    Causal(TOP_LEFT),
    Causal(Length(const=6)),
    KeyPadding("pad"),
    Causal(BOTTOM_RIGHT) & KeyPadding("pad"),
    Causal(BOTTOM_RIGHT) & (Window(5, BOTTOM_RIGHT) | First(2)),
    Opaque("seen"),
    Opaque("seen") & KeyPadding("pad"),
    Opaque("one_row"),
]


def operands(sk: int = 20) -> dict[str, torch.Tensor]:
    pad = torch.rand(2, sk) > 0.4
    seen = torch.rand(2, 1, 1, sk) > 0.3
    pad[1], seen[1] = False, False  # the second row sees no key
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, sk, 8), torch.randn(2, 2, sk, 6)
    return {"q": q, "k": k, "v": v, "pad": pad, "seen": seen, "one_row": torch.rand(1, 1, 1, sk) > 0.3}


def site(spec: AttentionSpec = SPEC, **changed: TensorMeta) -> SiteMeta:
    metas = {name: TensorMeta(tuple(x.shape), x.dtype, x.device) for name, x in operands().items()}
    return SiteMeta(spec, {**metas, **changed})


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> TensorMeta:
    return TensorMeta(shape, dtype, torch.device("cpu"))


def test_it_is_a_kernel_and_says_that_it_approximates() -> None:
    assert isinstance(KERNEL, Kernel)
    assert KERNEL.exact is False


def test_a_decoding_site_is_served() -> None:
    for mask in MASKS:
        spec = replace(SPEC, mask=mask, empty_row=EmptyRow.ZERO)
        assert KERNEL.refuse(site(spec)) is None
        assert unread_fields(spec, KERNEL.reads) == ()


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (site(replace(SPEC, sparse=None)), "was not asked for"),
        (site(q=meta(2, 4, 3, 8)), "one query token at a time, this site has 3"),
        (replace(site(), gradient=True), "no gradient"),
        (site(v=meta(2, 2, 20, 6, dtype=torch.float16)), "one floating dtype"),
        (
            site(replace(SPEC, mask=Opaque("m")), m=meta(2, 4, 1, 20, dtype=torch.bool)),
            r"mask m .* all heads share",
        ),
    ],
)
def test_other_sites_are_refused_with_the_reason(refused: SiteMeta, reason: str) -> None:
    assert re.search(reason, KERNEL.refuse(refused) or "served")


@pytest.mark.parametrize(
    "field", [{"bias": ("b",)}, {"softcap": 30.0}, {"sink_logits": True}, {"dropout": 0.1}]
)
def test_fields_that_it_does_not_read_are_not_its_own(field: dict[str, object]) -> None:
    assert unread_fields(replace(SPEC, **field), KERNEL.reads) == tuple(field)


@pytest.mark.parametrize("empty_row", [EmptyRow.NAN, EmptyRow.ZERO, EmptyRow.UNIFORM])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_with_every_key_chosen_it_computes_the_spec(mask: Mask, empty_row: EmptyRow) -> None:
    tensors, spec = operands(), replace(SPEC, mask=mask, empty_row=empty_row, sparse=Sparse(3, 20, 2))
    exactly = REFERENCE.run(spec, {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()})
    assert_same(KERNEL.run(spec, tensors), exactly, REFERENCE.run(spec, tensors))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_hidden_keys_are_never_chosen(mask: Mask) -> None:
    spec, tensors = replace(SPEC, mask=mask, empty_row=EmptyRow.ZERO), operands()
    visible = mask.dense(1, 20, tensors).expand(2, 1, 1, 20)[:, :, 0, :, None]
    hidden = {
        **tensors,
        "v": tensors["v"].where(visible, torch.nan),
        "k": tensors["k"].where(visible, torch.inf),
    }
    assert torch.equal(KERNEL.run(spec, hidden), KERNEL.run(spec, tensors))


def test_options_are_the_choices_of_the_call() -> None:
    tensors = operands()
    few = KERNEL.run(replace(SPEC, sparse=Sparse(rank=2, topk=3, local=1)), tensors)
    more = KERNEL.run(replace(SPEC, sparse=Sparse(rank=8, topk=19, local=1)), tensors)
    exactly = REFERENCE.run(SPEC, tensors)
    assert (more - exactly).norm() < (few - exactly).norm()


def test_the_cost_counts_what_a_step_reads() -> None:
    cost = KERNEL.cost(site(replace(SPEC, sparse=Sparse(rank=2, topk=5, local=1))))
    assert cost.bytes == 4 * 2 * 2 * (20 * 8 + 5 * (8 + 6))
    assert cost.flops == 2 * 2 * 4 * (20 * 2 + 5 * (8 + 6))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_it_traces_with_symbolic_sizes(mask: Mask) -> None:
    spec = replace(SPEC, mask=mask, empty_row=EmptyRow.UNIFORM)
    traced = make_fx(lambda tensors: KERNEL.run(spec, tensors), tracing_mode="symbolic")(operands())
    assert any(node.target is torch.ops.attnopt.sparq_attention.default for node in traced.graph.nodes)
    fresh = operands(sk=200)
    torch.testing.assert_close(traced(fresh), KERNEL.run(spec, fresh), rtol=0, atol=0)
