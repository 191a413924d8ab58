"""The command line: each command on a real model, each exit code, and what goes to which stream."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.export import export
from typer.testing import CliRunner, Result

from attnopt import cli_doctor, cli_work
from attnopt.cli import app
from attnopt.cli_flags import EXIT_CODES, exit_code
from attnopt.errors import AttnoptError
from attnopt.options import option_fields
from attnopt.programs import rewrite as rewrite_program
from attnopt.report import Report

MODELS = """
import torch
from torch import nn

class Attention(nn.Module):
    def forward(self, x):
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        for _ in range(2):
            scores = (x @ x.transpose(-1, -2) * 0.25).masked_fill(~mask, float("-inf"))
            x = x + torch.softmax(scores, -1) @ x
        return x

class Plain(nn.Module):
    def forward(self, x):
        return x.relu()

class Odd(nn.Module):
    def forward(self, x):
        return torch.softmax((x @ x.transpose(-1, -2)).cumsum(-1).tan(), -1) @ x

X = torch.linspace(-2, 2, 2 * 12 * 16).reshape(1, 2, 12, 16)
def attention(): return Attention().eval(), (X,)
def plain(): return Plain().eval(), (X,)
def linear(): return nn.Linear(16, 3).eval(), (X,)
def odd(): return Odd().eval(), (X,)
def wrong_inputs(): return nn.Linear(3, 3).eval(), (torch.ones(2, 4),)
def fails(): raise ValueError("no")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with models.py in it; no ATTNOPT_* option is set."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for spot in option_fields():
        monkeypatch.delenv(f"ATTNOPT_{spot.name.upper()}", raising=False)
    yield tmp_path
    sys.modules.pop("attnopt_source_models", None)


class Relu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


def save_without_inputs(name: str) -> None:
    program = export(Relu(), (torch.ones(3),))
    program._example_inputs = None
    torch.export.save(program, name)


def run(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=env)


def plain(text: str) -> str:
    """Help and usage errors in one line, without frames and colour."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


class TestRewrite:
    def test_a_model_is_rewritten_compared_and_saved(self, folder: Path) -> None:
        done = run("rewrite", "models.py:attention", "-o", "out.pt2")
        assert done.exit_code == 0
        assert "2 of 2 attention sites rewritten (2 exact, 0 approximate)" in done.stdout
        assert re.search(r"^output +1x2x12x16 +float32 .* ok$", done.stdout, re.MULTILINE)
        assert done.stdout.endswith("wrote out.pt2 and out.pt2.report.json\n")
        assert sorted(path.name for path in folder.glob("out*")) == ["out.pt2", "out.pt2.report.json"]
        assert len(Report.from_json((folder / "out.pt2.report.json").read_bytes()).having("rewritten")) == 2

    def test_the_result_runs_in_a_fresh_process_with_other_lengths(self) -> None:
        done = run("rewrite", "models.py:attention", "-o", "out.pt2", "--dynamic", "0:2=tokens:2..40", "-q")
        assert (done.exit_code, done.stderr) == (0, "")
        code = (
            "import torch, attnopt, models; x = torch.randn(1, 2, 31, 16);"
            "got = torch.export.load('out.pt2').module()(x); want = models.Attention()(x);"
            "print(torch.allclose(got, want, atol=1e-5))"
        )
        shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert shown.stdout.strip() == "True"

    def test_json_tells_the_same(self) -> None:
        done = run("rewrite", "models.py:attention", "--dry-run", "--json")
        body = json.loads(done.stdout)
        assert body["file"] is None
        assert [check["verdict"] for check in body["outputs"]] == ["ok"]
        assert Report.from_json(json.dumps(body["report"])).having("rewritten")
        assert "rewriting ... " in done.stderr

    def test_a_dry_run_writes_nothing(self, folder: Path) -> None:
        before = sorted(folder.iterdir())
        assert run("rewrite", "models.py:attention", "--dry-run", "-o", "out.pt2").exit_code == 0
        assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before

    def test_a_rewritten_program_is_a_source(self, folder: Path) -> None:
        assert run("rewrite", "models.py:attention", "-o", "out.pt2").exit_code == 0
        done = run("explain", "out.pt2")
        assert done.exit_code == 0
        assert "2 kept" in done.stdout

    def test_an_approximation_is_measured_not_failed(self) -> None:
        flags = ("--softmax", "streaming", "--sinks", "1", "--window", "2")
        done = run("rewrite", "models.py:attention", "--dry-run", *flags)
        assert done.exit_code == 0
        assert "(0 exact, 2 approximate)" in done.stdout
        assert re.search(r"^output .* approximate$", done.stdout, re.MULTILINE)

    def test_an_input_may_be_called_input(self) -> None:
        assert run("rewrite", "models.py:linear", "-o", "out.pt2").exit_code == 0
        assert run("rewrite", "out.pt2", "--dry-run").exit_code == 0

    def test_without_inputs_the_outputs_are_not_compared(self, folder: Path) -> None:
        save_without_inputs("bare.pt2")
        done = run("rewrite", "bare.pt2", "-o", "out.pt2")
        assert done.exit_code == 0
        assert "outputs not compared: there are no example inputs" in done.stdout
        assert "note: bare.pt2 has no sample inputs" in done.stderr


class TestExplain:
    def test_it_prints_the_table(self) -> None:
        done = run("explain", "models.py:attention")
        assert done.exit_code == 0
        assert "models.py:10" in done.stdout
        assert "2 of 2 attention sites rewritten" in done.stdout

    @pytest.mark.parametrize(("columns", "width"), [("80", 80), ("130", 130), ("500", 160), ("20", 72)])
    def test_the_table_is_as_wide_as_the_terminal(self, columns: str, width: int) -> None:
        done = run("explain", "models.py:attention", env={"COLUMNS": columns})
        assert max(map(len, done.stdout.splitlines())) == width

    def test_a_site_left_alone_comes_with_what_would_help(self) -> None:
        done = run("explain", "models.py:odd")
        assert "refused: aten::tan between Q K^T and the softmax is not understood" in done.stdout
        assert "what would help: spell the step plainly, or call" in done.stdout
        (site,) = json.loads(run("explain", "models.py:odd", "--json").stdout)["sites"]
        assert "scaled_dot_product_attention here, if that computes the same" in site["advice"]

    def test_flags_variables_and_defaults_are_one(self) -> None:
        done = run("explain", "models.py:plain", "--json", "--window", "7", env={"ATTNOPT_SINKS": "3"})
        options = json.loads(done.stdout)["options"]
        assert (options["window"], options["sinks"], options["rank"]) == (7, 3, 32)

    def test_kernels_are_named_one_by_one(self) -> None:
        done = run("explain", "models.py:attention", "--json", "--deny", "sdpa", "--deny", "streaming")
        body = json.loads(done.stdout)
        assert body["options"]["deny"] == ["sdpa", "streaming"]
        assert {site["verdict"] for site in body["sites"]} == {"refused"}

    def test_an_exported_program_needs_no_inputs(self) -> None:
        save_without_inputs("bare.pt2")
        assert run("explain", "bare.pt2").stdout.startswith("no attention found")

    def test_random_inputs_take_the_place_of_the_factorys(self) -> None:
        done = run("explain", "models.py:attention", "--input", "1x2x20x16", "--json")
        assert done.exit_code == 0
        assert len(json.loads(done.stdout)["sites"]) == 2


def test_bench_times_both() -> None:
    done = run("bench", "models.py:attention", "--calls", "3", "--warmup", "1", "--json")
    assert done.exit_code == 0
    body = json.loads(done.stdout)
    assert [timing["name"] for timing in body["timings"]] == ["original", "attnopt"]
    assert all(timing["median"] > 0 and timing["calls"] == 3 for timing in body["timings"])


def test_bench_times_under_torch_compile() -> None:
    done = run(
        "bench", "models.py:attention", "--calls", "1", "--warmup", "1", "--compiled", "--inner", "aot_eager"
    )
    assert done.exit_code == 0
    assert re.findall(r"^(.*?)  +[\d.]+ ms", done.stdout, re.MULTILINE) == [
        "original",
        "attnopt",
        "aot_eager alone",
        "attnopt + aot_eager",
    ]


class TestReport:
    @pytest.fixture
    def saved(self, folder: Path) -> Path:
        path = folder / "out.pt2.report.json"
        path.write_text(Report(graph_breaks=("here",)).to_json())
        return path

    @pytest.mark.parametrize("name", ["out.pt2.report.json", "out.pt2"])
    def test_it_prints_a_saved_report(self, saved: Path, name: str) -> None:
        done = run("report", name)
        title = "graph breaks (an attention that spans one cannot be found)"
        assert done.stdout == f"{title}:\n  here\n\nno attention found; 1 graph break; 0.0 s\n"

    def test_it_writes_a_page(self, saved: Path, folder: Path) -> None:
        done = run("report", "out.pt2", "--html", "out.html")
        assert (done.exit_code, done.stderr) == (0, "wrote out.html\n")
        assert (folder / "out.html").read_text().startswith("<!doctype html>")
        again = run("report", "out.pt2", "--html", "out.html")
        assert (again.exit_code, again.stderr) == (
            2,
            "error: will not overwrite out.html; choose another name or say --force\n",
        )
        assert run("report", "out.pt2", "--html", "out.html", "--force").exit_code == 0

    def test_the_report_itself_is_not_overwritten(self, saved: Path) -> None:
        done = run("report", "out.pt2", "--html", saved.name, "--force")
        assert done.exit_code == 2
        assert "it is the input" in done.stderr
        assert Report.from_json(saved.read_bytes())

    def test_its_json_is_the_report(self, saved: Path) -> None:
        assert json.loads(run("report", "out.pt2", "--json").stdout) == json.loads(saved.read_text())


def test_rules_lists_rules_and_kernels() -> None:
    from attnopt.registry import kernels, rules

    body = json.loads(run("rules", "--json").stdout)
    assert [rule["name"] for rule in body["rules"]] == [rule.name for rule in rules()]
    assert [kernel["name"] for kernel in body["kernels"]] == [kernel.name for kernel in kernels()]
    assert all(rule["reads"] and rule["anchors"] for rule in body["rules"])
    assert all(kernel["serves"] for kernel in body["kernels"])
    text = run("rules").stdout
    assert all(f"  {rule['name']}: {rule['reads']}\n" in text for rule in body["rules"])


class TestDoctor:
    def test_it_finds_this_machine_well(self) -> None:
        done = run("doctor", "--json")
        findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
        assert [name for name, finding in findings.items() if finding["status"] == "missing"] == []
        assert done.exit_code == 0
        assert findings["self-test"]["detail"].startswith("2 of 2 sites rewritten")

    def test_what_is_missing_gives_exit_code_6(self, monkeypatch: pytest.MonkeyPatch) -> None:
        finding = cli_doctor.Finding("C++ compiler", "missing", "none found")
        monkeypatch.setattr(cli_doctor, "examine", lambda: iter([finding]))
        done = run("doctor", "-q")
        assert (done.exit_code, done.stderr) == (6, "error: C++ compiler\n")
        assert done.stdout == "missing  C++ compiler  none found\n"

    def test_a_bad_variable_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ATTNOPT_WINDOW", "wide")
        assert cli_doctor._variables().status == "missing"

    def test_an_old_torch_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
        finding = cli_doctor._torch()
        assert (finding.status, finding.detail) == ("missing", "2.9.1+cpu; wanted 2.11 or newer")

    def test_a_triton_of_another_torch_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli_doctor, "_pinned_triton", lambda: "1.0")
        assert cli_doctor._triton().status == "warning"

    def test_a_broken_rewriter_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("attnopt.programs.rewrite", lambda program, options: (program, Report()))
        assert cli_doctor._self_test().detail.startswith("0 of 2 sites rewritten")


class TestExitCodes:
    def test_every_error_has_one(self) -> None:
        kinds = AttnoptError.__subclasses__()
        assert {kind.__name__: exit_code(kind("x")) for kind in kinds} == {
            "OptionError": 2,
            "ShapeError": 2,
            "UnsupportedError": 6,
            "StrictError": 3,
            "VerificationError": 4,
            "UnsafeFileError": 5,
            "SourceError": 2,
            "MissingError": 6,
            "ReportError": 2,
            "OutputError": 2,
        }
        assert exit_code(KeyError("x")) == 1
        assert next(reversed(EXIT_CODES)) is AttnoptError  # the base comes last, or it would hide the others

    def test_1_internal_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> None:
            raise KeyError("lost")

        monkeypatch.setattr(cli_work, "known", broken)
        done = run("rules")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr == "internal error: KeyError: 'lost' (a bug; -v shows where, please report it)\n"
        assert "Traceback" in run("rules", "-v").stderr

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (["rewrite", "models.py:attention"], "error: where to? Say -o OUT.pt2, or --dry-run"),
            (
                ["rewrite", "models.py:attention", "-o", "out.txt"],
                "error: will not write out.txt: the name of an exported program must end in .pt2",
            ),
            (
                ["rewrite", "models.py:attention", "-o", "no/out.pt2"],
                "error: cannot write no/out.pt2: there is no folder no",
            ),
            (
                ["rewrite", "models.py:attention", "--dry-run", "--dynamic", "x"],
                "error: --dynamic 'x': wanted INPUT:AXIS=NAME or INPUT:AXIS=NAME:MIN..MAX, as in 0:1=tokens:2..4096",
            ),
            (
                ["explain", "models.py:attention", "--local", "200"],
                "error: option local=200: wanted at most topk, which is 128",
            ),
            (["report", "none.json"], "error: cannot read none.json: No such file or directory"),
            (
                ["report", "models.py"],
                "error: not the JSON of a report: Expecting value: line 2 column 1 (char 1)",
            ),
        ],
    )
    def test_2_usage(self, arguments: list[str], error: str) -> None:
        done = run(*arguments)
        assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"{error}\n")

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (
                ["explain", "models.py:fails"],
                "models.py:fails: the factory failed: ValueError: no; -v shows its traceback",
            ),
            (
                ["explain", "models.py:wrong_inputs"],
                "running models.py:wrong_inputs on its example inputs failed: ",
            ),
            (["bench", "models.py:plain", "--input", "x"], "--input 'x': wanted SHAPE or SHAPE:DTYPE"),
        ],
    )
    def test_2_a_source_that_does_not_work(self, arguments: list[str], error: str) -> None:
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"\nerror: {error}" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            (["explain"], "Missing argument 'SOURCE'"),
            (["explain", "x", "--softmax", "fast"], "'fast' is not one of 'exact', 'streaming', 'sparq'"),
            (["explain", "x", "--window", "0"], "Invalid value for '--window'"),
            (["explain", "x", "--windwo", "3"], "No such option: --windwo"),
            (["rewite"], "No such command 'rewite'"),
        ],
    )
    def test_2_flags(self, arguments: list[str], error: str) -> None:
        done = run(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert error in plain(done.stderr)

    @pytest.mark.parametrize("command", [["explain"], ["rewrite", "-o", "out.pt2"]])
    def test_3_nothing_matched(self, command: list[str], folder: Path) -> None:
        done = run(*command, "models.py:plain", "--require-match")
        assert done.exit_code == 3
        assert done.stderr.endswith("error: no site was rewritten (--require-match)\n")
        assert "no attention found" in done.stdout
        assert not (folder / "out.pt2").exists()
        assert run(*command, "models.py:plain").exit_code == 0

    def test_3_a_site_left_alone_under_strict(self) -> None:
        done = run("explain", "models.py:odd", "--strict")
        assert done.exit_code == 3
        assert "strict=True and 1 attention site(s) were left alone" in done.stderr

    def test_4_verification_failed(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        def wrong(program: object, options: object) -> tuple[object, Report]:
            changed = export(torch.nn.Tanh(), program.example_inputs[0])
            return changed, replace(rewrite_program(program, options)[1])

        monkeypatch.setattr(cli_work, "rewrite_program", wrong)
        done = run("rewrite", "models.py:attention", "-o", "out.pt2")
        assert (done.exit_code, done.stdout) == (4, "")
        assert "error: outputs differ more than rounding explains: output; nothing was written" in done.stderr
        assert list(folder.glob("*out*")) == []

    def test_5_unsafe_file(self, folder: Path) -> None:
        (folder / "evil.pt2").write_bytes(b"\x80\x02cos\nmkdir\nX\x04\x00\x00\x00trap\x85R.")
        done = run("explain", "evil.pt2", "-q")
        assert (done.exit_code, done.stdout) == (5, "")
        assert done.stderr == (
            "error: will not load evil.pt2: it is a pickle, which runs the code inside it; if you would run code from "
            "whoever made it, say --allow-unsafe-load\n"
        )
        assert run("explain", "evil.pt2", "--allow-unsafe-load").exit_code == 2
        assert not (folder / "trap").exists()

    def test_6_missing_package(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "r.json").write_text(Report().to_json())
        monkeypatch.setitem(sys.modules, "jinja2", None)
        done = run("report", "r.json", "--html", "r.html")
        assert (done.exit_code, done.stdout) == (6, "")
        assert done.stderr == "error: the HTML report needs jinja2; pip install 'attnopt[report]'\n"
        assert not (folder / "r.html").exists()


class TestStreams:
    def test_the_input_is_never_overwritten(self, folder: Path) -> None:
        assert run("rewrite", "models.py:attention", "-o", "out.pt2").exit_code == 0
        before = (folder / "out.pt2").read_bytes()
        done = run("rewrite", "out.pt2", "-o", "out.pt2", "--force")
        assert done.exit_code == 2
        assert "will not write out.pt2: it is the input; choose another name with -o" in done.stderr
        assert (folder / "out.pt2").read_bytes() == before

    def test_progress_goes_to_stderr_and_quiet_stops_it(self) -> None:
        assert re.search(
            r"^loading models\.py:plain \.\.\. +\d+\.\d s\nexplaining",
            run("explain", "models.py:plain").stderr,
        )
        assert run("explain", "models.py:plain", "-q").stderr == ""

    def test_a_pipe_gets_plain_text(self) -> None:
        done = fresh("explain", "models.py:attention")
        assert done.returncode == 0
        assert "\x1b" not in done.stdout + done.stderr
        assert done.stdout.startswith("     attention site")

    def test_a_module_in_the_current_folder_is_found(self) -> None:
        done = fresh("explain", "models:attention", "--json", "-q")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(json.loads(done.stdout)["sites"]) == 2

    def test_version_names_what_a_bug_report_needs(self) -> None:
        done = fresh("--version")
        assert re.fullmatch(r"attnopt \S+, torch \S+, triton \S+, python \S+, device .+\n", done.stdout)

    def test_help_lists_every_option_with_its_default_and_variable(self) -> None:
        text = plain(run("rewrite", "--help", env={"COLUMNS": "200"}).stdout)
        for spot in option_fields():
            assert f"--{spot.name.replace('_', '-')}" in text
            assert f"variable: ATTNOPT_{spot.name.upper()}" in text

    def test_help_needs_no_compiler(self) -> None:
        code = "import sys; sys.argv = ['attnopt', '--help']\nfrom attnopt.cli import main\n"
        code += "try: main()\nexcept SystemExit: pass\n"
        code += "print([name for name in ('torch._dynamo', 'torch._inductor', 'transformers') if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]"


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, its output piped."""
    environ = {
        name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "GITHUB_ACTIONS")
    }
    return subprocess.run(
        [sys.executable, "-m", "attnopt", *arguments],
        capture_output=True,
        text=True,
        env=environ,
        check=False,
    )
