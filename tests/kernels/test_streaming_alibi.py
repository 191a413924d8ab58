"""A bias that is linear in the distance, in every kernel: never a tensor of all pairs, and the numbers of one.

On the CPU the torch path in three dtypes and the Triton path as interpreted; on a GPU the same laws, compiled.
"""

from dataclasses import replace

import pytest
import torch
from oracle import assert_same
from streaming_cases import Call, Structure, call, eager_gradients, plain_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.errors import ShapeError
from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.kernels.sdpa.kernel import KERNEL as SDPA
from attnopt.kernels.streaming import chunked, triton_backward, triton_forward
from attnopt.kernels.streaming.kernel import KERNEL
from attnopt.kernels.streaming.op import attend
from attnopt.kernels.streaming.places import streaming_attention
from attnopt.kernels.streaming.problem import Gradients, Wanted
from attnopt.kernels.streaming.triton_tiles import Tiles
from attnopt.mask import BOTTOM_RIGHT, FULL, Causal, First, KeyPadding, Length, Mask, Window
from attnopt.options import Options
from attnopt.policy import choose
from attnopt.rule import SiteMeta, TensorMeta
from attnopt.spec import Alibi, AttentionSpec, EmptyRow, Heads

# numpy, which interprets, reports the overflows that exponentials of masked logits rely on; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

CAUSAL = Structure(offset=0)
#: What else a call has beside its slopes, under which structure.
BESIDE = [
    ((), Structure()),
    ((), CAUSAL),
    ((), Structure(offset=0, window=20, sinks=3)),
    (("padding",), Structure(offset=14)),
    (("sinks", "softcap"), CAUSAL),
    (("bias", "mask"), Structure(offset=5, prefix=9)),
]
IDS = ["full", "causal", "window", "padding", "sinks-softcap", "bias-mask"]
SMALL = Tiles(16, 16, 4, 1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = [("cpu", torch.float16), ("cpu", torch.float32)] if not torch.cuda.is_available() else []
PLACES = [
    *INTERPRETED,
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)),
]


def sloped(extras: tuple[str, ...], structure: Structure, seed: int = 4, **sizes: int) -> Call:
    """A call of odd sizes with grouped heads; seed 4 makes the line symmetric, 5 counts it from elsewhere."""
    sizes = {"batch": 2, "kv_heads": 2, "group": 2, "sq": 45, "sk": 51, "d": 20, "dv": 12} | sizes
    return call(
        extras=frozenset({*extras, "alibi"}), structure=structure, seed=seed, empty_row="zero", **sizes
    )


def of_triton(c: Call, found: list[Tensor]) -> list[Tensor]:
    """Without what the torch path alone computes: the gradients of bias and slopes."""
    sinks = found[3 + (c.bias is not None) :][:1] if c.sink_logits is not None else []
    return [*found[:3], *sinks]


def given_back(found: Gradients) -> list[Tensor]:
    return [
        x for x in (found.q, found.k, found.v, found.bias, found.sink_logits, found.slopes) if x is not None
    ]


def assert_gradients(found: list[Tensor], c: Call, do: Tensor, *, triton: bool) -> None:
    exact = c.to(torch.float64)
    wanted = plain_gradients(exact, do.double())
    eager = eager_gradients(c, do, wanted)
    if triton:
        wanted, eager = of_triton(c, wanted), of_triton(c, eager)
    for got, want, plain in zip(found, wanted, eager, strict=True):
        assert_same(got.cpu(), want, plain, factor=3.0, what="gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("extras", "structure"), BESIDE, ids=IDS)
def test_rows_and_gradients_are_as_good_as_eager(
    extras: tuple[str, ...], structure: Structure, dtype: torch.dtype
) -> None:
    for seed in (4, 5):
        c = sloped(extras, structure, seed).to(dtype)
        answer = chunked.forward(c.problem)
        assert_same(answer.o, c.to(torch.float64).plain(), c.plain())
        do = torch.randn_like(answer.o)
        found = chunked.backward(c.problem, answer, do, None, Wanted(bias=True, slopes=True))
        assert_gradients(given_back(found), c, do, triton=False)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize(("extras", "structure"), BESIDE, ids=IDS)
def test_rows_and_gradients_of_the_triton_path(
    extras: tuple[str, ...], structure: Structure, device: str, dtype: torch.dtype
) -> None:
    tiles = None if device == "cuda" else SMALL
    c = sloped(extras, structure, seed=5 if structure.window else 4, batch=1, kv_heads=1).to(dtype)
    there = c.to(device).problem
    answer = triton_forward.launch(there, tiles)
    assert_same(answer.o.cpu(), c.to(torch.float64).plain(), c.plain())
    do = torch.randn(c.q.shape[:3] + c.v.shape[3:]).to(dtype)
    found = triton_backward.launch(there, answer, do.to(device), None, tiles, tiles)
    assert_gradients(given_back(found), c, do, triton=True)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1000, 4099])
def test_long_rows_on_a_gpu(length: int) -> None:
    c = sloped((), CAUSAL, seed=5, batch=1, sq=length, sk=length, d=64, dv=64).to(torch.bfloat16)
    answer = triton_forward.launch(c.to("cuda").problem)
    assert_same(answer.o.cpu(), c.to(torch.float64).plain(), c.plain())


def test_the_op_gives_slopes_their_gradient() -> None:
    c = sloped((), CAUSAL, sq=9, sk=11).to(torch.float64)
    slopes = c.slopes.clone().requires_grad_()  # type: ignore[union-attr]
    o = attend(*replace(c, slopes=slopes).arguments)[0]
    do = torch.randn_like(o)
    (found,) = torch.autograd.grad(o, slopes, do)
    torch.testing.assert_close(found, plain_gradients(c, do)[-1], rtol=1e-10, atol=1e-10)


def test_streaming_attention_takes_slopes() -> None:
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (7, 11, 11))
    slopes = torch.rand(4, dtype=torch.float64)
    away = torch.arange(11)[None, :] - torch.arange(4, 11)[:, None]
    seen = (away <= 0) & ((away > -5) | (torch.arange(11) < 2))
    scores = q @ k.mT * 8**-0.5 + slopes[:, None, None] * away
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    for given in (slopes, slopes.expand(2, 4)):
        torch.testing.assert_close(streaming_attention(q, k, v, sinks=2, window=5, slopes=given), want)


def test_zero_queries_show_the_line_itself() -> None:
    slopes, sk = torch.tensor([[0.5, -0.25]]), 40
    q, k = torch.zeros(1, 2, 30, 3), torch.randn(1, 1, sk, 3)
    for symmetric in (False, True):
        c = Call(
            *(q, k, torch.eye(sk)[None, None]),
            slopes=slopes,
            structure=CAUSAL,
            diagonal=3,
            symmetric=symmetric,
        )
        want = (slopes[..., None, None] * c.distance()).masked_fill(~c.visible(), -torch.inf).softmax(-1)
        compiled = triton_forward.launch(c.to(DEVICE).problem, SMALL).o.cpu()
        for o in (chunked.forward(c.problem).o, compiled):
            torch.testing.assert_close(o, want, rtol=1e-5, atol=1e-7)


def test_far_from_the_diagonal_nothing_is_lost() -> None:
    """Among keys three million positions before the query, neighbours differ by one slope: in fp32 slope * j does not
    tell. The far keys are the only visible ones, as first keys of a window that has moved on.
    """
    away, slope = 3_000_000, 0.3
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 8, 4)
    c = Call(
        q, k, torch.eye(8)[None, None], slopes=torch.tensor([[slope]]), diagonal=away, structure=Structure()
    )
    want = (slope * torch.arange(8.0, dtype=torch.float64)).softmax(-1)
    for o in (chunked.forward(c.to(torch.float64).problem).o, c.to(torch.float64).plain()):
        torch.testing.assert_close(o[0, 0, 0], want, rtol=1e-6, atol=0)
    # fp32 rounds the product to an eighth of a logit, as eager does; the distance in it is exact.
    single = chunked.forward(c.problem).o[0, 0, 0]
    rounded = (torch.tensor(slope) * (torch.arange(8) - away)).softmax(-1)
    torch.testing.assert_close(single, rounded, rtol=1e-6, atol=0)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tensor_of_all_pairs_is_made() -> None:
    c = sloped((), CAUSAL, batch=1, group=1, sq=3000, sk=3000, d=8, dv=8)
    with Largest() as largest:
        answer = chunked.forward(c.problem)
        chunked.backward(c.problem, answer, torch.ones_like(answer.o), None, Wanted(slopes=True))
    assert largest.elements <= chunked.TILE


def test_slopes_that_do_not_fit_are_named() -> None:
    c = sloped((), CAUSAL)
    for slopes in (torch.randn(4), torch.randn(2, 3), torch.ones(1, 4, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"slopes is .*; wanted float \(2, 4\), or \(1, 4\) for all"):
            attend(*replace(c, slopes=slopes).arguments)


# ---- as kernels of a spec ----

MASKS = [
    FULL,
    Causal(),
    Causal(BOTTOM_RIGHT),
    Causal() & (Window(7) | First(2)),
    Causal() & KeyPadding("keep"),
]
LINES = [Alibi(), Alibi(BOTTOM_RIGHT), Alibi(Length(-2), symmetric=True)]


def operands(spec: AttentionSpec, rows: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 17, 8), torch.randn(2, 2, 21, 8), torch.randn(2, 2, 21, 5)
    held = {"q": q, "k": k, "v": v, "keep": torch.rand(2, 21) < 0.7, "sink_logits": torch.randn(4)}
    held["slopes"] = torch.rand(2, 4) if rows == 2 else torch.rand(4)
    return {name: held[name].double() if name != "keep" else held[name] for name in spec.operand_names()}


@pytest.mark.parametrize("kernel", [SDPA, KERNEL], ids=lambda k: k.name)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("alibi", LINES, ids=str)
def test_each_kernel_states_what_the_reference_does(kernel: object, mask: Mask, alibi: Alibi) -> None:
    for rows, sinks in ((1, False), (2, False), (1, True)):
        empty = EmptyRow.ZERO if sinks else EmptyRow.NAN
        spec = AttentionSpec("softmax", 0.3, Heads(2), mask, empty, sink_logits=sinks, alibi=alibi)
        held = operands(spec, rows)
        got, want = (k.run(spec, held) for k in (kernel, REFERENCE))  # type: ignore[attr-defined]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_the_reference_adds_the_line_to_the_scores() -> None:
    spec = AttentionSpec("softmax", 0.3, alibi=Alibi(Length(1)))
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    slopes = torch.tensor([0.5, 2.0], dtype=torch.float64)
    places = torch.arange(6)
    bias = slopes[:, None, None] * (places[None, :] - places[:, None] - 1)
    want = (q @ k.mT * 0.3 + bias).softmax(-1) @ v
    torch.testing.assert_close(REFERENCE.run(spec, {"q": q, "k": k, "v": v, "slopes": slopes}), want)


def long_site(mask: Mask, alibi: Alibi, device: str, length: int = 16384) -> SiteMeta:
    spec = AttentionSpec("softmax", 0.1, mask=mask, alibi=alibi)
    where, half = torch.device(device), torch.bfloat16
    metas = {name: TensorMeta((1, 32, length, 64), half, where) for name in "qkv"}
    slopes = {"slopes": TensorMeta((32,), torch.float32, where)}
    plain = SiteMeta(
        AttentionSpec("softmax", 0.1, mask=mask, bias=("bias",)),
        {**metas, "bias": TensorMeta((1, 32, length, length), half, where)},
    )
    return SiteMeta(spec, {**metas, **slopes}, otherwise=(plain,))


@pytest.mark.parametrize("length", [2048, 16384])
@pytest.mark.parametrize(("mask", "alibi"), [(Causal(), Alibi()), (FULL, Alibi(symmetric=True))], ids=str)
def test_on_a_gpu_long_sequences_go_where_no_mask_is_made(mask: Mask, alibi: Alibi, length: int) -> None:
    chosen = choose(long_site(mask, alibi, "cuda", length), [SDPA, KERNEL], Options())
    assert chosen.kernel is KERNEL
    assert chosen.spec.alibi == alibi


def test_building_the_bias_is_part_of_what_the_library_costs() -> None:
    site = long_site(Causal(), Alibi(), "cuda")
    pairs = 32 * 16384**2
    assert SDPA.cost(site).bytes - KERNEL.cost(site).bytes >= 4 * pairs
