"""SOURCE leads to a model with inputs, or to a message that says what to do."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram, export

from attnopt.cli_inputs import DynamicAxis, dynamic_shapes, parse_dynamic, random_input
from attnopt.cli_sources import load
from attnopt.errors import AttnoptError, MissingError, OptionError, SourceError, UnsafeFileError

FACTORIES = """
import torch
from torch import nn
import beside

class Net(nn.Linear):
    pass

def model(): return Net(4, 4).eval()
def pair(): return model(), (torch.ones(2, 4),)
def single(): return model(), torch.ones(2, 4)
def listed(): return model(), [torch.ones(2, 4)]
def triple(): return model(), (), {"input": torch.ones(2, 4)}
def training(): return nn.Linear(4, 4), (torch.ones(2, 4),)
def exported(): return torch.export.export(model(), (torch.ones(2, 4),))
def fails(): raise ValueError("the moon is in the wrong house\\nsecond line")
def silent(): raise KeyError
def needs(): import no_such_package
def number(): return 3
def wrong(): return model(), 3
def four(): return model(), (), {}, 1
constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with factories; what importing them changes is undone."""
    (tmp_path / "nets.py").write_text(FACTORIES)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield tmp_path
    for name in ("nets", "beside", "broken", *({*sys.modules} - before)):
        if name.startswith(("nets", "beside", "broken", "attnopt_source_")):
            sys.modules.pop(name, None)


def message(text: str, kind: type[AttnoptError] = SourceError, **settings: object) -> str:
    with pytest.raises(kind) as caught:
        load(text, **settings)
    return str(caught.value)


@pytest.mark.parametrize("form", ["nets.py:{}", "./nets.py:{}", "nets:{}"])
@pytest.mark.parametrize("factory", ["pair", "single", "listed", "triple"])
def test_a_factory_gives_a_model_and_its_inputs(folder: Path, form: str, factory: str) -> None:
    source = load(form.format(factory))
    assert isinstance(source.model, nn.Module)
    assert source.runnable()(*source.args, **source.kwargs).shape == (2, 4)
    assert source.notes == ()


def test_a_factory_may_give_an_exported_program(folder: Path) -> None:
    source = load("nets.py:exported")
    assert isinstance(source.exported(), ExportedProgram)


def test_inputs_can_be_made_up(folder: Path) -> None:
    source = load("nets.py:model", ["3x4:f32"])
    assert source.args[0].shape == (3, 4)
    assert source.runnable()(*source.args).shape == (3, 4)


def test_a_model_in_training_mode_is_noted(folder: Path) -> None:
    assert load("nets.py:training").notes == (
        "the model is in training mode; call .eval() in the factory if not meant",
    )


def test_a_file_that_was_read_is_known_as_an_input(folder: Path) -> None:
    assert load("nets.py:pair").files == (Path("nets.py"),)


_RETURNS = "a factory takes no arguments and returns a model, (model, args) or (model, args, kwargs)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "nets.py:fails",
            "the factory failed: ValueError: the moon is in the wrong house; -v shows its traceback",
        ),
        (
            "nets.py:silent",
            "nets.py:silent: the factory failed: KeyError: without a message; -v shows its traceback",
        ),
        ("nets.py:number", f"nets.py:number: the factory returned int; {_RETURNS}"),
        ("nets.py:four", f"nets.py:four: the factory returned (Net, tuple, dict, int); {_RETURNS}"),
        ("nets.py:wrong", "nets.py:wrong: the factory returned args of type int; wanted a tuple of inputs"),
        (
            "nets.py:model",
            "the factory returned no example inputs; return (model, args), or say --input SHAPE:DTYPE",
        ),
        ("nets.py:constant", "nets.py:constant: nets.py has no function 'constant'; it has "),
        ("nets.py", "nets.py: which function? Name it as nets.py:factory"),
        ("none.py:model", "none.py: no such file"),
        (
            "broken.py:model",
            "importing broken.py failed: ZeroDivisionError: division by zero; -v shows its traceback",
        ),
        ("broken:model", "importing broken failed: ZeroDivisionError"),
        ("no_such_module:model", "no_such_module: there is no such module; SOURCE is file.py:factory, "),
        ("no.such.module:model", "no.such.module: there is no such module"),
        ("3-4:model", "3-4: neither a file nor the name of a module"),
        (":model", ": neither a file nor the name of a module"),
        (
            "none.pt2",
            "none.pt2: no such file; SOURCE is file.py:factory, package.module:factory, a Hugging Face ",
        ),
        (".", ".: there is no config.json; wanted a Hugging Face model folder"),
        ("", "there is no config.json"),
    ],
)
def test_a_source_that_leads_nowhere_says_what_to_do(folder: Path, text: str, expected: str) -> None:
    assert expected in message(text)


def test_a_missing_package_is_no_mistake_in_the_source(folder: Path) -> None:
    assert "No module named 'no_such_package'" in message("nets.py:needs", MissingError)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.pkl", "model.ckpt"])
def test_pickles_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x02N.")
    assert "are pickles, which run the code inside them" in message(name, UnsafeFileError)


class TestExportedPrograms:
    def test_its_sample_inputs_are_its_inputs(self, folder: Path) -> None:
        torch.export.save(export(nn.Linear(4, 4).eval(), (torch.ones(2, 4),)), "net.pt2")
        source = load("net.pt2")
        assert torch.equal(source.args[0], torch.ones(2, 4))
        assert source.files == (Path("net.pt2"),)

    def test_its_axes_are_fixed(self, folder: Path) -> None:
        torch.export.save(export(nn.Linear(4, 4).eval(), (torch.ones(2, 4),)), "net.pt2")
        with pytest.raises(SourceError, match="has its dynamic axes already"):
            load("net.pt2").exported([DynamicAxis("0", 0, "n")])

    def test_a_model_that_torch_cannot_export_is_no_bug_of_ours(self, folder: Path) -> None:
        (folder / "odd.py").write_text(
            "import torch\nclass Odd(torch.nn.Module):\n    def forward(self, x):\n"
            "        return x if x.sum() > 0 else -x\ndef make(): return Odd().eval(), (torch.ones(3),)\n"
        )
        with pytest.raises(SourceError, match=r"^torch\.export of the model failed: "):
            load("odd.py:make").exported()


class TestInputs:
    @pytest.mark.parametrize(
        ("text", "shape", "dtype"),
        [
            ("2x3", (2, 3), torch.float32),
            ("7", (7,), torch.float32),
            ("1x4:bf16", (1, 4), torch.bfloat16),
            ("1x4:float64", (1, 4), torch.float64),
            ("1x100:int64<5", (1, 100), torch.int64),
            ("3:bool", (3,), torch.bool),
        ],
    )
    def test_a_spec_makes_a_tensor(self, text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = random_input(text)
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert torch.equal(tensor, random_input(text))

    def test_whole_numbers_stay_below_the_bound(self) -> None:
        assert set(random_input("1000:i64<5").tolist()) == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize(
        "text", ["", "x", "2x", "2x3:", "2x3:f31", "2x3:f32<", "-1", "2 x 3", "2x3:int64<-1"]
    )
    def test_a_bad_spec_shows_a_good_one(self, text: str) -> None:
        with pytest.raises(OptionError) as caught:
            random_input(text)
        assert str(caught.value).startswith(f"--input {text!r}: wanted SHAPE or SHAPE:DTYPE")


class TestDynamicAxes:
    @pytest.mark.parametrize(
        ("text", "axis"),
        [
            ("0:1=tokens", DynamicAxis("0", 1, "tokens")),
            ("ids:0=batch:2..64", DynamicAxis("ids", 0, "batch", 2, 64)),
        ],
    )
    def test_a_spec_names_an_axis(self, text: str, axis: DynamicAxis) -> None:
        assert parse_dynamic(text) == axis

    @pytest.mark.parametrize("text", ["", "0", "0:1", "0:x=n", "0:1=2", "0:1=n:3", "0:1=n:3..", "0:1=n:a..b"])
    def test_a_bad_spec_shows_a_good_one(self, text: str) -> None:
        with pytest.raises(OptionError) as caught:
            parse_dynamic(text)
        assert str(caught.value) == (
            f"--dynamic {text!r}: wanted INPUT:AXIS=NAME or INPUT:AXIS=NAME:MIN..MAX, as in 0:1=tokens:2..4096"
        )

    def test_axes_of_one_name_share_their_length(self) -> None:
        class Sum(nn.Module):
            def forward(
                self, x: torch.Tensor, more: dict[str, torch.Tensor], y: torch.Tensor
            ) -> torch.Tensor:
                return x + y + more["z"]

        args, kwargs = (torch.ones(5, 3), {"z": torch.ones(3)}), {"y": torch.ones(5, 3)}
        axes = [parse_dynamic("0:0=n:2..9"), parse_dynamic("y:0=n:2..9")]
        program = export(Sum(), args, kwargs, dynamic_shapes=dynamic_shapes(Sum(), args, kwargs, axes))
        longer = program.module()(torch.ones(7, 3), {"z": torch.ones(3)}, y=torch.ones(7, 3))
        assert torch.equal(longer, torch.full((7, 3), 3.0))

    @pytest.mark.parametrize("text", ["1:0=n", "0:2=n", "name:0=n"])
    def test_an_axis_that_is_not_there_is_named(self, text: str) -> None:
        with pytest.raises(OptionError) as caught:
            dynamic_shapes(nn.Linear(3, 3), (torch.ones(5, 3),), {}, [parse_dynamic(text)])
        assert str(caught.value).endswith("there is no such axis; tensors among the inputs: 0 (5, 3)")


class TestHuggingFace:
    """A folder as transformers writes it; nothing is downloaded."""

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Path:
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=40,
        )  # fmt: skip
        config.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("name", ["", "config.json"])
    def test_a_config_alone_gives_random_weights_and_says_so(self, tiny: Path, name: str) -> None:
        source = load(str(tiny / name))
        assert source.notes == (f"{tiny} has no weights: they are random",)
        assert source.args[0].shape == (1, 40)
        assert source.runnable()(*source.args).shape == (1, 40, 64)

    def test_its_attention_is_spelled_out(self, tiny: Path) -> None:
        targets = {str(node.target) for node in load(str(tiny)).exported().graph.nodes}
        assert "aten.softmax.int" in targets
        assert "aten.scaled_dot_product_attention.default" not in targets

    def test_its_weights_are_read(self, tiny: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny))
        model.save_pretrained(tiny)
        source = load(str(tiny))
        assert source.notes == ()
        loaded = source.runnable().state_dict()
        assert all(
            torch.equal(loaded[f"language_model.{name}"], value) for name, value in model.state_dict().items()
        )
        assert tiny / "model.safetensors" in source.files

    def test_pickled_weights_are_refused(self, tiny: Path) -> None:
        (tiny / "pytorch_model.bin").write_bytes(b"\x80\x02N.")
        assert "its weights are pickles (pytorch_model.bin)" in message(str(tiny), UnsafeFileError)

    def test_a_giant_without_weights_is_not_built(self, tiny: Path) -> None:
        text = (tiny / "config.json").read_text().replace('"vocab_size": 64', '"vocab_size": 64000000000')
        (tiny / "config.json").write_text(text)
        assert "its weights would take" in message(str(tiny))

    def test_code_in_the_folder_is_not_run(self, tiny: Path) -> None:
        text = (tiny / "config.json").read_text()
        text = text.replace(
            '"model_type": "llama"', '"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}'
        )
        (tiny / "config.json").write_text(text)
        (tiny / "evil.py").write_text("raise SystemExit('it ran')")
        assert "with transformers failed" in message(str(tiny))

    def test_without_transformers_the_error_names_the_extra(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert (
            message(str(tiny), MissingError)
            == "Hugging Face models need transformers; pip install 'attnopt[hf]'"
        )
