"""The Triton path of SparQ on a GPU: every width and dtype, wide strides, captured graphs, equal bits."""

from dataclasses import replace

import pytest
import torch
from sparq_cases import Case, request_of
from sparq_judging import assert_row_rule, positions_of

from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.tiles import choose_tiles
from attnopt.kernels.sparq.triton_decode import decode


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d", [1, 3, 16, 40, 64, 80, 96, 128, 160, 256])
def test_default_tiles_keep_the_row_rule(d: int, dtype: torch.dtype) -> None:
    for case in (
        Case(group=1, sk=3000, d=d, dv=d, rank=32, topk=128, local=32),
        Case(group=4, sk=5001, d=d, dv=d, rank=32, topk=600, local=32, padding=0.2),
        Case(group=4, sk=1500, d=d, dv=d, topk=1500),
    ):
        request = request_of(case, dtype, "cuda")
        tiles = choose_tiles(request)
        positions = positions_of(request, tiles)
        assert_row_rule(request, decode(request), positions, dtype)


@pytest.mark.gpu
def test_the_op_takes_the_kernels_on_a_gpu() -> None:
    r = request_of(Case(group=2, padding=0.2), torch.bfloat16, "cuda")
    out = sparq_attention(
        r.q, r.k, r.v, rank=5, topk=12, local=3, k_t=r.k_t, scale=r.scale, key_padding=r.kept, mean_value=True
    )  # fmt: skip
    assert torch.equal(out, decode(r))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    request = request_of(Case(batch=1, kv_heads=1, sk=300, d=16, dv=16, topk=20), torch.bfloat16, "cuda")
    wide = torch.empty(300 * 2**23, dtype=torch.bfloat16, device="cuda")
    strided = {}
    for i, name in enumerate(("k", "v")):
        strided[name] = wide.as_strided((1, 1, 300, 16), (0, 0, 2**23, 1), storage_offset=16 * i)
        strided[name].copy_(getattr(request, name))
    k_t = wide.as_strided((1, 1, 16, 300), (0, 0, 1, 2**23), storage_offset=64)
    assert request.k_t is not None
    strided["k_t"] = k_t.copy_(request.k_t)
    assert torch.equal(decode(replace(request, **strided)), decode(request))


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    request = request_of(Case(group=2, sk=500, padding=0.2), torch.bfloat16, "cuda")
    decode(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(request)
    for _ in range(3):
        request.q.normal_()
        graph.replay()
        assert torch.equal(out, decode(request))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits() -> None:
    request = request_of(Case(group=4, sk=5000, d=128, dv=128, rank=32, topk=600), torch.bfloat16, "cuda")
    first = decode(request)
    assert all(torch.equal(decode(request), first) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_launches_that_overlap_give_the_same_bits(group: int) -> None:
    case = Case(group=group, sk=9000, d=128, dv=128, rank=32, topk=64, local=8, mean_value=group == 1)
    request = request_of(case, torch.bfloat16, "cuda")
    tiles = replace(choose_tiles(request), bounded=group > 1)
    apart = decode(request, replace(tiles, early=False))
    together = replace(tiles, early=True)
    assert all(torch.equal(decode(request, together), apart) for _ in range(100))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(request, together)
    for _ in range(20):
        request.q.normal_()
        graph.replay()
        assert torch.equal(out, decode(request, replace(tiles, early=False)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_bounds_choose_what_logits_choose(dtype: torch.dtype, spread: float) -> None:
    case = Case(group=4, sk=70_000, d=128, dv=128, rank=32, topk=64, local=8, mean_value=False, spread=spread)
    request = request_of(replace(case, scale=128**-0.5), dtype, "cuda")
    tiles = choose_tiles(request)
    bounded, stored = (positions_of(request, replace(tiles, bounded=x)) for x in (True, False))
    assert bounded is not None
    assert torch.equal(bounded, stored)
