"""`attnopt.rewrite` for exported programs, and `attnopt.explain` for anything that torch.compile can capture."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputSpec
from torch.fx import GraphModule, Node

from attnopt.approximation import measure
from attnopt.backend import PROVEN, check_strict, keep, rewrite_graph
from attnopt.breaks import Listener
from attnopt.buffers import HELD, offer, offer_noted
from attnopt.errors import UnsupportedError
from attnopt.guards import Noting
from attnopt.options import Options
from attnopt.report import Report, merge
from attnopt.report_text import count, summary
from attnopt.shadow import CONSTANT

Settings = Mapping[str, object] | Options | None


def rewrite(program: ExportedProgram, options: Settings = None) -> tuple[ExportedProgram, Report]:
    """The program with its attention replaced, and the report; `program` itself is not changed.

    program: as torch.export.export makes it. options: see `attnopt.Options`. The result saves and loads with
    torch.export (after `import attnopt`, which registers the kernels' operators).

    Raises OptionError, UnsupportedError if `program` is something else, StrictError with `strict=True`. If attnopt
    itself fails, the program comes back as it was, with one warning that the report repeats.
    """
    chosen = Options.parse(options)
    if not isinstance(program, ExportedProgram):
        raise UnsupportedError(
            f"rewrite() got a {type(program).__name__}; wanted a torch.export.ExportedProgram "
            "(torch.export.export(model, args)), or use torch.compile(model, backend='attnopt')"
        )
    module = _copied(program.graph_module)
    _mark_constants(module, program)
    with torch.no_grad():  # a buffer that the model writes to is noted with the gradient that it got
        plain, edits = rewrite_graph(module, chosen, gradient=False)
    outermost = [
        edit for edit in edits if edit.shadow.original is module
    ]  # those whose inputs are the program's
    report = measure(plain, outermost, program)
    keep(report)
    if chosen.strict:
        check_strict(report)
    signature = _renamed(program.graph_signature, module)
    return program._update(module, signature), report


def _copied(module: GraphModule) -> GraphModule:
    """A deep copy with the names of the original; copying by itself renames what is called `input`."""
    copied = copy.deepcopy(module)
    for old, new in zip(module.graph.nodes, copied.graph.nodes, strict=True):
        new.name = old.name
    return copied


def _mark_constants(module: GraphModule, program: ExportedProgram) -> None:
    """Export lifts literals such as `torch.tensor(8.0)` to inputs; readers may look at their values."""
    signature = program.graph_signature
    lifted = signature.inputs_to_lifted_tensor_constants
    held = {*lifted, *signature.inputs_to_parameters, *signature.inputs_to_buffers}
    for node in module.graph.nodes:
        if node.op == "placeholder" and node.name in held:
            node.meta[HELD] = program.constants.get(signature.inputs_to_buffers.get(node.name, ""), True)
        if node.op == "placeholder" and node.name in lifted:
            node.meta[CONSTANT] = program.constants[lifted[node.name]]


def _renamed(signature: ExportGraphSignature, module: GraphModule) -> ExportGraphSignature:
    """The signature with the names that the outputs now have."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    specs = [_named(spec, value) for spec, value in zip(signature.output_specs, output.args[0], strict=True)]
    return ExportGraphSignature(input_specs=list(signature.input_specs), output_specs=specs)


def _named(spec: OutputSpec, value: Any) -> OutputSpec:
    if not isinstance(value, Node) or not hasattr(spec.arg, "name") or spec.arg.name == value.name:
        return spec
    return replace(spec, arg=replace(spec.arg, name=value.name))


def explain(model: Callable[..., Any], *args: Any, options: Settings = None, **kwargs: Any) -> Report:
    """What attnopt would do to `model` on these inputs; the model runs once, as it is, and nothing is changed.

    model: a module or function that torch.compile takes. args, kwargs: its inputs. Printing the report gives a table.

    Raises OptionError, StrictError with `strict=True`, and whatever the model itself raises.
    """
    chosen = Options.parse(options)
    found: list[Report] = []

    def look(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        offer(module, inputs)
        offer_noted(module, inputs)
        copied = copy.deepcopy(module)
        found.append(rewrite_graph(copied, chosen, gradient=torch.is_grad_enabled())[0])
        return Noting(module.forward, copied.meta.get(PROVEN) or {})

    torch._dynamo.reset()  # forgets the earlier breaks too
    listener = Listener()
    with _Noted(found):
        torch.compile(model, backend=look)(*args, **kwargs)
    report = replace(merge(found), graph_breaks=listener.heard())
    if chosen.strict:
        check_strict(report)
    return report


class _Noted:
    """A block that runs the user's model: what it raises gets a note of what had been seen until then."""

    def __init__(self, found: list[Report]) -> None:
        self.found = found

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            seen = f"{count(len(self.found), 'graph')}: {summary(merge(self.found))}"
            error.add_note(f"attnopt was explaining this model; until then it had seen {seen}")
