"""Graph breaks as a person reads them: the user's line, what Dynamo could not follow, and its first hint.

An attention is found only where its products, its softmax and its mask are in one graph, so a break is worth a line.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

_TORCH = str(Path(torch.__file__).parent)
_HINT = re.compile(r"^\s*Hint: (.+)$", re.MULTILINE)
_FRAME = re.compile(r"frame skipped: (?P<name>\S+) \((?P<file>.+) line (?P<line>\d+)\)")
_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_\d+$")
_PHRASES = (
    (re.compile(r"^generic_jump \S*Tensor"), "the code branches on the value of a tensor"),
    (re.compile(r"^generic_jump"), "the code branches on a value that is not known while compiling"),
    (re.compile(r"^step_unsupported"), "Dynamo does not support a step of this line"),
)
#: What Dynamo says of every break, whatever it is.
_EMPTY = re.compile(r"(?i)please report an issue|it may be possible to write dynamo tracing rules")


def of_graph(module: GraphModule) -> tuple[str, ...]:
    """The break that ended a Dynamo graph, if it was one."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return (told(reason),) if reason is not None and reason.graph_break else ()


class Listener:
    """Notes how many breaks there were, to tell later which are new."""

    def __init__(self) -> None:
        self.reasons = len(_reasons())
        self.counted = {name: _counted(name) for name in ("graph_break", "unimplemented")}

    def heard(self) -> tuple[str, ...]:
        """The breaks since then, each once, in order; then functions that Dynamo gave up, and what it only counted."""
        found = _reasons()[self.reasons :]
        known = {str(reason.reason).strip() for reason in found}
        counted = (summary(text) for text in self._new("graph_break") if text.strip() not in known)
        skipped = filter(None, map(_skipped, self._new("unimplemented")))
        return tuple(dict.fromkeys((*map(told, found), *skipped, *counted)))

    def _new(self, name: str) -> list[str]:
        return [text for text, n in _counted(name).items() if n > self.counted[name].get(text, 0)]


def told(reason: Any) -> str:
    """One break in one line: `model.py:31: if x.sum() > 0: -> the code branches on the value of a tensor`."""
    frames = list(reason.user_stack)
    if not frames:
        return summary(str(reason.reason))
    # The user's own line, also where the break lies inside torch.
    frame = next((f for f in reversed(frames) if not f.filename.startswith(_TORCH)), frames[-1])
    line = f" {' '.join(frame.line.split())} ->" if frame.line else ""
    return f"{Path(frame.filename).name}:{frame.lineno}:{line} {summary(str(reason.reason))}"


def summary(text: str) -> str:
    """The first line of what Dynamo says, in plain words, with its first hint that is one."""
    lines = text.strip().splitlines()
    first = lines[0].strip() if lines else "Dynamo gave no reason"
    first = next((plain for pattern, plain in _PHRASES if pattern.match(first)), first)
    hints = (hint for hint in _HINT.findall(text) if not _EMPTY.search(hint))
    hint = next(hints, "").strip().rstrip(".")
    return f"{first} ({hint})" if hint else first


def _skipped(text: str) -> str:
    """A function that runs in Python from its first line to its last, because of a break inside a loop."""
    frame = _FRAME.search(text)
    if frame is None:
        return ""
    place = f"{Path(frame['file']).name}:{frame['line']}"
    name = _RESUMED.sub(r"\1", frame["name"])
    return f"{place}: all of {name}() runs outside of any graph, for a break in its loop -> {summary(text)}"


def _reasons() -> list[Any]:
    from torch._dynamo import output_graph

    return list(vars(output_graph)["graph_break_reasons"])


def _counted(name: str) -> dict[str, int]:
    from torch._dynamo.utils import counters

    return dict(counters[name])
