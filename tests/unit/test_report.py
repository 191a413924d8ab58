"""A report says everything in text, JSON and HTML, and reads back only what it wrote."""

import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnopt.errors import MissingError, ReportError
from attnopt.report import Family, GraphReport, Report, SiteReport, Verdict, merge
from attnopt.report_groups import fold_paths
from attnopt.report_text import WIDTH

ROOT = Path(__file__).parents[2]

LAYERS = tuple(
    SiteReport(
        family="softmax",
        verdict="rewritten",
        spec="softmax scale=0.125 gqa=3 causal",
        where="modeling.py:204",
        module=f"model.layers.{layer}.attention",
        kernel="sdpa",
        error=1e-17 * (layer + 1),
        bytes_before=4e8,
        bytes_after=1e7,
    )
    for layer in range(30)
)
REFUSED = SiteReport(
    family="softmax",
    verdict="refused",
    where="toy.py:41",
    module="encoder.attention",
    code="    scores = torch.softmax(q @ k.mT + noise, -1)",
    reason="the mask depends on data",
    nearest_rule="softmax",
    node="%where_3 = where(%gt, %add_1, -inf)",
)
ROUTERS = tuple(
    SiteReport(family="other", verdict="rejected", where="moe.py:88", reason="no values") for _ in range(12)
)
STREAMED = replace(
    LAYERS[0], kernel="streaming", exact=False, approximation_error=0.021, module="decoder", where="toy.py:70"
)
FULL = Report(
    sites=(*LAYERS, REFUSED, STREAMED, *ROUTERS),
    graphs=(GraphReport(nodes_before=214, nodes_after=120, seconds={"shadow": 0.25, "read": 0.5}),),
    graph_breaks=("a branch on data at model.py:31",),
    options={"softmax": "exact", "allow": ("sdpa",), "strict": False, "window": 3},
    versions={"attnopt": "0.1.0"},
    seconds={"capture": 1.25},
    warnings=("one mask was taken as causal on your word",),
)

texts = st.text(max_size=12)
amounts = st.none() | st.floats()
sites = st.builds(
    SiteReport,
    family=st.sampled_from(get_args(Family)),
    verdict=st.sampled_from(get_args(Verdict)),
    kernel=st.none() | texts,
    exact=st.booleans(),
    nearest_rule=st.none() | texts,
    origin=st.integers(0, 3),
    **dict.fromkeys(("spec", "where", "module", "reason", "node", "code"), texts),
    **dict.fromkeys(
        ("error", "approximation_error", "bytes_before", "bytes_after", "flops_before", "flops_after"),
        amounts,
    ),
)
seconds = st.dictionaries(texts, st.floats())
graphs = st.builds(
    GraphReport, nodes_before=st.integers(0, 10**20), nodes_after=st.integers(0, 9), seconds=seconds
)
reports = st.builds(
    Report,
    sites=st.lists(sites, max_size=4).map(tuple),
    graphs=st.lists(graphs, max_size=2).map(tuple),
    graph_breaks=st.lists(texts, max_size=2).map(tuple),
    options=st.dictionaries(
        texts, texts | st.integers() | st.booleans() | st.lists(texts, max_size=2).map(tuple), max_size=3
    ),
    versions=st.dictionaries(texts, texts, max_size=3),
    seconds=seconds,
    warnings=st.lists(texts, max_size=2).map(tuple),
)


def read(text: str) -> Report | ReportError:
    try:
        return Report.from_json(text)
    except ReportError as error:
        return error


class TestText:
    def test_equal_layers_are_one_line(self) -> None:
        assert str(Report(sites=LAYERS, seconds={"all": 0.8})) == (
            "     attention site                                   verdict      check            kernel\n"
            + "-" * 100
            + "\n30x  model.layers.{0-29}.attention                    rewritten    3.0e-16          sdpa\n"
            "     softmax scale=0.125 gqa=3 causal  at modeling.py:204\n\n"
            "30 of 30 attention sites rewritten (30 exact, 0 approximate); checked in fp64, worst row error\n"
            "3e-16; 0 graph breaks; 0.8 s"
        )

    def test_a_site_left_alone_comes_with_reason_line_and_code(self) -> None:
        assert str(Report(sites=(REFUSED,))) == (
            "left alone: 1 site\n" + "-" * 100 + "\n1x   toy.py:41  encoder.attention\n"
            "     scores = torch.softmax(q @ k.mT + noise, -1)\n"
            "     refused: the mask depends on data\n"
            "     nearest rule: softmax; stopped at: %where_3 = where(%gt, %add_1, -inf)\n\n"
            "0 of 1 attention site rewritten (0 exact, 0 approximate); 0 graph breaks; 0.0 s"
        )

    def test_what_is_not_attention_is_listed_in_one_line(self) -> None:
        whole = replace(FULL, graph_breaks=())
        assert "looked like attention and is not:\n  12x moe.py:88: no values\n" in str(whole)

    def test_what_a_break_may_have_cut_in_two_is_not_called_something_else(self) -> None:
        assert "looked like attention and is not, as far as its graph goes:\n  12x moe.py:88" in str(FULL)

    def test_an_approximation_never_looks_exact(self) -> None:
        line = next(line for line in str(FULL).splitlines() if line.endswith("streaming"))
        assert "off by 2.1e-02" in line
        assert "31 of 32 attention sites rewritten (30 exact, 1 approximate)" in str(FULL)

    def test_unverified_sites_say_so(self) -> None:
        text = str(Report(sites=(replace(LAYERS[0], error=None), LAYERS[1])))
        assert "unverified" in text.splitlines()[2]
        assert "worst row error 2e-17, 1 unverified;" in " ".join(text.split())

    def test_no_attention_is_said_plainly(self) -> None:
        assert str(Report()) == "no attention found; 0 graph breaks; 0.0 s"
        assert str(Report(sites=ROUTERS)).endswith("no attention found; 0 graph breaks; 0.0 s")

    def test_waivers_and_graph_breaks_are_told(self) -> None:
        assert "warnings:\n  one mask was taken as causal on your word" in str(FULL)
        assert (
            "graph breaks (an attention that spans one cannot be found):\n  a branch on data at model.py:31"
            in str(FULL)
        )
        assert "1 graph break; 2.0 s" in str(FULL)

    def test_a_nan_among_the_errors_is_the_worst(self) -> None:
        assert "worst row error nan" in str(Report(sites=(LAYERS[0], replace(LAYERS[1], error=math.nan))))

    @given(reports)
    def test_every_report_fits_the_page_and_holds_no_control_characters(self, report: Report) -> None:
        for line in str(report).split("\n"):
            assert len(line) <= WIDTH
            assert line.isprintable()

    @given(reports)
    def test_every_site_is_counted(self, report: Report) -> None:
        found = len(report.attention)
        head = str(report).rsplit("\n\n", 1)[-1].replace("\n", " ")
        assert head.startswith(
            f"{len(report.having('rewritten'))} of {found} " if found else "no attention found"
        )

    @pytest.mark.parametrize(
        ("paths", "folded"),
        [
            (["a.0.b", "a.1.b", "a.2.b"], "a.{0-2}.b"),
            (["a.0", "a.2", "a.4"], "a.{0,2..4}"),
            (["a.0", "a.3", "a.4"], "a.{0,3,4}"),
            (["a.9", "a.10"], "a.{9-10}"),
            (["a", "a"], "a"),
            (["", ""], ""),
            (["x", "y", "z"], "x ... z"),
            (["a.0.1", "a.1.2"], "a.0.1 ... a.1.2"),
            (["a.0.1", "a.0.2", "a.1.1", "a.1.2"], "a.{0-1}.{1-2}"),
            (["e.0.x", "e.1.x", "d.0.y", "d.1.y"], "e.{0-1}.x, d.{0-1}.y"),
            (["a0b", "a1"], "a0b, a1"),
        ],
    )
    def test_paths_fold_where_one_number_differs(self, paths: list[str], folded: str) -> None:
        assert folded == fold_paths(paths)


class TestJson:
    def test_a_report_reads_back_equal(self) -> None:
        assert Report.from_json(FULL.to_json()) == FULL

    @given(reports)
    def test_every_report_reads_back_the_same_text(self, report: Report) -> None:
        text = report.to_json()
        assert Report.from_json(text).to_json() == text
        assert Report.from_json(text.encode()).to_json() == text

    def test_numbers_that_json_lacks_are_strings(self) -> None:
        site = replace(LAYERS[0], error=math.nan, bytes_before=math.inf, bytes_after=-math.inf)
        text = Report(sites=(site,)).to_json()
        body = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert body["sites"][0]["error"] == "NaN"
        assert math.isnan(Report.from_json(text).sites[0].error)
        assert Report.from_json(text).sites[0].bytes_after == -math.inf

    def test_the_schema_is_versioned(self) -> None:
        body = json.loads(FULL.to_json())
        assert next(iter(body)) == "schema"
        assert body["schema"] == 1

    def test_later_fields_are_ignored(self) -> None:
        body = json.loads(FULL.to_json())
        body["sites"][0]["colour"] = "red"
        assert Report.from_json(json.dumps(body)) == FULL

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"schema": 2}, "report schema 2; this version of attnopt reads schema 1"),
            ({"schema": None}, "report schema None; this version of attnopt reads schema 1"),
            ({"sites": None}, "report.sites is null; wanted a list"),
            ({"sites": [3]}, "site is 3; wanted an object"),
            ({"sites": [{}]}, "site lacks the key 'family'"),
            (
                {"sites": [{"family": "x", "verdict": "kept"}]},
                'site.family is "x"; wanted one of softmax, linear, other',
            ),
            ({"sites": [{"family": "other", "verdict": []}]}, "site.verdict is []; wanted one of "),
            ({"graphs": [{"nodes_before": -1}]}, "graph lacks the key 'nodes_after'"),
            (
                {"graphs": [{"nodes_before": -1, "nodes_after": 0}]},
                "graph.nodes_before is -1; wanted a whole number",
            ),
            (
                {"seconds": {"a": "x"}},
                "report.seconds.a is \"x\"; wanted a number, 'NaN', 'Infinity' or '-Infinity'",
            ),
            ({"seconds": {"a": True}}, "report.seconds.a is true; wanted a number"),
            ({"seconds": {"a": 10**400}}, "wanted a number that fits in 64 bits"),
            ({"warnings": [1]}, "report.warnings[0] is 1; wanted a string"),
            ({"options": {"a": {}}}, "report.options.a is {}; wanted text"),
            ({"versions": []}, "report.versions is []; wanted an object"),
        ],
    )
    def test_a_malformed_report_says_where(self, change: Mapping[str, object], message: str) -> None:
        body = {**json.loads(FULL.to_json()), **change}
        with pytest.raises(ReportError) as caught:
            Report.from_json(json.dumps(body))
        assert str(caught.value).startswith(message) or message in str(caught.value)

    @pytest.mark.parametrize(
        "text", ["", "[]", "3", "{}", "{", "[" * 100_000, '{"schema":' + "9" * 5000 + "}", b"\xff\xfe\x00"]
    )
    def test_what_is_no_report_is_a_typed_error(self, text: str | bytes) -> None:
        with pytest.raises(ReportError):
            Report.from_json(text)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.floats() | texts, lambda x: st.lists(x) | st.dictionaries(texts, x)
        )
    )
    def test_any_json_in_any_place_is_a_report_or_a_typed_error(self, junk: object) -> None:
        for name in ("sites", "graphs", "graph_breaks", "options", "versions", "seconds", "warnings"):
            outcome = read(json.dumps({"schema": 1, name: junk}))
            assert isinstance(outcome, Report) or str(outcome)

    def test_every_field_is_documented(self) -> None:
        text = (ROOT / "docs" / "report-schema.md").read_text()
        for kind in (Report, GraphReport, SiteReport):
            section = text.split(f"## {kind.__name__}\n")[1].split("\n## ")[0]
            documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
            assert documented == [
                *(["schema"] if kind is Report else []),
                *(spot.name for spot in fields(kind)),
            ]


class TestMerging:
    def test_sites_keep_their_graphs(self) -> None:
        both = merge([FULL, FULL])
        assert [site.origin for site in both.sites] == [0] * len(FULL.sites) + [1] * len(FULL.sites)
        assert both.seconds == {"capture": 2.5}
        assert both.warnings == FULL.warnings
        assert both.total_seconds == 2 * FULL.total_seconds

    def test_nothing_merges_to_nothing(self) -> None:
        assert merge([]) == Report()


class Page(HTMLParser):
    """Collects the tags of a page and checks that they close."""

    VOID = ("meta", "rect", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestHtml:
    def test_the_page_is_whole_and_tells_what_the_table_tells(self) -> None:
        page = Page(FULL.to_html())
        assert page.open == []
        told = " ".join(" ".join(page.text).split())
        for fact in ("31 of 32 attention sites rewritten", "model.layers.{0-29}.attention", "the mask depends on data",
                     "toy.py:41", "scores = torch.softmax(q @ k.mT + noise, -1)", "a branch on data", "off by 2.1e-02",
                     "214 nodes before, 120 after", "one mask was taken as causal on your word"):  # fmt: skip
            assert fact in told

    def test_each_site_is_a_square_in_the_drawing(self) -> None:
        squares = [
            attrs for tag, attrs in Page(FULL.to_html()).seen if tag == "rect" and attrs["class"] != "stage"
        ]
        assert [square["class"] for square in squares] == [site.verdict for site in FULL.sites]
        assert len({(square["x"], square["y"]) for square in squares}) == len(FULL.sites)

    def test_nothing_is_fetched_and_nothing_runs(self) -> None:
        page = Page(FULL.to_html())
        assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tag for tag, _ in page.seen)
        assert not re.search(r"https?:|url\(|@import|\bon\w+=", FULL.to_html())

    @given(reports)
    def test_no_text_of_the_user_becomes_markup(self, report: Report) -> None:
        evil = '"><script>alert(1)</script>'
        sites = tuple(
            replace(site, module=evil, reason=evil, code=evil, node=evil, where=evil) for site in report.sites
        )
        page = Page(replace(report, sites=sites, graph_breaks=(evil,), warnings=(evil,)).to_html())
        assert page.open == []
        assert "script" not in {tag for tag, _ in page.seen}

    def test_without_jinja2_the_error_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "jinja2", None)
        with pytest.raises(MissingError) as caught:
            FULL.to_html()
        assert str(caught.value) == "the HTML report needs jinja2; pip install 'attnopt[report]'"
