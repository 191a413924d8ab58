"""Equal sites together: thirty layers are one line with one path."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from attnopt.report import SiteReport

_NUMBERED = re.compile(r"(?<=[A-Za-z])_\d+\b")
_NODE = re.compile(
    r"^%?(?P<name>\w+).*?target=(?P<target>[\w.]+)\]\(args = \((?P<args>.*?),?\), kwargs = ", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Group:
    """Sites that differ only in where in the model they sit."""

    first: SiteReport
    sites: tuple[SiteReport, ...]

    @property
    def modules(self) -> str:
        """The module paths in one expression: `layers.{0-29}.attn`."""
        return fold_paths([site.module for site in self.sites])

    @property
    def error(self) -> float | None:
        """The worst error of the checks, or None if some site was not checked."""
        return worst(site.error for site in self.sites)

    @property
    def approximation_error(self) -> float | None:
        """The worst measured distance of the approximation from the original."""
        return worst(site.approximation_error for site in self.sites)

    @property
    def node(self) -> str:
        """The node that stopped the reading, short: `sin_3 = aten.sin.default(matmul_5)`."""
        return short_node(self.first.node)


def group(sites: Iterable[SiteReport]) -> list[Group]:
    """Equal sites together, in the order in which each kind first appears."""
    found: dict[SiteReport, list[SiteReport]] = {}
    for site in sites:
        found.setdefault(_alike(site), []).append(site)
    return [Group(members[0], tuple(members)) for members in found.values()]


def _alike(site: SiteReport) -> SiteReport:
    """The site without what tells equal sites apart: its place, its numbers, and the numbering of its nodes."""
    return replace(
        site, module="", node="", origin=0, error=None, approximation_error=None, reason=_NUMBERED.sub("", site.reason)
    )  # fmt: skip


def short_node(text: str) -> str:
    """A node as FX prints it, without the ceremony."""
    found = _NODE.match(text)
    if found is None:
        return text
    target = found["target"].removeprefix("torch.ops.")
    return f"{found['name']} = {target}({found['args'].replace('%', '')})"


def fold_paths(paths: Sequence[str]) -> str:
    """Paths that differ in numbers as one: `a.0.b`, `a.1.b` give `a.{0-1}.b`; of more than two kinds, the ends."""
    distinct = list(dict.fromkeys(path for path in paths if path))
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for path in distinct:
        parts = re.split(r"(\d+)", path)
        kinds.setdefault(tuple(parts[::2]), []).append(parts)
    folded = [_folded(split) for split in kinds.values()]
    if len(folded) > 2 or not all(folded):
        return f"{distinct[0]} ... {distinct[-1]}"
    return ", ".join(folded)


def _folded(split: Sequence[Sequence[str]]) -> str:
    """Paths of one kind as one, if every combination of their numbers is there; else nothing."""
    choices = [sorted({*parts}, key=lambda x: (len(x), x)) for parts in zip(*split, strict=True)]
    if math.prod(map(len, choices)) != len(split):
        return ""
    return "".join(c[0] if len(c) == 1 else f"{{{fold_numbers([*map(int, c)])}}}" for c in choices)


def fold_numbers(numbers: Sequence[int]) -> str:
    """`0-5` for 0..5, `0,2..10` for even steps, else all of them."""
    steps = {b - a for a, b in pairwise(numbers)}
    if steps == {1}:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(steps) == 1 and len(numbers) > 2:
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}"
    return ",".join(map(str, numbers))


def worst(errors: Iterable[float | None]) -> float | None:
    """The largest; None if there is none or one is unknown; NaN if one is NaN."""
    values = list(errors)
    known = [error for error in values if error is not None]
    if not known or len(known) != len(values):
        return None
    return math.nan if any(map(math.isnan, known)) else max(known)
