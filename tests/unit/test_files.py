"""A .pt2 from a stranger: either it loads and holds only numbers and ATen calls, or it is refused with the reason."""

import io
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from attnopt.errors import OutputError, SourceError, UnsafeFileError
from attnopt.files import atomic, inspect, load_program, save_program

Entries = dict[str, bytes]
_MODEL, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/model_weights_config.json"


class Toy(nn.Module):
    """A buffer, a constant, a dict among the inputs, a branch, a region without gradients and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(64, 64, dtype=torch.bool).tril())
        self.constant = torch.arange(8.0)

    def forward(self, x: Tensor, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = x.shape[1]
        hidden = self.project(x) + self.constant
        with torch.no_grad():
            shift = torch.arange(tokens)[:, None] * 0.5
        scores = (hidden @ hidden.mT).masked_fill(~self.mask[:tokens, :tokens], float("-inf"))
        out = torch.cond(
            extra["weight"].sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (scores.softmax(-1) @ hidden,)
        )
        return {"out": out + shift, "length": torch.arange(tokens)}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    """Toy with a dynamic number of tokens."""
    torch.manual_seed(0)
    inputs = (torch.randn(2, 5, 8), {"weight": torch.ones(3)})
    tokens = Dim("tokens", min=2, max=63)
    model = Toy().eval().requires_grad_(requires_grad=False)
    return export(model, inputs, dynamic_shapes={"x": {1: tokens}, "extra": {"weight": None}})


@pytest.fixture(scope="module")
def honest(program: ExportedProgram) -> bytes:
    """The bytes of a .pt2 as torch writes it."""
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Writes bytes to a .pt2 and returns its path."""

    def write(content: bytes, name: str = "model.pt2") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def entries_of(content: bytes) -> Entries:
    """The entries of a .pt2, by path below its root folder."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def archive_of(entries: Entries, root: str = "archive", method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of `entries`."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    return stream.getvalue()


def with_entry(content: bytes, name: str, value: bytes) -> bytes:
    """`content` with one entry replaced or added."""
    return archive_of({**entries_of(content), name: value})


def with_json(content: bytes, name: str, edit: Callable[[dict[str, object]], None]) -> bytes:
    """`content` with one JSON entry edited in place."""
    body = json.loads(entries_of(content)[name])
    edit(body)
    return with_entry(content, name, json.dumps(body).encode())


def pickle_calling(module: str, name: str, argument: str) -> bytes:
    """A pickle, written by hand, that calls `module.name(argument)` when it is loaded."""
    text = argument.encode()
    return (
        b"\x80\x02c"
        + f"{module}\n{name}\n".encode()
        + b"X"
        + len(text).to_bytes(4, "little")
        + text
        + b"\x85R."
    )


def saved(pickle: bytes, **more: bytes) -> bytes:
    """What torch.save would write around a pickle."""
    return archive_of({"data.pkl": pickle, "byteorder": b"little", "version": b"3\n", **more})


def nodes(body: dict[str, object]) -> list[dict[str, object]]:
    """The nodes of a program's JSON."""
    return body["graph_module"]["graph"]["nodes"]


def first_size(body: dict[str, object]) -> dict[str, object]:
    """The first symbolic size of a program's JSON."""
    values = body["graph_module"]["graph"]["tensor_values"].values()
    return next(size["as_expr"] for value in values for size in value["sizes"] if "as_expr" in size)


def refusal(path: Path) -> str:
    """The message with which a file is refused."""
    with pytest.raises(UnsafeFileError) as caught:
        load_program(path)
    return str(caught.value)


def outcome(path: Path) -> str:
    """What inspecting a file comes to."""
    try:
        inspect(path)
    except UnsafeFileError as error:
        return str(error)
    return f"{path} passed"


def test_an_honest_program_is_loaded_and_computes_the_same(
    program: ExportedProgram, file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "saved.pt2"
    with atomic(path) as stream:
        save_program(program, stream)
    inputs = (torch.randn(2, 9, 8), {"weight": -torch.ones(3)})
    expected = program.module()(*inputs)
    actual = load_program(path).module()(*inputs)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_a_program_rewritten_by_pythons_zip_is_still_honest(honest: bytes, file: Callable[..., Path]) -> None:
    assert "torch.ops.higher_order.cond" in inspect(file(archive_of(entries_of(honest)))).targets


def test_saving_with_extra_files_is_honest(program: ExportedProgram, file: Callable[..., Path]) -> None:
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={"notes.txt": "hello"})
    assert inspect(file(stream.getvalue()))


class TestAttacksThatTorchWouldRun:
    """Each of these runs code under plain torch; attnopt refuses it and nothing runs."""

    @pytest.fixture
    def trap(self, tmp_path: Path) -> Path:
        """A folder that the attack would make."""
        return tmp_path / "trap"

    def test_a_pickle_in_place_of_the_sample_inputs(
        self, honest: bytes, file: Callable[..., Path], trap: Path
    ) -> None:
        path = file(with_entry(honest, _INPUTS, saved(pickle_calling("os", "mkdir", str(trap)))))
        assert "its sample inputs: its pickle would import 'os.mkdir'" in refusal(path)
        assert not trap.exists()
        with pytest.raises(SourceError):  # mkdir returns no inputs, so torch gives up after it has run it
            load_program(path, allow_unsafe=True)
        assert trap.exists()

    def test_code_in_a_size_expression(self, honest: bytes, file: Callable[..., Path], trap: Path) -> None:
        attack = f"__import__('os').mkdir('{trap}') or Symbol('s9')"
        path = file(with_json(honest, _MODEL, lambda body: first_size(body).update(expr_str=attack)))
        assert "expr_str" in refusal(path)
        assert not trap.exists()
        with pytest.raises(SourceError):
            load_program(path, allow_unsafe=True)
        assert trap.exists()

    def test_code_in_a_guard(self, honest: bytes, file: Callable[..., Path], trap: Path) -> None:
        attack = f"__import__('os').mkdir('{trap}') is None"
        path = file(with_json(honest, _MODEL, lambda body: body.update(guards_code=[attack])))
        assert "guards_code" in refusal(path)
        assert not trap.exists()

    def test_a_call_to_a_function_that_is_no_operator(self, honest: bytes, file: Callable[..., Path]) -> None:
        path = file(with_json(honest, _MODEL, lambda body: nodes(body)[1].update(target="torch.os.system")))
        assert refusal(path) == (
            f"will not load {path}: its program has, as target, 'torch.os.system': it is not an operator of ATen, "
            "attnopt, transformers or torchvision; if you would run code from whoever made it, say --allow-unsafe-load"
        )

    def test_code_in_a_name(self, honest: bytes, file: Callable[..., Path], trap: Path) -> None:
        attack = f"x=__import__('os').mkdir('{trap}')"
        path = file(with_json(honest, _MODEL, lambda body: nodes(body)[0].update(name=attack)))
        assert "wanted a name" in refusal(path)


_BAD_EXPRESSIONS = [
    "Symbol('s0').__class__",
    "exec('1')",
    "open('x')",
    "Abs('1')",
    "S('1')",
    "(lambda: 1)()",
    "[x for x in (1,)]",
    "Symbol('s0')[0]()",
    "Pow(Integer(9), Integer(999999999))",
    "9**9**9",
    "1 << 999999999",
    "9" * 40,
    "Symbol('s0') #",
    'Symbol("s0")',
    "f'{1}'",
    "Symbol('s0'",
    "a := 1",
    "\uff33ymbol('s0')",  # Python reads this letter as an S
    "*a",
    "x if y else z",
    "L['x'].data_ptr()",
    "math.__loader__",
    "-" * 30_000 + "1",
    "(" * 5000 + "1" + ")" * 5000,
]


@pytest.mark.parametrize("text", _BAD_EXPRESSIONS, ids=lambda text: text[:30])
@pytest.mark.parametrize("place", ["size", "guard"])
def test_an_expression_that_is_more_than_arithmetic_is_refused(
    honest: bytes, file: Callable[..., Path], text: str, place: str
) -> None:
    def edit(body: dict[str, object]) -> None:
        first_size(body).update(expr_str=text) if place == "size" else body.update(guards_code=[text])

    assert "its program has, as" in refusal(file(with_json(honest, _MODEL, edit)))


@pytest.mark.parametrize(
    "text",
    [
        "s27",
        "8*s27 + 1",
        "Mul(Integer(8), Symbol('s27', positive=True, integer=True))",
        "Pow(Symbol('s27', positive=True, integer=True), Integer(2))",
        "FloorDiv(Add(Symbol('u0', integer=True), Integer(-1)), Integer(2))",
        "Float('1.5', precision=53)",
        "L['x'].size()[1] == 3 and L['args'][0].stride()[0] % 2 == 0",
        "max(L['x'].size()[0], 2) <= 2*L['y'].size()[1]",
        "math.ceil(L['x'].size()[0]/2) < 7",
    ],
)
def test_arithmetic_is_allowed(honest: bytes, file: Callable[..., Path], text: str) -> None:
    assert inspect(file(with_json(honest, _MODEL, lambda body: body.update(guards_code=[text]))))


@pytest.mark.parametrize(
    ("target", "fine"),
    [
        ("torch.ops.aten.relu.default", True),
        ("torch.ops.attnopt.streaming.default", True),
        ("torch.ops.prims.convert_element_type.default", True),
        ("torch.ops.transformers.grouped_mm_fallback.default", True),
        ("_operator.add", True),
        ("torch.sym_max", True),
        ("torch.ops.aten.save.default", False),
        ("torch.ops.aten.from_file.default", False),
        ("torch.ops.aten.relu.default.__call__", False),
        ("torch.ops.inductor.accumulate_grad_.default", False),
        ("torch.ops.higher_order.call_torchbind", False),
        ("torch.ops.load_library", False),
        ("torch.hub.load", False),
        ("_operator.attrgetter", False),
        ("_operator.methodcaller", False),
        ("math.__loader__", False),
        ("#executorch:x", False),
        ("os.system", False),
    ],
)
@pytest.mark.parametrize("key", ["target", "as_operator"])
def test_only_operators_may_be_called(
    honest: bytes, file: Callable[..., Path], target: str, key: str, *, fine: bool
) -> None:
    def edit(body: dict[str, object]) -> None:
        argument = {"name": "", "arg": {"as_operator": target}}
        nodes(body)[1].update({"target": target} if key == "target" else {"inputs": [argument]})

    path = file(with_json(honest, _MODEL, edit))
    if fine:
        assert target in inspect(path).targets
    else:
        assert "it is not an operator of ATen" in refusal(path)


def spec_edit(spec: str) -> Callable[[dict[str, object]], None]:
    """Replaces the layout of the inputs."""
    return lambda body: body["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec)


def tree(kind: str, context: object) -> str:
    """A tree spec of one node."""
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


@pytest.mark.parametrize(
    "spec",
    [
        tree(
            "collections.defaultdict",
            {"default_factory_module": "antigravity", "default_factory_name": "fly"},
        ),
        tree("builtins.dict", json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "y"}])),
        tree("builtins.dict", json.dumps(['a"]; import os #'])),
        tree("builtins.dict", json.dumps({"a": 1})),
        tree("builtins.dict\n", "null"),
        "not json",
    ],
)
def test_a_tree_spec_that_could_import_or_inject_is_refused(
    honest: bytes, file: Callable[..., Path], spec: str
) -> None:
    assert refusal(file(with_json(honest, _MODEL, spec_edit(spec))))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda b: b["graph_module"]["module_call_graph"][0].update(fqn="a'b"), "wanted letters"),
        (
            lambda b: b["graph_module"]["module_call_graph"][0]["signature"].update(
                forward_arg_names=["a=1"]
            ),
            "wanted a name",
        ),
        (
            lambda b: b["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=["if"]),
            "keyword",
        ),
        (lambda b: nodes(b)[0]["metadata"].update(stack_trace="x\rimport os"), "control characters"),
        (
            lambda b: nodes(b)[0]["inputs"][0].update(arg={"as_custom_obj": {"name": "a", "class_fqn": "b"}}),
            "custom object",
        ),
        (lambda b: b["graph_module"]["graph"].update(custom_obj_values={"a": {}}), "custom object"),
        (lambda b: b.update(something_new="eval('1')"), "wanted letters"),
        (lambda b: b["range_constraints"].update({"s0');": {"min_val": 1, "max_val": 2}}), "wanted letters"),
    ],
)
def test_text_that_could_become_code_is_refused(
    honest: bytes, file: Callable[..., Path], edit: Callable[[dict[str, object]], None], reason: str
) -> None:
    assert reason in refusal(file(with_json(honest, _MODEL, edit)))


def payload(**changes: object) -> Callable[[dict[str, object]], None]:
    """Changes how the first weight is stored."""
    return lambda body: next(iter(body["config"].values())).update(changes)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (payload(use_pickle=True), "stored as a pickle"),
        (payload(use_pickle=1), "stored as a pickle"),
        (payload(use_pickle=None), "stored as a pickle"),
        (payload(path_name="../sample_inputs/model.pt"), "which is not there"),
        (payload(path_name="weight_99"), "which is not there"),
        (payload(path_name="custom_obj_0"), "which is not there"),
        (payload(path_name="opaque_obj_0"), "which is not there"),
        (payload(tensor_meta=None), "torch does not write"),
        (lambda b: b.update(config=[]), "does not have the form"),
    ],
)
def test_weights_must_be_raw_numbers(
    honest: bytes, file: Callable[..., Path], edit: Callable[[dict[str, object]], None], reason: str
) -> None:
    assert reason in refusal(file(with_json(honest, _WEIGHTS, edit)))


def test_weights_that_claim_more_than_they_bring_are_refused(
    honest: bytes, file: Callable[..., Path]
) -> None:
    assert "without its numbers" in refusal(file(with_entry(honest, "data/weights/weight_0", b"")))


@pytest.mark.parametrize(
    ("pickle", "reason"),
    [
        (pickle_calling("builtins", "eval", "1"), "would import 'builtins.eval'"),
        (pickle_calling("torch.serialization", "load", "x"), "would import 'torch.serialization.load'"),
        (pickle_calling("torch._utils", "_rebuild_tensor_v3", "x"), "would import"),
        (b"\x80\x04X\x02\x00\x00\x00osX\x05\x00\x00\x00mkdir\x93.", "instruction STACK_GLOBAL"),
        (b"\x80\x02(ios\nmkdir\n.", "instruction INST"),
        (b"\x80\x02}}b.", "instruction BUILD"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "absurd amount of memory"),
        (b"\x80\x02N", "malformed"),
        (b"\xff", "malformed"),
        (b"", "malformed"),
    ],
)
def test_the_pickle_of_the_sample_inputs_may_only_build_tensors(
    honest: bytes, file: Callable[..., Path], pickle: bytes, reason: str
) -> None:
    assert reason in refusal(file(with_entry(honest, _INPUTS, saved(pickle))))


def test_sample_inputs_that_hide_a_torchscript_archive_are_refused(
    honest: bytes, file: Callable[..., Path]
) -> None:
    disguised = archive_of({"data.pkl": b"\x80\x02).", "constants.pkl": b"\x80\x02)."})
    assert "unexpected entry 'constants.pkl'" in refusal(file(with_entry(honest, _INPUTS, disguised)))


def test_sample_inputs_that_are_a_bare_pickle_are_refused(honest: bytes, file: Callable[..., Path]) -> None:
    assert "its sample inputs" in refusal(
        file(with_entry(honest, _INPUTS, pickle_calling("os", "mkdir", "x")))
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.py", "has a path that torch does not write"),
        ("/etc/passwd", "has a path that torch does not write"),
        ("data/weights/..", "has a path that torch does not write"),
        ("data\\weights", "has a path that torch does not write"),
        ("data/aotinductor/model/x.so", "compiled library"),
        ("data/constants/custom_obj_0", "custom object"),
        ("data/constants/opaque_obj_0", "opaque object"),
        ("data/weights/model.pt", "old format"),
        ("models/other.json", "unexpected entry"),
        ("code/__torch__.py", "TorchScript"),
    ],
)
def test_an_entry_that_does_not_belong_is_refused(
    honest: bytes, file: Callable[..., Path], name: str, reason: str
) -> None:
    assert reason in refusal(file(with_entry(honest, name, b"x")))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle_calling("os", "mkdir", "x"), "it is a pickle"),
        (saved(b"\x80\x02)."), "written by torch.save"),
        (
            archive_of({"data.pkl": b"", "constants.pkl": b"", "code/__torch__.py": b""}),
            "written by torch.save",
        ),
        (archive_of({"constants.pkl": b"", "data.pkl": b""}), "TorchScript"),
        (archive_of({".data/extern_modules": b"", "m.py": b""}), "torch.package"),
        (archive_of({"serialized_state_dict.pt": b""}), "old format"),
        (archive_of({}), "it does not start with its first entry"),
        (b"", "not a complete zip archive"),
        (b"hello", "not a complete zip archive"),
        (b"PK\x03\x04", "not a complete zip archive"),
    ],
)
def test_other_kinds_of_file_are_named(file: Callable[..., Path], content: bytes, reason: str) -> None:
    assert reason in refusal(file(content))


def test_compressed_entries_are_refused(honest: bytes, file: Callable[..., Path]) -> None:
    bomb = archive_of({**entries_of(honest), "extra/zeros": bytes(10_000_000)}, method=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    assert "is compressed" in refusal(file(bomb))


def test_repeated_entries_are_refused_whatever_their_case(honest: bytes, file: Callable[..., Path]) -> None:
    entries = entries_of(honest)
    assert "is there twice" in refusal(file(archive_of({**entries, "Models/model.json": entries[_MODEL]})))


@pytest.mark.parametrize("where", ["before", "behind"])
def test_bytes_around_the_archive_are_refused(honest: bytes, file: Callable[..., Path], where: str) -> None:
    content = b"#!/bin/sh\n" + honest if where == "before" else honest + b"\0"
    assert refusal(file(content))


def test_a_second_directory_is_refused(honest: bytes, file: Callable[..., Path]) -> None:
    """Python would follow the last one by its end, torch by its offset."""
    plain = archive_of(entries_of(honest))
    size, offset = (int.from_bytes(plain[-10 + i : -6 + i], "little") for i in (0, 4))
    moved = plain[:offset] + plain[offset : offset + size] * 2 + plain[offset + size :]
    assert "its directory is not where it says" in refusal(file(moved))


def test_two_root_folders_are_refused(honest: bytes, file: Callable[..., Path]) -> None:
    stream = io.BytesIO(archive_of(entries_of(honest)))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("other/models/model.json", b"{}")
    assert "2 folders" in refusal(file(stream.getvalue()))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_truncated_file_is_refused(honest: bytes, file: Callable[..., Path], share: float) -> None:
    assert "truncated" in refusal(file(honest[: int(len(honest) * share)]))


def test_a_file_that_is_not_there_is_a_source_error(tmp_path: Path) -> None:
    path = tmp_path / "none.pt2"
    with pytest.raises(SourceError, match="No such file or directory"):
        load_program(path)


def test_a_program_of_another_version_of_torch_is_a_source_error(
    honest: bytes, file: Callable[..., Path]
) -> None:
    path = file(with_json(honest, _MODEL, lambda body: body["schema_version"].update(major=99)))
    with pytest.raises(SourceError) as caught:
        load_program(path)
    assert str(caught.value).startswith(
        f"loading {path} with torch.export failed: SerializeError: Serialized schema"
    )


def test_an_operator_of_another_version_is_named(honest: bytes, file: Callable[..., Path]) -> None:
    target = "torch.ops.attnopt.from_the_future.default"
    path = file(with_json(honest, _MODEL, lambda body: nodes(body)[1].update(target=target)))
    with pytest.raises(SourceError, match=r"has no operator torch\.ops\.attnopt\.from_the_future"):
        load_program(path)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_anywhere_ends_in_a_typed_error_or_in_the_same_program(
    honest: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(honest) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.pt2"
    path.write_bytes(damaged)
    assert str(path) in outcome(path)


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pickle=st.binary(max_size=60))
def test_any_bytes_as_a_pickle_end_in_a_typed_error_or_pass_without_a_foreign_import(
    honest: bytes, tmp_path: Path, pickle: bytes
) -> None:
    path = tmp_path / "pickle.pt2"
    path.write_bytes(with_entry(honest, _INPUTS, saved(b"\x80\x02" + pickle)))
    assert "its sample inputs" in outcome(path) or outcome(path) == f"{path} passed"


class TestWriting:
    """A result is there whole or not at all."""

    def write_and_fail(self, path: Path, error: BaseException) -> None:
        with atomic(path, force=True) as stream:
            stream.write(b"half")
            raise error

    def test_a_file_appears_with_the_usual_permissions(self, tmp_path: Path) -> None:
        with atomic(tmp_path / "a.txt") as stream:
            stream.write(b"all")
        (tmp_path / "plain.txt").write_bytes(b"")
        assert (tmp_path / "a.txt").read_bytes() == b"all"
        assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE(
            (tmp_path / "plain.txt").stat().st_mode
        )

    @pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
    def test_a_failure_leaves_the_old_file_and_no_draft(
        self, tmp_path: Path, kind: type[BaseException]
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"old")
        with pytest.raises(kind):
            self.write_and_fail(path, kind())
        assert path.read_bytes() == b"old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]

    def test_an_existing_file_needs_force(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"old")
        with pytest.raises(OutputError) as caught, atomic(path):
            pass
        assert str(caught.value) == f"will not overwrite {path}; choose another name or say --force"

    def test_the_input_is_never_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(b"old")
        (tmp_path / "link").symlink_to(path)
        for name in ("a.txt", "link"):
            with (
                pytest.raises(OutputError, match="it is the input"),
                atomic(tmp_path / name, force=True, inputs=[path]),
            ):
                pass

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="there is no folder"), atomic(tmp_path / "no" / "a.txt"):
            pass

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="it is a folder"), atomic(tmp_path):
            pass

    def test_an_error_of_the_system_becomes_a_typed_one(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="No space left on device"):
            self.write_and_fail(tmp_path / "a.txt", OSError(28, "No space left on device"))
        assert list(tmp_path.iterdir()) == []

    def test_a_disk_that_fills_up_ends_in_a_typed_error(
        self, program: ExportedProgram, tmp_path: Path
    ) -> None:
        """torch's own writer would end the process."""
        path = tmp_path / "a.pt2"
        with pytest.raises(OutputError, match="No space left on device"), atomic(path) as stream:
            save_program(program, Small(stream))
        assert list(tmp_path.iterdir()) == []


class Small(io.BytesIO):
    """A disk with room for a thousand bytes."""

    def __init__(self, stream: io.BufferedWriter) -> None:
        super().__init__()
        self.stream = stream

    def write(self, data: bytes) -> int:
        if self.stream.tell() + len(data) > 1000:
            raise OSError(28, "No space left on device")
        return self.stream.write(data)
