"""Tables of powers of a decay that come into a graph as buffers, such as exp(-slope * (i - j)): read from their values.

A buffer is an input of the graph: nothing in the graph says what it holds. What it holds while the graph is compiled
suggests a formula, table[p] = exp(base * (a . p + c)); `holds` compares the buffers with it whenever the compiled graph
runs, and where they differ the graph as it was answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from attnopt.passes.sizes import hint
from attnopt.shadow import Shadow

#: Roundings that a table's entries may be off by.
ROUNDINGS = 8
#: Smaller entries say nothing about an exponent.
SMALLEST = 1e-30
#: Entries that a formula is fitted to.
SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Table:
    """node[p] = exp(base * (slope . p + start)), base broadcast; 0 where `cut` and the exponent has the wrong sign.

    slopes: whole numbers, one a dimension of the node. sign: that of base * exponent where it decays.
    """

    node: Node
    base: Node
    slopes: tuple[int, ...]
    start: int
    sign: int
    cut: bool

    def formula(self, shape: Sequence[int], base: Tensor) -> Tensor:
        """What the table should hold, in base's dtype."""
        exponent = _affine(shape, self.slopes, self.start, base.device)
        wide = base.double() * exponent
        kept = wide.exp()
        return torch.where(self.sign * exponent < 0, 0.0, kept) if self.cut else kept

    def holds(self, table: Tensor, base: Tensor) -> bool:
        """Whether the table holds that, but for rounding."""
        wanted = self.formula(table.shape, base.detach())
        bound = ROUNDINGS * max(torch.finfo(table.dtype).eps, torch.finfo(base.dtype).eps)
        return bool(((table.detach().double() - wanted).abs() <= bound).all())


def tables_of(shadow: Shadow, leaves: Sequence[Node]) -> Iterator[Table]:
    """The leaves that hold powers of another input of the graph."""
    held = [(leaf, value) for leaf in leaves if (value := real_value(shadow, leaf)) is not None]
    if not held:
        return
    inputs = [n for n in shadow.nodes if n.op == "placeholder" and n not in leaves]
    beside = [(node, value) for node in inputs if (value := real_value(shadow, node)) is not None]
    bases = [(node, value) for node, value in (*held, *beside) if _is_base(value)]
    for leaf, value in held:
        if _is_base(value):
            continue
        table = next((t for base, b in bases if base is not leaf for t in _read(leaf, value, base, b)), None)
        if table is not None:
            yield table


def real_value(shadow: Shadow, node: Node) -> Tensor | None:
    """What a buffer holds while the graph is compiled; None for anything else, and where Dynamo does not tell."""
    original = shadow.value_of.get(node)
    if node.op != "placeholder" or original is None:
        return None
    value = getattr(original.meta.get("grapharg"), "example", None)
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor | torch.nn.Parameter):
        return None
    fits = value.is_floating_point() and not value.requires_grad and not value.is_meta
    return value.detach().cpu() if fits else None


def _is_base(value: Tensor) -> bool:
    """One number, or one a head: positive slopes, or negative logarithms."""
    longest = max((*value.shape, 1))
    one_sided = bool((value > 0).all()) or bool((value < 0).all())
    return value.numel() == longest and bool(value.isfinite().all()) and one_sided


def _read(node: Node, table: Tensor, base_node: Node, base: Tensor) -> Iterator[Table]:
    """The formula that the values suggest, if there is one."""
    try:
        wide = base.double().expand(torch.broadcast_shapes(table.shape, base.shape))
    except RuntimeError:
        return
    if wide.shape != table.shape or table.numel() <= base.numel() or bool((table < 0).any()):
        return
    fitted = _fit(table, wide, _some((table > SMALLEST).nonzero()))
    if fitted is None:
        return
    slopes, start = fitted
    sign = -1 if bool((base > 0).all()) else 1
    for cut in (False, True):
        found = Table(node, base_node, slopes, start, sign, cut)
        if found.holds(table, base):
            yield found
            return


def _some(places: Tensor) -> Tensor:
    """Enough of them to suggest a formula, which is then compared with all."""
    if len(places) <= SAMPLE:
        return places
    return places[torch.randint(len(places), (SAMPLE,), generator=torch.Generator().manual_seed(0))]


def _fit(table: Tensor, base: Tensor, seen: Tensor) -> tuple[tuple[int, ...], int] | None:
    """Whole slopes and start of an affine function through the exponents at the places `seen`."""
    if len(seen) < 1:
        return None
    # Rounding of an entry moves its exponent the least where the base is large and the entry is not small.
    places = torch.cat([seen.double(), torch.ones(len(seen), 1, dtype=torch.float64)], 1)
    weights = table[tuple(seen.T)].double()
    values = weights.log() / base[tuple(seen.T)]
    solved = torch.linalg.lstsq(
        places * weights[:, None], (values * weights)[:, None], driver="gelsd"
    ).solution[:, 0]
    if not bool(solved.isfinite().all()):
        return None
    whole = [round(float(x)) for x in solved]
    varies = [bool(seen[:, d].max() > seen[:, d].min()) for d in range(seen.shape[1])]
    return tuple(n if v else 0 for n, v in zip(whole[:-1], varies, strict=True)), whole[-1]


def _affine(shape: Sequence[int], slopes: Sequence[int], start: int, device: torch.device) -> Tensor:
    total = torch.full([hint(s) for s in shape], float(start), dtype=torch.float64, device=device)
    for d, slope in enumerate(slopes):
        if slope:
            place = torch.arange(total.shape[d], dtype=torch.float64, device=device)
            total = total + slope * place.view([-1 if n == d else 1 for n in range(total.dim())])
    return total
