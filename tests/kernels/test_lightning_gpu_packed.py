"""Packed sequences on a GPU: each one by itself against fp64, graphs, compilers."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from lightning_cases import Case, Result, make_case
from lightning_judging import Compute, faults, plainly, results
from torch import Tensor

from attnopt.kernels.lightning.op import lightning_attention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DECAYS = ("none", "head", "token")
#: Lengths of sequences packed into one row: empty ones, single tokens, around the chunk, and long ones.
PACKS = (
    (0, 1, 2, 15, 16, 17, 31, 33, 0),
    (63, 64, 65, 127, 128, 129, 1),
    (1500, 3, 700),
    (400,),
    tuple(range(1, 40)),
)

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_decay = pytest.mark.parametrize("decay", DECAYS)


def packed_case(lengths: tuple[int, ...], **changes: object) -> Case:
    """One row of sequences; a state for each."""
    sizes = {"d": 32, "dv": 32, "kv_heads": 2, "share": 1, "scale": 1 / 32, "signed": False, **changes}
    with torch.device(DEVICE):
        case = make_case(sum(lengths), **sizes, batch=1)
        states = make_case(0, **sizes, batch=len(lengths))
    return replace(case, initial_state=states.initial_state, d_state=states.d_state)


def starts_of(lengths: tuple[int, ...], kind: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(kind)


def attend_packed(starts: Tensor, case: Case) -> Result:
    return lightning_attention(
        case.q, case.k, case.v,
        log_decay=case.log_decay, scale=case.scale, initial_state=case.initial_state, return_state=True,
        cu_seqlens=starts,
    )  # fmt: skip


def one_by_one(bounds: list[int], compute: Compute, case: Case) -> Result:
    """Each sequence by itself."""
    found = []
    for i, (start, stop) in enumerate(pairwise(bounds)):
        state = None if case.initial_state is None else case.initial_state[i : i + 1]
        found.append(compute(replace(case.rows(start, stop), initial_state=state)))
    outs, states = zip(*found, strict=True)
    return torch.cat(outs, dim=2), torch.cat(states)


@every_dtype
@every_decay
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_each_packed_sequence_is_right(dtype, decay: str, kind: torch.dtype) -> None:
    found = []
    for lengths in PACKS:
        starts = starts_of(lengths, kind)
        cases = [(f"{lengths}", packed_case(lengths, decay=decay))]
        eager = partial(one_by_one, starts.tolist(), plainly)
        found += faults(cases, dtype, compute=partial(attend_packed, starts), eager=eager)
    assert found == []


@every_dtype
@pytest.mark.parametrize(("d", "dv", "share"), [(64, 128, 1), (128, 128, 4), (40, 96, 2), (256, 64, 1)])
def test_packed_sequences_of_any_width_and_sharing_are_right(dtype, d: int, dv: int, share: int) -> None:
    lengths, sizes = (100, 1, 333), {"d": d, "dv": dv, "share": share, "scale": 1 / max(d, dv)}
    starts = starts_of(lengths)
    cases = [(f"{sizes}", packed_case(lengths, **sizes, decay="token", with_state=share != 2))]
    eager = partial(one_by_one, starts.tolist(), plainly)
    assert faults(cases, dtype, compute=partial(attend_packed, starts), eager=eager) == []


@every_dtype
def test_a_captured_graph_takes_other_borders(dtype) -> None:
    """Only the device reads where sequences start: the same graph serves any borders of as many."""
    splits = ((64, 100, 136), (0, 299, 1), (150, 0, 150), (1, 1, 298))
    case, starts = packed_case(splits[0], decay="token").in_rounded(dtype), starts_of(splits[0])
    run = partial(results, partial(attend_packed, starts), case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = run()
    for split in splits:
        starts.copy_(starts_of(split))
        graph.replay()
        want = run()
        assert [name for name, x in want.items() if not torch.equal(filled[name], x)] == []


@every_dtype
def test_compiled_packed_sequences_are_eager(dtype) -> None:
    case, starts = packed_case((64, 100, 136), decay="head").in_rounded(dtype), starts_of((64, 100, 136))
    compiled = torch.compile(attend_packed, fullgraph=True)
    want, got = (results(partial(run, starts), case) for run in (attend_packed, compiled))
    assert [name for name, x in want.items() if not torch.equal(got[name], x)] == []


@every_dtype
@every_decay
def test_packed_sequences_are_registered_well(dtype, decay: str) -> None:
    case = packed_case((5, 60, 35), decay=decay).in_rounded(dtype).map(Tensor.requires_grad_)
    given = (
        case.q,
        case.k,
        case.v,
        case.log_decay,
        case.initial_state,
        case.scale,
        True,
        starts_of((5, 60, 35)),
        True,
    )
    checks = torch.library.opcheck(torch.ops.attnopt.lightning_attention.default, given)
    assert set(checks.values()) == {"SUCCESS"}


@every_dtype
def test_packed_results_are_the_same_bits_each_time(dtype) -> None:
    for lengths in PACKS:
        case = packed_case(lengths, d=64, dv=64, decay="token").in_rounded(dtype)
        starts = starts_of(lengths)
        first = results(partial(attend_packed, starts), case)
        for _ in range(30):
            again = results(partial(attend_packed, starts), case)
            assert [name for name, x in first.items() if not torch.equal(again[name], x)] == []


@every_dtype
@pytest.mark.parametrize("packed", [False, True])
def test_no_call_waits_for_the_device(dtype, packed: bool) -> None:
    lengths = (64, 700, 136)
    case, starts = packed_case(lengths, decay="token").in_rounded(dtype), starts_of(lengths)
    if not packed:
        case = replace(case, initial_state=None, d_state=case.d_state[:1])
    run = partial(results, partial(attend_packed, starts if packed else None), case)
    want = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(got[name], x) for name, x in want.items())
