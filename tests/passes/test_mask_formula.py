"""Laws of formulas and cases: simplifying changes no truth value, and finds what follows from the bounds."""

import itertools
from types import SimpleNamespace

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from mask_trace import holds

from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_formula import (
    FALSE,
    MAX_PARTS,
    TRUE,
    All,
    AtMostZero,
    Data,
    Fact,
    Logic,
    NotUnderstood,
    Some,
    always,
    negate,
    parts_of,
)

I, J = POSITIONS["i"], POSITIONS["j"]
ROWS, COLUMNS = 4, 5
LOGIC = Logic(Bounds({I: sympy.Integer(ROWS), J: sympy.Integer(COLUMNS)}))
A, B = (Fact(Data(name, ())) for name in "ab")
#: Truth values are computed at all positions, for all values of the two facts.
PLACES = list(itertools.product(range(ROWS), range(COLUMNS), (False, True), (False, True)))


def truth(formula):
    return [
        holds(formula, {I: i, J: j}, {A.data.node: _scalar(a), B.data.node: _scalar(b)})
        for i, j, a, b in PLACES
    ]


def _scalar(value):
    """What looks like a tensor without dimensions."""
    return {(): SimpleNamespace(item=lambda: value)}


def line(i, j, constant):
    return LOGIC.at_most_zero(i * I + j * J + constant)


lines = st.builds(line, st.integers(-2, 2), st.integers(-2, 2), st.integers(-4, 4))
formulas = st.recursive(
    lines | st.sampled_from([A, B, negate(A)]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map(LOGIC.conj),
        st.lists(inner, min_size=2, max_size=3).map(LOGIC.disj),
        st.builds(LOGIC.either, inner, inner, inner),
    ),
    max_leaves=6,
)


@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(-9, 9))
def test_a_line_is_what_it_says(i, j, constant):
    expected = [i * x + j * y + constant <= 0 for x, y, _, _ in PLACES]
    assert truth(line(i, j, constant)) == expected


@given(st.lists(formulas, min_size=1, max_size=3))
def test_conjunction_is_all_and_disjunction_is_any(parts):
    columns = list(zip(*map(truth, parts), strict=True))
    assert truth(LOGIC.conj(parts)) == list(map(all, columns))
    assert truth(LOGIC.disj(parts)) == list(map(any, columns))


@given(formulas, formulas, formulas)
def test_a_choice_is_one_or_the_other(condition, then, other):
    columns = zip(*map(truth, (condition, then, other)), strict=True)
    assert truth(LOGIC.either(condition, then, other)) == [t if c else o for c, t, o in columns]


@given(formulas)
def test_negation_is_the_opposite(formula):
    assert truth(negate(formula)) == [not t for t in truth(formula)]
    assert negate(negate(formula)) == formula


@given(st.lists(lines, max_size=2), formulas)
def test_simplifying_where_something_holds_changes_nothing_there(known, formula):
    there = list(map(all, zip(*map(truth, known), strict=True))) or [True] * len(PLACES)
    literals = [p for k in known for p in parts_of(k)]
    simpler = truth(LOGIC.given(literals, formula))
    assert [s for s, here in zip(simpler, there, strict=True) if here] == [
        t for t, here in zip(truth(formula), there, strict=True) if here
    ]


@given(st.lists(st.tuples(st.integers(0, 2), formulas), min_size=1, max_size=3), formulas)
def test_cases_hold_one_at_a_time(pairs, condition):
    cases = always(sympy.Integer(9))
    for leaf, when in pairs:
        cases = LOGIC.select(when, always(sympy.Integer(leaf)), cases)
    assert all(sum(column) == 1 for column in zip(*map(truth, cases.values()), strict=True))
    doubled = LOGIC.lift(lambda x: 2 * x, cases)
    assert truth(LOGIC.test(lambda x: LOGIC.at_most_zero(x - 2), doubled)) == truth(
        LOGIC.test(lambda x: LOGIC.at_most_zero(x - 1), cases)
    )


SIMPLER = {
    "beyond the last row": (line(1, 0, -ROWS), TRUE),
    "before the first": (line(1, 0, 1), FALSE),
    "common factor": (line(-2, 2, -1), AtMostZero(J - I)),
    "contradiction": (LOGIC.conj([line(-1, 1, 0), line(1, -1, 1)]), FALSE),
    "everything": (LOGIC.disj([line(-1, 1, 0), line(1, -1, -2)]), TRUE),
    "the stronger of two": (LOGIC.conj([line(-1, 1, 0), line(-1, 1, 1)]), AtMostZero(J - I + 1)),
    "the weaker of two": (LOGIC.disj([line(-1, 1, 0), line(-1, 1, 1)]), AtMostZero(J - I)),
    "absorbed": (LOGIC.conj([A, LOGIC.disj([A, B])]), A),
    "resolved": (LOGIC.disj([LOGIC.conj([A, B]), LOGIC.conj([A, negate(B)])]), A),
    "excluded": (LOGIC.conj([A, LOGIC.disj([negate(A), B])]), All((A, B))),
    "what alternatives share": (
        LOGIC.disj([LOGIC.conj([A, line(-1, 1, 0)]), LOGIC.conj([A, B])]),
        All((A, Some((B, AtMostZero(J - I))))),
    ),
    "distance": (
        LOGIC.at_most_zero(sympy.Abs(I - J) - 1),
        All((AtMostZero(I - J - 1), AtMostZero(J - I - 1))),
    ),
    "far": (LOGIC.at_most_zero(3 - sympy.Abs(I - J)), Some((AtMostZero(I - J + 3), AtMostZero(J - I + 3)))),
    "larger": (LOGIC.at_most_zero(sympy.Max(I, J) - 2), All((AtMostZero(I - 2), AtMostZero(J - 2)))),
}


@pytest.mark.parametrize("name", SIMPLER)
def test_known_simplifications(name):
    found, expected = SIMPLER[name]
    assert found == expected


def test_order_of_parts_does_not_matter():
    assert All((A, B)) == All((B, A))
    assert All((A, B)) != Some((A, B))
    assert len({All((A, B)), All((B, A))}) == 1


def test_what_grows_too_large_is_given_up():
    facts = [Fact(Data(str(n), ())) for n in range(MAX_PARTS + 1)]
    with pytest.raises(NotUnderstood):
        LOGIC.conj(facts)
