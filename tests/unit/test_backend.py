"""The backend: found by name, right in training and across graph breaks, and never a reason for a model to fail."""

import subprocess
import sys
import threading

import pytest
import torch
from compiling import check_like_eager, compiled
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import attnopt
from attnopt import pipeline, watch
from attnopt.errors import OptionError, StrictError, VerificationError
from attnopt.kernels.sdpa.kernel import SdpaKernel
from attnopt.passes.softmax import SoftmaxRule
from attnopt.policy import _quarantined


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def inputs(length: int = 8) -> list[Tensor]:
    return [torch.randn(2, 4, length, 16) for _ in range(3)]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_name_is_enough_without_importing_attnopt() -> None:
    said = python(
        "import torch, sys\n"
        "f = lambda q: torch.softmax(q @ q.mT, -1) @ q\n"
        "q = torch.randn(2, 4, 8, 16)\n"
        "out = torch.compile(f, backend='attnopt', options={'inner': 'eager'})(q)\n"
        "print(torch.allclose(out, f(q), atol=1e-5), sys.modules['attnopt'].reports()[-1].sites[0].verdict)"
    )
    assert said == "True rewritten"


def test_inductor_compiles_the_rest_forward_and_backward() -> None:
    report = check_like_eager(attend, inputs(), differentiable=3, inner="inductor")
    assert [site.verdict for site in report.sites] == ["rewritten"]


class Block(nn.Module):
    """A small transformer layer with attention spelled out; `again` recomputes it in the backward pass."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.again = nn.Linear(32, 96), nn.Linear(32, 32), again

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.attention, x, use_reentrant=False) if self.again else self.attention(x))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = (q @ k.mT / 8**0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def losses(model: nn.Module, step: nn.Module) -> list[float]:
    """Three steps of SGD on the same batch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(3):
        loss = step(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("again", [False, True], ids=["plain", "checkpointed"])
def test_training_steps_are_those_of_eager(again: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(again=again), Block(again=again))
    start = {name: x.clone() for name, x in model.state_dict().items()}
    eager = losses(model, model)
    model.load_state_dict(start)
    trained = losses(model, compiled(model, inner="aot_eager"))
    assert [s.spec for s in attnopt.reports()[-1].having("rewritten")] == [
        "softmax scale=0.353553 causal"
    ] * 2
    assert trained == pytest.approx(eager, rel=1e-5)


def test_graph_breaks_are_reported() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        torch._dynamo.graph_break()
        return scores.softmax(-1) @ v

    report = attnopt.explain(broken, *inputs())
    assert report.graph_breaks
    assert report.having("rewritten") == ()


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(Exception, match="unknown option 'windw'; did you mean 'window'"):
        compiled(attend, windw=3)(*inputs())


def test_a_mode_goes_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def compile_rest(module: GraphModule, _: list[Tensor], **settings: object) -> object:
        given.append(settings)
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_rest)
    torch._dynamo.reset()
    torch.compile(attend, backend="attnopt", mode="max-autotune-no-cudagraphs")(*inputs())
    torch.compile(attend, backend="attnopt", mode="default")(*inputs(9))
    first, second = given
    assert first["config_patches"]["max_autotune"] is True
    assert second == {}


@pytest.mark.parametrize(
    ("mode", "inner", "message"),
    [
        ("fastest", "inductor", "Unrecognized mode=fastest, should be one of"),
        ("reduce-overhead", "eager", "mode='reduce-overhead' is for inner='inductor', and inner is 'eager'"),
    ],
)
def test_a_mode_that_is_none_is_refused(mode: str, inner: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attnopt.backend.attnopt(None, [], mode=mode, options={"inner": inner})


def mixed_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax((q @ k.transpose(-1, -2)).cumsum(-1).tan(), -1)
    return weights @ v


def test_strict_names_the_line_and_the_reason() -> None:
    with pytest.raises(
        Exception, match=r"test_backend.py:\d+: .*weights.*aten::tan between .* is not understood"
    ) as caught:
        compiled(mixed_scores, strict=True)(*inputs())
    assert isinstance(
        caught.value.__cause__ or getattr(caught.value, "inner_exception", None) or caught.value, Exception
    )


STEPS = [
    (pipeline, "trace"), (pipeline.verify, "validate"), (pipeline.splice, "splice"), (pipeline.splice, "finish"),
    (SdpaKernel, "run"), (SdpaKernel, "cost"), (SoftmaxRule, "read"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=lambda x: getattr(x, "__name__", x))
def test_a_failure_inside_leaves_the_graph_as_it_was(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        message = "planted"
        raise ZeroDivisionError(message)

    monkeypatch.setattr(owner, name, fail)
    q, k, v = inputs()
    function = compiled(attend)
    with pytest.warns(RuntimeWarning, match="left a graph untouched.*planted"):
        out = function(q, k, v)
    assert torch.equal(out, attend(q, k, v))
    assert "planted" in attnopt.reports()[-1].warnings[0]


@pytest.mark.filterwarnings("ignore:attnopt left a graph untouched")
def test_a_failure_under_strict_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SdpaKernel, "run", lambda *_: 1 // 0)
    function = compiled(attend, strict=True)
    with pytest.raises(Exception, match="strict=True and attnopt left a graph untouched"):
        function(*inputs())


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "trace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled(attend)(*inputs())


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """An sdpa kernel that is one per cent off; no quarantine remains afterwards."""
    right = SdpaKernel.run
    monkeypatch.setattr(SdpaKernel, "run", lambda self, spec, held: right(self, spec, held) * 1.01)
    monkeypatch.setattr("attnopt.policy._quarantined", set())


@pytest.mark.parametrize("verify", ["first", "sample", "always"])
def test_a_wrong_kernel_is_caught_on_real_data_and_quarantined(wrong_kernel: None, verify: str) -> None:
    q, k, v = inputs()
    with pytest.warns(RuntimeWarning, match="kernel sdpa fails its check on real data.*rows are off"):
        out = compiled(attend, verify=verify)(q, k, v)
    assert torch.equal(out, attend(q, k, v))
    assert check_like_eager(attend, (q, k, v)).sites[0].kernel != "sdpa"


def test_a_wrong_kernel_under_strict_is_an_error(wrong_kernel: None) -> None:
    with pytest.raises(VerificationError, match="under quarantine"):
        compiled(attend, verify="first", strict=True)(*inputs())


def test_a_right_kernel_passes_every_check_and_its_answer_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(watch, "check", lambda edits, args: checked.append(len(edits)) or iter(()))
    function = compiled(attend, verify="sample")
    for _ in range(watch.PERIOD + 1):
        function(*inputs())
    assert checked == [1, 1]
    assert not _quarantined


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_come_out_where_eager_has_them(value: float) -> None:
    q, k, v = inputs()
    q[0, 1, 2, 3] = v[1, 2, 3, 4] = value
    out, eager = compiled(attend)(q, k, v), attend(q, k, v)
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(test(out), test(eager))


@pytest.mark.parametrize("length", [0, 1])
def test_empty_and_single_sequences_are_eagers(length: int) -> None:
    q, k, v = inputs(length)
    torch.testing.assert_close(compiled(attend)(q, k, v), attend(q, k, v))


def test_a_model_without_attention_is_left_alone() -> None:
    report = check_like_eager(lambda x: torch.relu(x) + 1, [torch.randn(3, 4)])
    assert report.sites == ()
    assert "0 of 0" in str(report) or "no attention" in str(report).lower()


def test_autocast_computes_in_its_dtype() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(q, k, v)

    q, k, v = inputs()
    out, eager = compiled(mixed, inner="aot_eager")(q, k, v), mixed(q, k, v)
    assert out.dtype == eager.dtype == torch.bfloat16
    assert attnopt.reports()[-1].sites[0].verdict == "rewritten"
    assert float((out.double() - attend(q, k, v).double()).norm() / out.double().norm()) < 2.0**-7


def test_threads_may_compile_at_once() -> None:
    found: list[bool] = []

    def work() -> None:
        q, k, v = inputs()
        function = torch.compile(attend, backend="attnopt", options={"inner": "eager"})
        found.append(torch.allclose(function(q, k, v), attend(q, k, v), atol=1e-5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_strict_errors_are_typed() -> None:
    with pytest.raises(StrictError, match="1 attention site"):
        attnopt.explain(mixed_scores, *inputs(), options={"strict": True})
