"""What a contributor implements: a Rule reads a graph into a Site, a Kernel computes a spec. Protocols and data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from attnopt.spec import AttentionSpec

if TYPE_CHECKING:
    from torch.fx import Node

    from attnopt.shadow import Shadow


class Reject(Exception):  # noqa: N818 - a verdict, not an error: it never reaches the user as an exception
    """Raised while reading: this is not the attention the rule reads. Carries the reason and the node that stopped it.

    depth: how many facts had been established before; the report names the rule that got furthest. inside: nodes that
    belong to what was read, so that none of them is reported as an attention of its own.
    """

    def __init__(
        self, reason: str, node: "Node | None" = None, depth: int = 0, inside: "frozenset[Node]" = frozenset()
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.depth = depth
        self.inside = inside


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape, dtype and device of an operand in its canonical layout; sizes are ints (hints where symbolic)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class SiteMeta:
    """What a kernel may know of a site when it decides whether to serve it."""

    spec: AttentionSpec
    operands: Mapping[str, TensorMeta]
    gradient: bool = False  # whether autograd will go through the site
    otherwise: "tuple[SiteMeta, ...]" = ()  # the same site with less proven of its mask and more read from tensors
    library: bool = (
        False  # whether the graph calls scaled_dot_product_attention: its gradients are that call's
    )
    streamed: "SiteMeta | str" = (
        ""  # the site as streaming attention where that was asked for, or why it is not
    )

    @property
    def device(self) -> torch.device:
        """Where q lives; operands on several devices are refused before a kernel is asked."""
        return self.operands["q"].device

    @property
    def sizes(self) -> "Sizes":
        """B, H, Hkv, Sq, Sk, D, Dv of the site."""
        q, k, v = (self.operands[name].shape for name in "qkv")
        return Sizes(q[0], q[1], k[1], q[2], k[2], q[3], v[3])


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dimensions of a site, in the glossary's letters."""

    batch: int
    heads: int
    kv_heads: int
    sq: int
    sk: int
    d: int
    dv: int


@dataclass(frozen=True, slots=True)
class Cost:
    """A kernel's own estimate for one site.

    bytes: device memory moved; flops: multiply-adds times two; efficiency: share of the device's peak it reaches.
    """

    bytes: float
    flops: float
    efficiency: float = 0.5

    #: FLOPs that a device does in the time of moving one byte; only the order of magnitude matters for choosing.
    INTENSITY = 50.0

    @property
    def effort(self) -> float:
        """Comparable between kernels on one device: the larger of arithmetic and traffic, in FLOP equivalents."""
        return max(self.flops, self.bytes * Cost.INTENSITY) / self.efficiency


@runtime_checkable
class Kernel(Protocol):
    """Computes specs of one family. Stateless: everything it needs comes as arguments."""

    name: str
    family: Literal["softmax", "linear"]
    exact: bool  # False: an approximation, chosen only when the user names it
    reads: frozenset[str]  # spec fields honoured; any other that is not plain refuses the site

    def refuse(self, site: SiteMeta) -> str | None:
        """Why this kernel cannot serve the site (shapes, dtype, device, gradient), or None if it can."""

    def cost(self, site: SiteMeta) -> Cost:
        """Estimate used to choose between kernels that can serve the site."""

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """The output (B, H, Sq, Dv) in q's dtype. Traced under fake tensors: no data-dependent Python.

        operands: exactly `spec.operand_names()`, canonical layouts as AttentionSpec states. With `spec.final_state`
        it returns the output and the last state (B, H, D, Dv), in at least fp32.
        """


@dataclass(frozen=True, slots=True)
class Site:
    """One attention site, read completely. Immutable; nodes are nodes of the shadow graph."""

    rule: str
    root: "Node"  # the node whose value the kernel call replaces
    spec: AttentionSpec
    operands: "Mapping[str, object]"  # name -> passes.layout.Operand: how to get each canonical operand
    result: object  # passes.layout.Layout of the root: how the canonical output becomes the root's value
    interior: "frozenset[Node]" = field(default_factory=frozenset)  # nodes that the call makes unnecessary
    otherwise: "tuple[Site, ...]" = ()  # the same site with less proven of its mask and more read from tensors
    unshifted: bool = (
        False  # the graph takes exp of logits of any size, and overflows where the call does not
    )
    forward_only: str = ""  # why a call would have other gradients than the graph, where it would
    remark: str = ""  # what the report says of it, where something could not be seen
    needless: str = ""  # why a call would save nothing, where something else needs the inner values anyway
    body: "tuple[Node, ...]" = ()  # what computes the root, in order, where walking up from it would not tell
    state: "tuple[Node, object] | None" = None  # the node that is the last state, and its passes.site.Result
    assumed: "Mapping[Node, Assumed]" = field(
        default_factory=dict
    )  # inputs whose values were read, not proven
    trial: "Callable[[int], tuple[Mapping[Node, Tensor], tuple[Tensor, ...]]] | None" = (
        None  # where a check cannot
    )
    # draw values itself: from a seed those of the leaves, and what the graph makes of them (root, state), in fp64


class Assumed(Protocol):
    """What an input of the graph holds, as a function of another input; checked whenever the graph runs."""

    @property
    def base(self) -> "Node":
        """The other input."""

    def holds(self, value: Tensor, base: Tensor) -> bool:
        """Whether it still does, but for rounding."""


class Rule(Protocol):
    """Reads one family of spellings."""

    name: str
    anchors: frozenset[object]  # OpOverloads at which reading starts

    def read(self, anchor: "Node", shadow: "Shadow") -> Site:
        """The site at this anchor, or raise Reject with the reason and the node."""
