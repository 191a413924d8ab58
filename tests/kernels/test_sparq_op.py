"""The op `attnopt::sparq_attention`: registration, compilation, gradients, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from sparq_cases import Case, attention, cases, request_of

from attnopt.errors import OptionError, ShapeError, UnsupportedError
from attnopt.kernels.sparq.op import sparq_attention


@given(cases(longest=20, widest=8))
def test_the_op_is_registered_correctly(case: Case) -> None:
    r = request_of(case)
    args = (r.q, r.k, r.v, r.k_t, r.v_mean, r.kept, r.rank, r.topk, r.local, r.scale, r.mean_value)
    torch.library.opcheck(
        torch.ops.attnopt.sparq_attention.default, args, test_utils=("test_schema", "test_faketensor")
    )


def test_the_op_passes_opcheck() -> None:
    r = request_of(Case(padding=0.3))
    args = (r.q, r.k, r.v, r.k_t, torch.zeros(2, 2, 16), r.kept, 5, 12, 3, r.scale, True)
    torch.library.opcheck(torch.ops.attnopt.sparq_attention.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(attention_of_tensors, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for sk in (40, 41, 55):
        r = request_of(Case(sk=sk, group=2, padding=0.2))
        assert torch.equal(
            compiled(r.q, r.k, r.v, r.k_t, r.kept), attention_of_tensors(r.q, r.k, r.v, r.k_t, r.kept)
        )


def attention_of_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_t: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    return sparq_attention(q, k, v, rank=4, topk=9, local=2, k_t=k_t, key_padding=kept) * 2


@pytest.mark.parametrize("name", ["q", "k", "v", "k_t", "v_mean"])
def test_gradients_are_refused_at_the_call(name: str) -> None:
    request = replace(request_of(Case()), v_mean=torch.zeros(2, 2, 16))
    wants = replace(request, **{name: getattr(request, name).clone().requires_grad_()})
    with pytest.raises(UnsupportedError, match=r"no_grad"):
        attention(wants)
    with torch.no_grad():
        assert torch.equal(attention(wants), attention(request))


GOOD = request_of(Case(kv_heads=2, group=2, sk=20, d=8, dv=6))
BAD = [
    ({"q": torch.randn(2, 4, 3, 8)}, UnsupportedError, "scaled_dot_product_attention"),
    ({"q": torch.randn(2, 4, 8)}, ShapeError, r"q has shape \(2, 4, 8\)"),
    ({"q": torch.randn(2, 3, 1, 8)}, ShapeError, "3 query heads cannot share 2"),
    ({"q": torch.randn(1, 4, 1, 8)}, ShapeError, "k has shape"),
    ({"q": torch.randn(2, 4, 1, 0)}, ShapeError, "D = 0"),
    ({"q": torch.ones(2, 4, 1, 8, dtype=torch.int64)}, ShapeError, "int64"),
    ({"k": torch.randn(2, 2, 20, 7)}, ShapeError, "k has shape"),
    ({"k": torch.randn(2, 2, 20, 8).half()}, ShapeError, "cast them to one dtype"),
    ({"k": torch.randn(2, 0, 20, 8), "v": torch.randn(2, 0, 20, 8)}, ShapeError, "cannot share 0"),
    ({"v": torch.randn(2, 2, 19, 6)}, ShapeError, "v has shape"),
    ({"v": torch.randn(2, 2, 20, 6, device="meta")}, ShapeError, "move them to one device"),
    ({"k_t": torch.randn(2, 2, 20, 8)}, ShapeError, "k_t has shape"),
    ({"v_mean": torch.randn(2, 2, 5)}, ShapeError, "v_mean has shape"),
    ({"v_mean": torch.ones(2, 2, 6, dtype=torch.int64)}, ShapeError, "v_mean is torch.int64"),
    ({"kept": torch.ones(2, 19, dtype=torch.bool)}, ShapeError, "key_padding has shape"),
    ({"kept": torch.ones(2, 20)}, ShapeError, "wanted torch.bool"),
    ({"rank": 0}, OptionError, "rank is 0"),
    ({"topk": 0}, OptionError, "topk is 0"),
    ({"local": -1}, OptionError, "local is -1"),
    ({"local": 13}, OptionError, r"local is 13; wanted 0 to topk \(12\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_does_not_fit_is_refused_with_the_reason(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    attention(GOOD)
    with pytest.raises(error, match=message):
        attention(replace(GOOD, **change))


def test_autocast_does_not_reach_inside() -> None:
    q, k, v = (torch.randn(1, 4, n, 16) for n in (1, 50, 50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sparq_attention(q, k, v, rank=8, topk=8, local=2)
    assert torch.equal(inside, sparq_attention(q, k, v, rank=8, topk=8, local=2))
