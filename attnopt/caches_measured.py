"""How positions enter a transformers decoder, measured on the model itself: nothing is looked up by its name."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from attnopt.caches_rotary import Pairs, Rotary
from attnopt.errors import Blame, UnsupportedError

#: Positions at which layers are compared; the last one is far enough for the slowest pairs of features to turn.
NEAR = (0, 1, 2, 3)
FAR = (1, 17, 301, 2047)

#: Share of a tensor's norm by which two measurements may differ: the model forms phases in fp32, and rounds.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one layer's attention was given."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A rotary module, measured: it returns cos and sin of position * frequency, laid out as `layout` says."""

    module: nn.Module
    gain: float
    layout: str

    def rotary(self, pairs: Pairs) -> Rotary:
        """The rotation by this table; frequencies are copied, as the module may change its own."""
        return Rotary(self.frequencies.detach().clone().double(), pairs, self.gain)

    @property
    def frequencies(self) -> Tensor:
        """(R / 2,) of the module."""
        return _frequencies(self.module)

    def waves(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the module means to return, (B, N, R) or (B, N, R / 2), from phases in fp64."""
        halves = self.rotary("halves").waves(x, positions, self.gain)
        cos, sin = (laid_out(part, self.layout).to(x.dtype) for part in halves)
        return cos, sin


def laid_out(part: Tensor, layout: str) -> Tensor:
    """A wave for each pair of features as a wave for each feature."""
    if layout == "halves":
        return torch.cat([part, part], dim=-1)
    return part.repeat_interleave(2, dim=-1) if layout == "neighbours" else part


def tables_of(model: nn.Module) -> list[Table]:
    """The rotary modules of a model, each measured; UnsupportedError where one depends on the length."""
    return [_table(module) for module in model.modules() if _is_table(module)]


def _is_table(module: nn.Module) -> bool:
    found = dict(module.named_buffers(recurse=False)).get("inv_freq")
    return found is not None and found.dim() == 1


def _frequencies(module: nn.Module) -> Tensor:
    found: Tensor = module.get_buffer("inv_freq")
    return found


def _table(module: nn.Module) -> Table:
    name = type(module).__name__
    before = _frequencies(module).clone()
    x = torch.zeros(1, 1, 1, device=before.device, dtype=torch.float32)
    with Blame(f"asking {name} for cos and sin", "use StreamingCache directly", UnsupportedError):
        cos, sin = module(x, _row(FAR, x))
        ahead = module(x, _row((0, 10**6), x))[0][0, 0]
        after = _frequencies(module).clone()
        module(x, _row(NEAR, x))
        gain = float(module(x, _row((0,), x))[0].flatten()[0])
    if not torch.equal(before, after) or not torch.equal(ahead, torch.full_like(ahead, gain)):
        raise UnsupportedError(
            f"the frequencies of {name} depend on the length (as in dynamic NTK and LongRoPE), but a stream turns "
            "each key once; wanted rotary positions by one table: plain, linear, Llama 3, YaRN"
        )
    for layout in ("halves", "neighbours", "pairs"):
        table = Table(module, gain, layout)
        mine = table.waves(x, _row(FAR, x))
        if all(_same(a, b) for a, b in zip(mine, (cos, sin), strict=True)):
            return table
    raise UnsupportedError(
        f"{name} returns something else than cos and sin of position * inv_freq; use StreamingCache directly"
    )


def _row(positions: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor([positions], device=like.device)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    gap = (a.double() - b.double()).norm()
    return bool(gap <= TOLERANCE[a.dtype] * b.double().norm())


def far_positions(most: int) -> tuple[int, ...]:
    """FAR, as far as a model of `most` positions goes: a table of learned ones must not be left to find that out."""
    return tuple(min(position, most - 1) for position in FAR)


def turns(near: list[Seen], far: list[Seen], by: Tensor, tables: list[Table]) -> list[Rotary | None]:
    """How each layer turns queries and keys when positions grow `by` (1, N): by a table, or not at all (None).

    UnsupportedError for the first layer that does otherwise.
    """
    return [
        _turn(n, before, after, by, tables) for n, (before, after) in enumerate(zip(near, far, strict=True))
    ]


def _turn(layer: int, before: Seen, after: Seen, by: Tensor, tables: list[Table]) -> Rotary | None:
    if not _same(after.v, before.v):
        raise UnsupportedError(
            f"the values of layer {layer} depend on the position (learned or added positions); wanted a model "
            "whose positions are rotations of queries and keys, or none"
        )
    if _same(after.q, before.q) and _same(after.k, before.k):
        return None
    for rotary in _candidates(tables, after.q.shape[-1]):
        if _same(rotary.moved(before.q, by), after.q) and _same(rotary.moved(before.k, by), after.k):
            return rotary
    raise UnsupportedError(
        f"layer {layer} uses positions otherwise than by turning the first features of queries and keys by one of "
        f"its {len(tables)} rotary tables; use StreamingCache directly, with positions of your own"
    )


def _candidates(tables: list[Table], d: int) -> Iterator[Rotary]:
    both: tuple[Pairs, ...] = ("halves", "neighbours")
    for table, pairs in product(tables, both):
        if 2 * len(table.frequencies) <= d:
            yield table.rotary(pairs)
