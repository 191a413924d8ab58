"""Options come from a mapping, from variables or from defaults, and every mistake is named with its remedy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnopt.errors import OptionError
from attnopt.options import Options, option_fields

NAMES = "softmax, sinks, window, rank, topk, local, verify, inner, strict, allow, deny, assume_causal"


def message(given: object = None, **environ: str) -> str:
    with pytest.raises(OptionError) as caught:
        Options.parse(given, environ)
    return str(caught.value)


def parsed(given: object = None, **environ: str) -> Options | OptionError:
    try:
        return Options.parse(given, environ)
    except OptionError as error:
        return error


def test_the_defaults_are_those_of_the_contract() -> None:
    expected = {
        "softmax": "exact",
        "sinks": 4,
        "window": 1024,
        "rank": 32,
        "topk": 128,
        "local": 32,
        "verify": "compile",
        "inner": "inductor",
        "strict": False,
        "allow": (),
        "deny": (),
        "assume_causal": False,
    }
    assert Options.parse(None, {}).to_dict() == expected


def test_the_mapping_wins_over_variables_and_they_over_defaults() -> None:
    options = Options.parse({"window": 7}, {"ATTNOPT_WINDOW": "8", "ATTNOPT_SINKS": "2"})
    assert (options.window, options.sinks, options.rank) == (7, 2, 32)


def test_an_options_object_is_complete() -> None:
    options = Options(window=7)
    assert Options.parse(options, {"ATTNOPT_SINKS": "2"}) is options


def test_options_read_back_what_they_write() -> None:
    options = Options(softmax="sparq", allow=("sdpa", "sparq"), strict=True)
    assert Options.parse(options.to_dict(), {}) == options
    assert options.changed() == {"softmax": "sparq", "strict": True, "allow": ("sdpa", "sparq")}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("true", True), ("ON", True), ("0", False), ("False", False), ("no", False)],
)
def test_variables_say_truth_in_several_ways(text: str, value: bool) -> None:
    assert Options.parse(None, {"ATTNOPT_STRICT": text}).strict is value


def test_variables_name_kernels_with_commas_and_empty_ones_are_not_set() -> None:
    environ = {"ATTNOPT_ALLOW": "sdpa, lightning,", "ATTNOPT_WINDOW": "", "ATTNOPT_SOFTMAX": ""}
    assert Options.parse(None, environ) == Options(allow=("sdpa", "lightning"))


@pytest.mark.parametrize("names", ["sparq,sdpa", ["sparq", "sdpa"], ("sparq", "sdpa")])
def test_kernels_may_be_named_in_any_container(names: object) -> None:
    assert Options.parse({"deny": names}, {}).deny == ("sparq", "sdpa")


def test_sets_of_kernels_are_put_in_order() -> None:
    assert Options.parse({"deny": {"b", "a", "c"}}, {}).deny == ("a", "b", "c")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"verfy": "off"}, f"unknown option 'verfy'; did you mean 'verify'? (one of: {NAMES})"),
        ({"zzz": 1}, f"unknown option 'zzz' (one of: {NAMES})"),
        ({3: 1}, f"unknown option '3' (one of: {NAMES})"),
        ({"softmax": "exat"}, "option softmax='exat': wanted one of exact, streaming, sparq"),
        ({"softmax": ["exact"]}, "option softmax=['exact']: wanted one of exact, streaming, sparq"),
        ({"verify": "all"}, "option verify='all': wanted one of compile, off, first, sample, always"),
        ({"inner": None}, "option inner=None: wanted one of inductor, aot_eager, eager"),
        ({"window": 0}, "option window=0: wanted a whole number of at least 1"),
        ({"window": "512"}, "option window='512': wanted a whole number of at least 1"),
        ({"window": 5.0}, "option window=5.0: wanted a whole number of at least 1"),
        ({"rank": True}, "option rank=True: wanted a whole number of at least 1"),
        ({"sinks": -1}, "option sinks=-1: wanted a whole number of at least 0"),
        ({"strict": 1}, "option strict=1: wanted true or false"),
        ({"allow": [1]}, "option allow=(1,): wanted names of kernels"),
        ({"allow": [""]}, "option allow=('',): wanted names of kernels"),
        ({"allow": 3}, "option allow=3: wanted names of kernels"),
        ({"local": 129}, "option local=129: wanted at most topk, which is 128"),
        (
            {"allow": ["sdpa"], "deny": ["sdpa"]},
            "options allow and deny both name sdpa: name a kernel in one of them",
        ),
        ([("window", 3)], "options are a list; wanted a dict, an Options or None"),
    ],
)
def test_a_mistake_in_the_mapping_says_what_was_wanted(given: object, expected: str) -> None:
    assert expected == message(given)


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("ATTNOPT_WINDOW", "x", "ATTNOPT_WINDOW='x': wanted a whole number of at least 1"),
        ("ATTNOPT_WINDOW", "-3", "ATTNOPT_WINDOW=-3: wanted a whole number of at least 1"),
        ("ATTNOPT_STRICT", "maybe", "ATTNOPT_STRICT='maybe': wanted true or false"),
        ("ATTNOPT_SOFTMAX", "Exact", "ATTNOPT_SOFTMAX='Exact': wanted one of exact, streaming, sparq"),
        ("ATTNOPT_VERIFI", "off", "unknown variable ATTNOPT_VERIFI; did you mean ATTNOPT_VERIFY?"),
    ],
)
def test_a_mistake_in_a_variable_names_the_variable(variable: str, text: str, expected: str) -> None:
    assert expected == message(None, **{variable: text})


def test_variables_of_others_are_left_alone() -> None:
    assert (
        Options.parse(None, {"ATTNOPT_HYPOTHESIS": "dev", "ATTNOPT_CACHE_DIR": "/x", "WINDOW": "x"})
        == Options()
    )


def test_every_option_is_documented() -> None:
    assert [spot.name for spot in option_fields() if not spot.metadata["doc"].endswith((".", ")."))] == []


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.lists(st.text(max_size=5), max_size=3)
)


@given(st.dictionaries(st.sampled_from([spot.name for spot in option_fields()] + ["x", ""]), values))
def test_any_mapping_gives_options_or_a_typed_error(given: dict[str, object]) -> None:
    outcome = parsed(given)
    if isinstance(outcome, Options):
        assert Options.parse(outcome.to_dict(), {}) == outcome
    else:
        assert "option" in str(outcome)


@given(st.sampled_from([spot.name for spot in option_fields()]), st.text(max_size=12))
def test_any_variable_gives_options_or_a_typed_error(name: str, text: str) -> None:
    variable = f"ATTNOPT_{name.upper()}"
    outcome = parsed(None, **{variable: text})
    assert isinstance(outcome, Options) or variable in str(outcome) or "local" in str(outcome)
