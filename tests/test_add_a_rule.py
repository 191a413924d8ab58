"""How to add a rule, from beginning to end: one file, no list to edit.

The file reads a softmax that is written by hand, exp(s - max) / sum, which attnopt does not know by itself. It lies in
a folder of its own that becomes part of `attnopt.passes`, as a contributor's file would.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

import attnopt.passes
from attnopt.registry import rules

THE_FILE = '''
"""Reads exp(s - max(s)) / sum(exp(s - max(s))), the softmax by hand, and the product with the values after it."""

import torch
from torch.fx import Node

from attnopt.passes.layout import Space, input_node
from attnopt.passes.scores import ScoreReader
from attnopt.passes.sizes import shape_of
from attnopt.passes.softmax import Frame, build, pair
from attnopt.passes.terms import Scores
from attnopt.passes.weights import read_weights
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten


class HandSoftmaxRule:
    """Softmax attention whose softmax is spelled exp(s - max) / sum."""

    name = "hand-softmax"
    anchors = frozenset({aten.div.Tensor})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site around one division. Raises Reject."""
        scores, inner = hand_softmax(anchor)
        space = Space()
        dims = tuple(space.fresh(size) for size in shape_of(anchor))
        weights = read_weights(space, shadow, anchor, dims, dims[-1])
        logits = ScoreReader(space, OneReader(shadow, inner)).read(scores, dims, Scores())
        parts = pair(space, logits, weights.value, weights.value_dims, dims[-1])
        interior = frozenset((*logits.path, *weights.path, *inner))
        frame = Frame(self.name, weights.form.node, weights.out_dims, dims, dims[-1], interior)
        return build(space, shadow, parts, frame, safe=False)


def hand_softmax(division: Node) -> tuple[Node, list[Node]]:
    """The scores s, and the nodes between; Reject unless it is exp(s - amax(s)) / sum of the same, by rows."""
    top, bottom = division.args
    own_sum = isinstance(bottom, Node) and bottom.target == aten.sum.dim_IntList
    if not own_sum or bottom.args[:3] != (top, [-1], True):
        raise Reject("not a division by its own sum", division, depth=-1)
    shifted = need(top, aten.exp.default)
    need(shifted, aten.sub.Tensor)
    scores, largest = shifted.args
    if need(largest, aten.amax.default).args != (scores, [-1], True):
        raise Reject("what is subtracted is not the maximum of the row", largest)
    return scores, [division, bottom, top, shifted, largest]


def need(node: Node, target: object) -> Node:
    """The input of a node that must be a call of `target`; for others than exp, the node itself."""
    if node.target != target:
        raise Reject(f"{node.target} where {target} was expected", node, depth=-1)
    return input_node(node) if target == aten.exp.default else node


class OneReader:
    """The shadow, in which the two uses of the scores inside the softmax count as one."""

    def __init__(self, shadow: Shadow, inner: list[Node]) -> None:
        self.shadow, self.inner = shadow, inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.shadow, name)

    def users(self, node: Node) -> list[Node]:
        users = self.shadow.users(node)
        return users[:1] if all(user in self.inner for user in users) else users


RULE = HandSoftmaxRule()
'''


@pytest.fixture
def with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The contributor's file in place; afterwards everything is as before."""
    (tmp_path / "hand_softmax.py").write_text(THE_FILE)
    monkeypatch.setattr(attnopt.passes, "__path__", [*attnopt.passes.__path__, str(tmp_path)])
    rules.cache_clear()
    yield
    rules.cache_clear()


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def by_another_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    weights = torch.exp(scores - scores.amax(-2, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def inputs() -> list[Tensor]:
    return [torch.randn(2, 4, 8, 16) for _ in range(3)]


def test_the_file_is_found_and_listed(with_the_file: None) -> None:
    assert "hand-softmax" in [rule.name for rule in rules()]


def test_its_spelling_is_rewritten_and_computes_what_eager_computes(with_the_file: None) -> None:
    (site,) = check_like_eager(by_hand, inputs(), differentiable=3).attention
    assert (site.verdict, site.nearest_rule, site.spec) == (
        "rewritten",
        "hand-softmax",
        "softmax scale=0.25 full",
    )


def test_its_near_miss_is_left_alone(with_the_file: None) -> None:
    report = check_like_eager(by_another_maximum, inputs())
    assert report.having("rewritten") == ()
    assert "not the maximum of the row" in report.sites[0].reason


def test_without_the_file_the_spelling_is_left_alone() -> None:
    assert check_like_eager(by_hand, inputs()).having("rewritten") == ()
