"""Linear attention on a GPU as programs use it: the op, graphs, compilers, threads, streams, states handed over."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from lightning_cases import LAYOUTS, Case, gradients, make_case, quadratic, recurrence
from lightning_judging import (
    assert_rows,
    attend,
    backward,
    decay_of,
    forward,
    results,
    small_case,
    steps,
    token,
)
from torch import Tensor

from attnopt.kernels.lightning.op import lightning_attention, lightning_step

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DECAYS = ("none", "head", "token")
ATTENTION = torch.ops.attnopt.lightning_attention.default
STEP = torch.ops.attnopt.lightning_step.default
PARTS = ("q", "k", "v", "log_decay", "initial_state", "d_out", "d_state")

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_decay = pytest.mark.parametrize("decay", DECAYS)


def case_of(dtype: torch.dtype, length: int = 300, **changes: object) -> Case:
    """Two sequences of two heads, long enough for several chunks."""
    sizes = {"d": 32, "dv": 32, "kv_heads": 2, "share": 1, "scale": 1 / 32, "decay": "token", **changes}
    return make_case(length, signed=False, **sizes).in_rounded(dtype).on(DEVICE)


def expect_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The same bits under every name."""
    differing = [name for name, x in want.items() if not torch.equal(got[name], x)]
    assert differing == []


def overwrite(case: Case, other: Case) -> None:
    """Puts the numbers of `other` where those of `case` are."""
    for name in PARTS:
        if getattr(case, name) is not None:
            getattr(case, name).copy_(getattr(other, name))


# The dispatch.


@every_dtype
@every_decay
def test_the_op_takes_the_kernels(dtype, decay: str) -> None:
    case = case_of(dtype, decay=decay)
    out, state = forward(case)
    want = {"out": out, "state": state}
    want |= {f"d_{name}": x.to(getattr(case, name).dtype) for name, x in backward(case).items()}
    expect_same(results(attend, case), want)


@every_dtype
def test_the_op_takes_the_step(dtype) -> None:
    case = case_of(dtype, 1)
    states = [case.initial_state.clone() for _ in range(2)]
    out = lightning_step(*token(case, 0), states[0], log_decay=decay_of(case, 0), scale=case.scale)
    assert torch.equal(out[:, :, None], steps(case, states[1]))
    assert torch.equal(*states)


# Registration.


@every_dtype
@every_decay
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
def test_the_op_is_registered_well(dtype, decay: str, layout: str) -> None:
    case = case_of(dtype, 100, decay=decay)
    laid = case.map(lambda x: (LAYOUTS[layout](x) if x.dim() > 2 else x).requires_grad_())
    arguments = (
        laid.q,
        laid.k,
        laid.v,
        laid.log_decay,
        laid.initial_state,
        laid.scale,
        True,
        None,
        layout != "padded",
    )
    assert set(torch.library.opcheck(ATTENTION, arguments).values()) == {"SUCCESS"}


@every_dtype
@every_decay
def test_the_step_is_registered_well(dtype, decay: str) -> None:
    case = case_of(dtype, 1, decay=decay)
    arguments = (*token(case, 0), case.initial_state, decay_of(case, 0), case.scale)
    assert set(torch.library.opcheck(STEP, arguments).values()) == {"SUCCESS"}


# Compilers.


@every_dtype
@every_decay
def test_compiled_is_eager(dtype, decay: str) -> None:
    case = case_of(dtype, decay=decay)
    compiled = torch.compile(attend, fullgraph=True)
    expect_same(results(compiled, case), results(attend, case))


@every_dtype
def test_one_compilation_serves_many_lengths(dtype) -> None:
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for length in (20, 65, 300):
        case = case_of(dtype, length)
        expect_same(results(compiled, case), results(attend, case))


@every_dtype
def test_a_compiled_step_changes_its_state(dtype) -> None:
    case = case_of(dtype, 1)
    states = [case.initial_state.clone() for _ in range(2)]
    outs = [
        step(*token(case, 0), state, log_decay=decay_of(case, 0), scale=case.scale)
        for step, state in zip(
            (lightning_step, torch.compile(lightning_step, fullgraph=True)), states, strict=True
        )
    ]
    assert torch.equal(*outs)
    assert torch.equal(*states)


# Graphs.


def captured(run: Callable[[], dict[str, Tensor]]) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
    """A graph of `run` and the tensors that its replays fill; kernels are compiled before the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = run()
    return graph, filled


@every_dtype
@every_decay
@pytest.mark.parametrize("length", [100, 3000])
def test_a_captured_forward_replays_on_new_values(dtype, decay: str, length: int) -> None:
    case = case_of(dtype, length, decay=decay)
    graph, filled = captured(lambda: dict(zip(("out", "state"), attend(case), strict=True)))
    for _ in range(3):
        overwrite(case, case_of(dtype, length, decay=decay))
        graph.replay()
        expect_same(filled, dict(zip(("out", "state"), attend(case), strict=True)))


@every_dtype
@every_decay
@pytest.mark.parametrize("length", [100, 3000])
def test_captured_gradients_replay_on_new_values(dtype, decay: str, length: int) -> None:
    case = case_of(dtype, length, decay=decay)
    graph, filled = captured(lambda: results(attend, case))
    for _ in range(3):
        overwrite(case, case_of(dtype, length, decay=decay))
        graph.replay()
        expect_same(filled, results(attend, case))


@every_dtype
def test_a_captured_step_goes_on_at_each_replay(dtype) -> None:
    case = case_of(dtype, 1)
    state, plain = case.initial_state.clone(), case.initial_state.clone()

    def step(into: Tensor) -> Tensor:
        return lightning_step(*token(case, 0), into, log_decay=decay_of(case, 0), scale=case.scale)

    graph, filled = captured(lambda: {"out": step(state)})
    state.copy_(plain)  # the run before the capture went a step ahead
    for _ in range(4):
        overwrite(case, case_of(dtype, 1))
        graph.replay()
        assert torch.equal(filled["out"], step(plain))
        assert torch.equal(state, plain)


# Threads, streams and devices.


@every_dtype
def test_a_fresh_thread_may_begin(dtype) -> None:
    """A new thread has no CUDA context until something binds one; each call here gets a thread of its own."""
    case = case_of(dtype, 3000)
    want = results(attend, case)
    for call in (lambda: attend(case)[0], lambda: results(attend, case)["out"]):
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(call).result(), want["out"])
    with ThreadPoolExecutor(1) as pool:
        expect_same(pool.submit(results, attend, case).result(), want)


@every_dtype
def test_a_fresh_thread_may_take_a_step(dtype) -> None:
    case, states = case_of(dtype, 5), [case_of(dtype, 5).initial_state for _ in range(2)]
    states[1].copy_(states[0])
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(steps, case, states[0]).result()
    assert torch.equal(out, steps(case, states[1]))
    assert torch.equal(*states)


@every_dtype
def test_threads_at_once_do_not_disturb_each_other(dtype) -> None:
    cases = [case_of(dtype, 200 + n) for n in range(8)]
    want = [results(attend, case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda case: results(attend, case), cases))
    for one, other in zip(got, want, strict=True):
        expect_same(one, other)


@every_dtype
def test_work_goes_to_the_current_stream(dtype) -> None:
    """On a stream that first waits and then writes the operands: work on another one would read the old numbers."""
    case, fresh = case_of(dtype, 500), case_of(dtype, 500)
    want = results(attend, fresh)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        overwrite(case, fresh)
        got = results(attend, case)
    side.synchronize()
    expect_same(got, want)


@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_any_device_is_served_while_another_is_current(index: int) -> None:
    case = case_of(torch.bfloat16)
    want, got = results(attend, case), results(attend, case.on(f"cuda:{index}"))
    assert {x.device.index for x in got.values()} == {index}
    assert torch.cuda.current_device() == 0
    expect_same({name: x.to(DEVICE) for name, x in got.items()}, want)


# States handed over.


SPLITS = [
    (first, second, third)
    for first in (0, 1, 15, 16, 63, 64, 65, 200)
    for second in (0, 1, 17, 64, 130)
    for third in (0, 1, 6)
    if first + second + third
]


@every_dtype
@every_decay
def test_prefill_prefill_decode_is_one_pass(dtype, decay: str) -> None:
    whole = case_of(dtype, 340, decay=decay)
    exact, eager = recurrence(whole.map(Tensor.double)), quadratic(whole)
    for first, second, third in SPLITS:
        stop = first + second + third
        head, state = attend(whole.rows(0, first))
        middle, state = attend(replace(whole.rows(first, first + second), initial_state=state))
        last = whole.rows(first + second, stop)
        tail = [one_step(last, t, state) for t in range(third)]
        out, name = torch.cat([head, middle, *tail], dim=2), f"{first} + {second} + {third}"
        assert_rows(out, exact[0][:, :, :stop], eager[0][:, :, :stop], dtype, 2.0, f"out of {name}")
        part = whole.rows(0, stop)
        states = attend(part.map(Tensor.double))[1], quadratic(part)[1]
        assert_rows(state, *states, dtype, 2.0, f"state of {name}")


def one_step(case: Case, t: int, state: Tensor) -> Tensor:
    out = lightning_step(*token(case, t), state, log_decay=decay_of(case, t), scale=case.scale)
    return out[:, :, None]


@every_dtype
def test_gradients_pass_through_the_state_that_is_handed_over(dtype) -> None:
    whole = case_of(dtype, 300)

    def in_two(case: Case) -> tuple[Tensor, Tensor]:
        head, state = attend(case.rows(0, 130))
        tail, state = attend(replace(case.rows(130, None), initial_state=state))
        return torch.cat([head, tail], dim=2), state

    got, eager = gradients(in_two, whole), gradients(quadratic, whole)
    for name, exact in gradients(attend, whole.map(Tensor.double)).items():
        assert_rows(got[name], exact, eager[name], dtype, 3.0, f"d_{name}")


# Autocast.


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_lowers_nothing_inside(lower) -> None:
    case = small_case(200, d=32, dv=32).in_rounded(torch.float32).on(DEVICE)
    want = results(attend, case)
    with torch.autocast(DEVICE, dtype=lower):
        got = results(attend, case)
    expect_same(got, want)


def test_strides_beyond_32_bits_are_followed() -> None:
    wide = torch.empty(2100, 2**20, device=DEVICE, dtype=torch.bfloat16)
    x = wide[:, 8:24].normal_()[None, None]
    assert x.stride(2) * x.shape[2] > 2**31
    assert torch.equal(lightning_attention(x, x, x), lightning_attention(*[x.contiguous()] * 3))
