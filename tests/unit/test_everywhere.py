"""The same attention is found, and computes the same, wherever a model runs: modes, dtypes, checkpoints, exports."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from compiling import compiled, reports_after
from everywhere_cases import KINDS, Kind, Stack
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import attnopt
from attnopt.report import Report, SiteReport

#: One rounding of the dtype in which a context computes, with what two layers make of it.
LOSS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 6e-2}
ALL = pytest.mark.parametrize("name", KINDS)


def gradients(run: Callable[..., Tensor], model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradient of each parameter."""
    model.zero_grad()
    out = run(*inputs)
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_near(got: list[Tensor], eager: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert len(got) == len(eager)
    for mine, plain in zip(got, eager, strict=True):
        assert mine.dtype == plain.dtype
        wanted = plain.detach().double()
        error = (mine.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-12)
        assert float(error) < LOSS[dtype]


def check(
    kind: Kind,
    model: Stack,
    run: Callable[..., Tensor] | None = None,
    *,
    dynamic: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Trains one step as eager and compiled; `run`: what is compiled, the model by itself if it is not given."""
    inputs, before = kind.inputs(), attnopt.reports()
    function = model if run is None else run
    eager = gradients(function, model, inputs)
    assert_near(gradients(compiled(function, dynamic=dynamic), model, inputs), eager, dtype)
    report = reports_after(before)
    assert report.warnings == ()
    return report


def assert_found(report: Report, spec: str, count: int = 2) -> tuple[SiteReport, ...]:
    sites = report.attention
    assert [(site.verdict, site.spec) for site in sites] == [("rewritten", spec)] * count
    return sites


def in_autocast(
    function: Callable[..., Tensor], dtype: torch.dtype, device: str = "cpu"
) -> Callable[..., Tensor]:
    def run(*args: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return function(*args)

    return run


@ALL
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_inference(name: str, grad: Callable[[], object]) -> None:
    kind, before = KINDS[name], attnopt.reports()
    model = kind.model().eval()
    with grad():
        assert_near([compiled(model)(*kind.inputs())], [model(*kind.inputs())])
    sites = assert_found(reports_after(before), kind.spec)
    assert [site.module.split(".")[:2] for site in sites] == [["blocks", "0"], ["blocks", "1"]]


@ALL
def test_training(name: str) -> None:
    assert_found(check(KINDS[name], KINDS[name].model()), KINDS[name].spec)


@ALL
def test_training_with_symbolic_sizes(name: str) -> None:
    """A float attribute becomes an input of the graph then: the scale is that input, and nothing else changes."""
    kind = KINDS[name]
    spec = kind.spec.replace("scale=0.353553", "scale=input") if name == "llama" else kind.spec
    static = check(kind, kind.model())
    sites = assert_found(check(kind, kind.model(), dynamic=True), spec)
    assert {site.kernel for site in sites} == {site.kernel for site in static.attention}


HALVES = [
    ("llama", torch.bfloat16),
    ("llama", torch.float16),
    ("linear", torch.bfloat16),
    ("t5", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_half_types(name: str, dtype: torch.dtype) -> None:
    kind = KINDS[name]
    assert_found(check(kind, kind.model().to(dtype), dtype=dtype), kind.spec)


@ALL
def test_autocast_around_the_model_and_inside(name: str) -> None:
    kind, inputs = KINDS[name], KINDS[name].inputs()
    model, before = kind.model(), attnopt.reports()
    eager = gradients(in_autocast(model, torch.bfloat16), model, inputs)
    outside = in_autocast(compiled(model), torch.bfloat16)
    assert_near(gradients(outside, model, inputs), eager, torch.bfloat16)
    assert_found(reports_after(before), kind.spec)
    assert_found(check(kind, model, in_autocast(model, torch.bfloat16), dtype=torch.bfloat16), kind.spec)


@pytest.mark.filterwarnings(
    "ignore:CUDA is not available:UserWarning", "ignore:User provided device_type:UserWarning"
)
def test_autocast_for_another_device_changes_nothing() -> None:
    kind = KINDS["llama"]
    model = kind.model()
    assert_found(check(kind, model, in_autocast(model, torch.bfloat16, "cuda")), kind.spec)


def keep_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE
    )


SELECTIVE = partial(create_selective_checkpoint_contexts, keep_products)
CHECKPOINTS = [
    {"use_reentrant": False},
    {"use_reentrant": True},
    {"use_reentrant": False, "context_fn": SELECTIVE},
]


@pytest.mark.parametrize("how", CHECKPOINTS, ids=["plain", "reentrant", "selective"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_causal_mask_is_proven_inside_a_checkpoint(how: dict[str, object], dynamic: bool) -> None:
    kind = KINDS["llama"]
    model = kind.model()
    model.wrap = lambda block, *args: checkpoint(block, *args, **how)
    spec = kind.spec.replace("scale=0.353553", "scale=input") if dynamic else kind.spec
    sites = assert_found(check(kind, model, dynamic=dynamic), spec)
    assert [site.module for site in sites] == ["blocks.0.attention", "blocks.1.attention"]
    assert all(site.where.startswith("everywhere_cases.py:") and site.code for site in sites)


@pytest.mark.parametrize("name", ["linear", "t5", "bert"])
def test_other_attention_inside_a_checkpoint(name: str) -> None:
    """A mask made of data stays a tensor there."""
    kind = KINDS[name]
    model = kind.model()
    model.wrap = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    spec = "softmax scale=0.353553 full bias" if name == "bert" else kind.spec
    assert_found(check(kind, model), spec)


def test_a_checkpoint_inside_autocast_computes_in_its_dtype() -> None:
    kind = KINDS["llama"]
    model = kind.model()
    model.wrap = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    report = check(kind, model, in_autocast(model, torch.bfloat16), dtype=torch.bfloat16)
    assert_found(report, kind.spec)


LENGTHS = ({1: Dim("length", min=2, max=64)},)
EXPORTS: dict[str, Callable[[Stack, Kind], ExportedProgram]] = {
    "strict": lambda model, kind: export(model, kind.inputs(), strict=True),
    "non-strict": lambda model, kind: export(model, kind.inputs(), strict=False),
    "decomposed": lambda model, kind: export(model, kind.inputs()).run_decompositions(),
    "training": lambda model, kind: export(model.train(), kind.inputs()),
}


@ALL
@pytest.mark.parametrize("how", EXPORTS)
def test_exported_programs(name: str, how: str) -> None:
    kind = KINDS[name]
    model = kind.model().eval()
    program, report = attnopt.rewrite(EXPORTS[how](model, kind))
    assert report.warnings == ()
    assert_found(report, kind.spec)
    assert_near([program.module()(*kind.inputs())], [model(*kind.inputs())])


@pytest.mark.parametrize(
    ("name", "decomposed"), [("llama", True), ("llama", False), ("linear", True), ("t5", False)]
)
def test_exported_programs_of_any_length(name: str, decomposed: bool) -> None:
    kind = KINDS[name]
    model = kind.model().eval()
    exported = export(model, kind.inputs(), dynamic_shapes=LENGTHS)
    program, report = attnopt.rewrite(exported.run_decompositions() if decomposed else exported)
    assert_found(report, kind.spec)
    for length in (2, 5, 30):
        assert_near([program.module()(*kind.inputs(length))], [model(*kind.inputs(length))])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_regions_of_exported_programs(name: str) -> None:
    """Autocast is an operator with a body there."""
    kind = KINDS[name]
    model = kind.model().eval()
    model.wrap = in_autocast(lambda block, *args: block(*args), torch.bfloat16)
    program, report = attnopt.rewrite(export(model, kind.inputs()))
    assert report.warnings == ()
    assert_found(report, kind.spec)
    assert_near([program.module()(*kind.inputs())], [model(*kind.inputs())], torch.bfloat16)


def looped(block: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    start = torch.zeros((), dtype=torch.int64)
    return while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, block(x, *rest)), (start, x))[1]


def branched(block: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    return torch.cond(x.sum().isfinite(), block, lambda *args: block(*args) * 2, (x, *rest))


def mapped(block: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    from torch._higher_order_ops.map import map as map_

    return map_(block, torch.stack([x, x * 2]), *rest).sum(0)


@pytest.mark.parametrize(("wrap", "count"), [(looped, 2), (branched, 4), (mapped, 2)])
def test_bodies_of_control_flow_are_read_with_what_surrounds_them(
    wrap: Callable[..., Tensor], count: int
) -> None:
    kind, before = KINDS["llama"], attnopt.reports()
    model = kind.model().eval()
    model.wrap = wrap
    with torch.no_grad():
        assert_near([compiled(model)(*kind.inputs())], [model(*kind.inputs())])
    assert_found(reports_after(before), kind.spec, count)


def test_what_a_body_gets_from_writes_is_not_taken_for_a_formula() -> None:
    """The mask is written to after it was made: computing it anew would lose that."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT / 2 + mask).softmax(-1) @ v

    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((6, 6), float("-inf")).triu(1)
        mask[4, 5] = 0.0
        return checkpoint(attend, q, k, v, mask, use_reentrant=False)

    def drawn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, torch.rand(6, 6), use_reentrant=False)

    inputs = torch.randn(3, 1, 2, 6, 4).unbind()
    for function in (written, drawn):
        before = attnopt.reports()
        torch.manual_seed(3)
        out = compiled(function)(*inputs)
        torch.manual_seed(3)
        assert torch.allclose(out, function(*inputs), atol=1e-6)
        assert [site.spec for site in reports_after(before).attention] == ["softmax scale=0.5 full bias"]


def test_hooks_weight_tying_and_state_stay() -> None:
    kind = KINDS["llama"]
    model = kind.model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
        block.register_forward_hook(lambda module, args, out: out * 1.5)
    assert_found(check(kind, model), kind.spec)
    assert model.head.weight is model.embed.weight
    assert [*model.state_dict()] == [*state]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_a_compiled_model_can_be_copied() -> None:
    kind = KINDS["llama"]
    model = kind.model().eval()
    first = compiled(model)
    want = first(*kind.inputs())
    assert torch.equal(copy.deepcopy(first)(*kind.inputs()), want)
    assert [*first.state_dict()] == [f"_orig_mod.{key}" for key in model.state_dict()]


def test_parts_compiled_by_themselves_are_part_of_the_whole() -> None:
    kind = KINDS["llama"]
    model = kind.model()
    eager = gradients(model, model, kind.inputs())
    before = attnopt.reports()
    model.blocks[1] = compiled(model.blocks[1])
    whole = torch.compile(model, backend="attnopt", options={"inner": "eager"}, fullgraph=True)
    assert_near(gradients(whole, model, kind.inputs()), eager)
    assert_found(reports_after(before), kind.spec)


def test_each_compilation_has_its_report() -> None:
    kind, before = KINDS["llama"], attnopt.reports()
    model = kind.model().eval()
    function = compiled(model, dynamic=None)
    for length in (5, 9, 13):
        assert_near([function(*kind.inputs(length))], [model(*kind.inputs(length))])
    seen = {id(report) for report in before}  # the history is bounded: its length may stay the same
    assert sum(id(report) not in seen for report in attnopt.reports()) == 2


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch's own
def test_graphs_between_breaks_are_read_and_the_breaks_are_told() -> None:
    kind = KINDS["llama"]
    model = kind.model()

    def wrap(block: nn.Module, *args: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return block(*args)

    model.wrap = wrap
    report = check(kind, model)
    # The mask was proven in the graph before the break.
    assert {site.spec for site in report.attention} == {kind.spec}
    told = attnopt.explain(model, *kind.inputs()).graph_breaks
    assert any(line.startswith("test_everywhere.py:") and "graph_break() ->" in line for line in told)
    assert any("all of forward() runs outside of any graph" in line for line in told)


@pytest.fixture
def process_group() -> Iterator[None]:
    """One process that is a group by itself."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_wrappers_for_several_processes(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    kind = KINDS["linear"]
    model = kind.model()
    assert_found(check(kind, model, nn.parallel.DistributedDataParallel(model)), kind.spec)
    x = distribute_tensor(torch.randn(2, 4, 8, 16), init_device_mesh("cpu", (1,)), [Shard(0)])
    said = refused_whole(lambda x: (x @ x.mT).softmax(-1) @ x, x)
    assert "is a DTensor" in said


def refused_whole(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    """What is said of a graph that is left alone as a whole; its outputs are eager's."""
    with pytest.warns(RuntimeWarning, match="left a graph untouched"):
        out = compiled(function)(*inputs)
    assert out.shape == function(*inputs).shape
    (message,) = attnopt.reports()[-1].warnings
    return message


def test_transforms_inside_the_compiled_function_are_refused_by_name() -> None:
    def attend(x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x

    x = torch.randn(3, 6, 4)
    gradient = torch.func.grad(lambda x: attend(x).sum())
    for function in (gradient, torch.func.vmap(gradient)):
        said = refused_whole(lambda x, function=function: function(x), x)
        assert "torch.func (grad, jvp, functionalize) is used inside the compiled function" in said
        assert "\n" not in said
