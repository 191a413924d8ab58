"""A language model as it would decode: each causal attention of one forward replaced by another way to attend.

Teacher-forced, every query of a text is a decoding step over the keys before it, so one forward measures a text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.nn import functional

from attnopt import verify
from attnopt.errors import Blame, SourceError
from attnopt.kernels.sdpa.kernel import KERNEL as EXACT
from attnopt.kernels.sparq.rows import sparq_rows
from attnopt.mask import And, Causal, KeyPadding, Mask
from attnopt.passes import emit
from attnopt.passes.cached import writers
from attnopt.reading import read
from attnopt.registry import expansions, rules
from attnopt.rule import Site, SiteMeta
from attnopt.shadow import Shadow, trace
from attnopt.spec import AttentionSpec, Sparse, unread_fields

#: How one site attends: from its spec and its canonical operands.
Attend = Callable[[AttentionSpec, Mapping[str, Tensor]], Tensor]

#: What a decoding step can honour of a spec.
READS = frozenset({"scale", "heads", "mask", "empty_row"})


def exactly(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    """The attention as it is."""
    return EXACT.run(spec, operands)


def by_sparq(sparse: Sparse, first: int) -> Attend:
    """SparQ for each query from `first` on; before, exact attention to the prompt."""
    return partial(_by_sparq, sparse, first)


def _by_sparq(sparse: Sparse, first: int, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    q, k, v = (operands[name] for name in "qkv")
    padding = next((operands[name] for name in spec.mask.operand_names()), None)
    return sparq_rows(
        q, k, v, rank=sparse.rank, topk=sparse.topk, local=sparse.local, first=first, scale=spec.scale,
        key_padding=padding,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """A model read once, for texts of one length: token ids (1, N) to logits (1, N, vocabulary).

    sites: the causal attentions, by the node that each replaces. others: how many attentions stay as they are.
    """

    program: ExportedProgram
    shadow: Shadow
    sites: Mapping[Node, Site]
    others: int
    steps: Sequence[Node]
    result: Node

    @staticmethod
    def of(model: nn.Module, ids: Tensor) -> "Reader":
        """Exports the model at this length and reads its attentions; SourceError if it has none that is causal."""
        with (
            torch.no_grad(),
            Blame("torch.export of the model on the text's tokens", "-v shows all that torch says"),
        ):
            program = torch.export.export(model, (ids,))
        shadow = trace(program.graph_module, expansions())
        done: verify.Checks = {}
        found = [each.site for each in read(shadow, rules()) if each.site is not None]
        softmax = [site for site in found if site.spec.family == "softmax"]
        mine = {
            site.root: site
            for site in softmax
            if _decodes(site) and verify.validate(shadow, site, done).agrees
        }
        if not mine:
            raise SourceError(
                "no causal softmax attention of the model was read and checked; `attnopt explain` says what was found"
            )
        result = _result(program, shadow)
        return Reader(program, shadow, mine, len(found) - len(mine), _needed(shadow, result, mine), result)

    @property
    def shapes(self) -> tuple[SiteMeta, ...]:
        """What a kernel would know of the sites."""
        from attnopt.pipeline import describe

        return tuple(describe(site, gradient=False) for site in self.sites.values())

    def logits(self, ids: Tensor, attend: Attend) -> Tensor:
        """(1, N, vocabulary) for ids (1, N) of the length that was read; `attend` in the place of each site."""
        values = dict(
            zip(_inputs(self.shadow), self.program._graph_module_flat_inputs((ids,), {}), strict=True)
        )
        spent = _spent(self.steps, self.sites, self.result)
        with torch.no_grad():
            for node in self.steps:
                values[node] = self._value(node, values, attend)
                for done in spent.get(node, ()):
                    del values[done]
        return _logits(values[self.result])

    def _value(self, node: Node, values: Mapping[Node, Any], attend: Attend) -> Any:
        site = self.sites.get(node)
        if site is not None:
            return emit.call(site, site.spec, attend, [values[leaf] for leaf in emit.leaves(site)])
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            return _attribute(self.shadow.module, str(node.target))
        target: Any = node.target
        return target(*args, **kwargs)


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _decodes(site: Site) -> bool:
    """Whether each query is one decoding step: plainly causal self-attention, but for padding."""
    spec, roles = site.spec, emit.result_of(site).roles
    same = [a.size for a in roles.query] == [a.size for a in roles.key]
    return len(roles.query) == 1 and same and not unread_fields(spec, READS) and _is_causal(spec.mask, site)


def _is_causal(mask: Mask, site: Site) -> bool:
    parts = mask.parts if isinstance(mask, And) else (mask,)
    (length,) = (int(a.size) for a in emit.result_of(site).roles.query)
    causal = [part for part in parts if isinstance(part, Causal)]
    rest = [part for part in parts if not isinstance(part, Causal | KeyPadding)]
    return len(causal) == 1 and not rest and len(parts) <= 2 and causal[0].offset.at(length, length) == 0


def _inputs(shadow: Shadow) -> list[Node]:
    return [node for node in shadow.module.graph.nodes if node.op == "placeholder"]


def _result(program: ExportedProgram, shadow: Shadow) -> Node:
    """The first value that the program returns; an exported graph returns changed buffers before it."""
    specs = program.graph_signature.output_specs
    place = next(n for n, spec in enumerate(specs) if spec.kind is OutputKind.USER_OUTPUT)
    (output,) = (node for node in program.graph_module.graph.nodes if node.op == "output")
    made: Any = shadow.outputs[output.args[0][place]]
    if not isinstance(made, Node):
        raise SourceError(
            "the model returns something else than logits first; wanted (batch, tokens, vocabulary)"
        )
    return made


def _needed(shadow: Shadow, result: Node, sites: Mapping[Node, Site]) -> list[Node]:
    """The nodes that the result needs, in order, when the sites are given their operands and computed otherwise."""
    pending, seen = [result], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        site = sites.get(node)
        pending += node.all_input_nodes if site is None else emit.leaves(site)
        pending += list(writers(node))
    return [node for node in shadow.module.graph.nodes if node in seen and node.op != "placeholder"]


def _spent(steps: Sequence[Node], sites: Mapping[Node, Site], result: Node) -> dict[Node, list[Node]]:
    """The values that nobody reads after a step, by step."""
    last: dict[Node, Node] = {}
    for node in steps:
        site = sites.get(node)
        last[node] = node
        last |= dict.fromkeys(node.all_input_nodes if site is None else emit.leaves(site), node)
    spent: dict[Node, list[Node]] = {}
    for node, user in last.items():
        if node is not result:
            spent.setdefault(user, []).append(node)
    return spent


def _logits(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 3:
        return value
    raise SourceError(
        f"the model returns {getattr(value, 'shape', type(value).__name__)}; wanted logits (batch, tokens, vocabulary)"
    )


def perplexity(logits: Tensor, ids: Tensor, first: int) -> float:
    """exp of the mean loss of the tokens from `first` on; logits (1, N, V), ids (1, N)."""
    wanted, said = ids[0, first:], logits[0, first - 1 : -1]
    return math.exp(float(functional.cross_entropy(said.float(), wanted.to(said.device))))
