"""Runs a Dynamo graph so that it can be traced: with its autocast regions in force, through bodies and torch.vmap."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Interpreter, Node

from attnopt.shadow_bodies import body_of, operands, region
from attnopt.shadow_vmap import Region as Vmapped

#: Operator -> whether it may be spelled out with these arguments, and how.
Expansions = Mapping[Any, tuple[Callable[..., bool], Callable[..., Any]]]

#: The arguments of an autocast region, and the region.
Region = tuple[tuple[Any, ...], torch.amp.autocast_mode.autocast]


class Runner(Interpreter):
    """Runs a graph with its autocast regions in force, through the bodies of higher-order operators.

    regions: those in force, each with its arguments; shared with the bodies. vmapped: regions under torch.vmap, which
    are run as the plain operators that they come down to.
    """

    def __init__(
        self,
        module: GraphModule,
        expansions: Expansions,
        regions: list[Region],
        vmapped: Mapping[Node, Vmapped],
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.expansions = expansions
        self.regions = regions
        self.vmapped = vmapped
        self.hidden: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        if n in self.vmapped:
            block = self.vmapped[n]
            made = block.run([self.env[given] for given in block.given])
            self.hidden |= {node: made.get(node) for node in block.nodes}
        if n in self.hidden:
            return self.hidden[n]
        held = _held(n)
        return super().run_node(n) if held is None else held

    def enter(self, args: tuple[Any, ...]) -> Any:
        """Begins a region: the tracer would only note the call, and values would not have their true dtypes."""
        opened = torch.amp.autocast_mode.autocast(*args)
        opened.__enter__()
        self.regions.append((args, opened))
        return opened

    def leave(self, depth: int) -> None:
        """Ends the innermost regions, until so many are left."""
        while len(self.regions) > depth:
            self.regions.pop()[1].__exit__(None, None, None)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:
            return self.enter(args)
        if target is torch.amp.autocast_mode._exit_autocast:
            return self.leave(len(self.regions) - 1)
        place = body_of(args) if isinstance(target, HigherOrderOperator) else None
        if place is not None:
            return self._run_body(args[place], operands(args[place + 1 :]), region(target, args))
        allowed, expansion = self.expansions.get(target, (None, None))
        if allowed is not None and expansion is not None and allowed(*args, **kwargs):
            return expansion(*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def _run_body(self, body: GraphModule, args: list[Any], own: tuple[Any, ...] | None) -> Any:
        depth = len(self.regions)
        if own is not None:
            self.enter(own)
        value = Runner(body, self.expansions, self.regions, self.vmapped).run(*args)
        self.leave(depth)
        return value


def _held(n: Node) -> FakeTensor | None:
    """The fake value of a real tensor that a graph of Dynamo holds itself, as the state of an optimizer.

    Traced with the tensor itself, a write to it would be a write. Its numbers are no constants either.
    """
    fake = n.meta.get("example_value") if n.op == "get_attr" else None
    return fake if isinstance(fake, FakeTensor) else None
