"""Files: looking into a .pt2 before it is loaded, loading it, and writing results so that no half of one remains."""

import importlib
import io
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from attnopt.errors import Blame, MissingError, OutputError, SourceError, UnsafeFileError
from attnopt.files_graph import Contents, check_program, parse
from attnopt.files_pickle import check_saved
from attnopt.files_zip import Archive, names_in, open_archive

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_PROGRAM, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_WEIGHTS, _CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|\.format_version|"
    r"\.storage_alignment|models/model\.json|data/sample_inputs/model\.pt|extra/.+|"
    r"data/weights/(model_weights_config\.json|weight_\d+)|data/constants/(model_constants_config\.json|tensor_\d+)"
)
_PAYLOADS = re.compile(r"(weight|tensor)_\d+")

#: Name of an entry -> what the file is, and why loading it runs code; the first match tells.
_KINDS = (
    (r"data/aotinductor/", "it holds a compiled library (AOTInductor), and loading it runs its code"),
    (
        r"\.data/extern_modules|\.data/python_version",
        "it is a torch.package archive, which runs the code inside it",
    ),
    (r"constants\.pkl|code/", "it is a TorchScript archive, which runs the code inside it"),
    (r"data/constants/custom_obj_", "it has a custom object as a constant, stored as a pickle"),
    (r"data/constants/opaque_obj_", "it has an opaque object as a constant, stored as a pickle"),
    (
        r"data/(weights|constants)/[^/]*\.pt|serialized_state_dict",
        "its weights are stored as a pickle (old format)",
    ),
    (r"data\.pkl", "it is a pickle written by torch.save, not an exported program"),
)

#: Packages whose operators and types a program may use -> the modules that register them.
_REGISTRARS = MappingProxyType(
    {
        "transformers": ("transformers.modeling_outputs", "transformers.integrations.moe"),
        "torchvision": ("torchvision",),
    }
)


def inspect(path: Path) -> Contents:
    """What the program in a .pt2 calls and needs. Nothing is loaded, unpickled or imported.

    Raises UnsafeFileError when loading the file would, or could, run code that is inside it, when it is truncated
    or is something else than an exported program; SourceError when it cannot be read.
    """
    with _opened(path) as stream:
        return _inspect(path, stream)


def load_program(path: Path, *, allow_unsafe: bool = False) -> "ExportedProgram":
    """The exported program in a .pt2, inspected first. attnopt's operators are registered before.

    allow_unsafe: load it without inspection; only for files from people whose code you would run.
    Raises UnsafeFileError as `inspect` does, and SourceError when torch cannot load the program.
    """
    with _opened(path) as stream:
        if not allow_unsafe:
            _prepare(path, _inspect(path, stream))
        importlib.import_module("attnopt.ops")
        stream.seek(0)
        with Blame(
            f"loading {path} with torch.export", "it may be of another version of torch; -v shows more"
        ):
            return _load_as_is(stream) if allow_unsafe else _load(stream)


def save_program(program: "ExportedProgram", stream: BinaryIO) -> None:
    """Writes `program` as a .pt2 into `stream` (see `atomic`). Raises what the stream raises, such as a full disk."""
    import torch

    steady = _Steady(stream)
    torch.export.save(program, cast("BinaryIO", steady))
    if steady.error:
        raise steady.error


class _Steady(io.RawIOBase):
    """A stream that never fails while torch writes, since torch would end the process; `error` is told afterwards."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.stream.seek(offset, whence)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextmanager
def atomic(path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[BinaryIO]:
    """A stream that becomes the file `path` when the block ends well, and leaves nothing behind when it does not.

    force: replace an existing file. inputs: files that must not be replaced, whatever `force` says.
    Raises OutputError when the file may not or cannot be written.
    """
    check_writable(path, force=force, inputs=inputs)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with draft.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def check_writable(path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Raises OutputError when `path` may not be written; called early, before the long work."""
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder")
    if any(path.exists() and given.exists() and path.samefile(given) for given in inputs):
        raise OutputError(f"will not write {path}: it is the input; choose another name with -o")
    if path.exists() and not force:
        raise OutputError(f"will not overwrite {path}; choose another name or say --force")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: no permission to write in {path.parent}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """One handle for looking and loading, so that both see the same file."""
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error


def _inspect(path: Path, stream: BinaryIO) -> Contents:
    try:
        _need_program_kind(stream)
        archive = open_archive(stream)
        _need_known_entries(archive)
        for config in (_WEIGHTS, _CONSTANTS):
            _check_payloads(archive, config)
        check_saved(archive.read(_INPUTS), "its sample inputs")
        return check_program(_text(archive, _PROGRAM))
    except UnsafeFileError as error:
        hint = "if you would run code from whoever made it, say --allow-unsafe-load"
        raise UnsafeFileError(f"will not load {path}: {error}; {hint}") from error


def _need_program_kind(stream: BinaryIO) -> None:
    """Tells other kinds of file by name, before their oddities are listed."""
    names = names_in(stream)
    for name in ("/".join(name.split("/")[1:]) or name for name in names):
        for pattern, reason in _KINDS:
            if re.match(pattern, name):
                raise UnsafeFileError(reason)
    stream.seek(0)
    if not names and stream.read(1) == b"\x80":
        raise UnsafeFileError("it is a pickle, which runs the code inside it")


def _need_known_entries(archive: Archive) -> None:
    for path in archive.entries:
        if not _ENTRIES.fullmatch(path):
            raise UnsafeFileError(f"it has the unexpected entry {path!r}")
    if archive.read("archive_format") != b"pt2":
        raise UnsafeFileError("it is not marked as a pt2 archive")


def _check_payloads(archive: Archive, config: str) -> None:
    """Weights must be raw numbers: `use_pickle` would hand them to the unpickler."""
    body = parse(_text(archive, config))
    payloads = body.get("config") if isinstance(body, dict) else None
    if not isinstance(payloads, dict):
        raise UnsafeFileError(f"{config} does not have the form that torch writes")
    for name, payload in payloads.items():
        reason = _payload_reason(archive, config, payload)
        if reason:
            raise UnsafeFileError(f"{reason} ({config.split('/')[1]} {name!r})")


def _payload_reason(archive: Archive, config: str, payload: object) -> str:
    match payload:
        case {
            "use_pickle": False,
            "path_name": str(path),
            "tensor_meta": {"sizes": list(sizes), "strides": list(steps)},
        }:
            entry = f"{config.rpartition('/')[0]}/{path}"
        case {"use_pickle": use} if use is not False:
            return "it has a value stored as a pickle"
        case _:
            return "it has a value described in a form that torch does not write"
    if not _PAYLOADS.fullmatch(path) or entry not in archive.entries:
        return f"it has a value in {path!r}, which is not there"
    if not all(isinstance(size, dict) and type(size.get("as_int")) is int for size in [*sizes, *steps]):
        return "it has a value whose size is not a number"
    if archive.entries[entry] == 0 and all(size["as_int"] for size in sizes):
        return "it has a value without its numbers"
    return ""


def _text(archive: Archive, path: str) -> str:
    try:
        return archive.read(path).decode()
    except UnicodeDecodeError as error:
        raise UnsafeFileError(f"{path} is not text") from error


def _prepare(path: Path, needs: Contents) -> None:
    """Registers what the program needs, and says clearly what is not there: torch would only say that it failed."""
    import torch

    importlib.import_module("attnopt.ops")
    for package in sorted({_package(need) for need in needs.targets | needs.types} & _REGISTRARS.keys()):
        _register(path, package)
    for target in sorted(target for target in needs.targets if target.startswith("torch.ops.")):
        _, _, space, name, *_ = target.split(".")
        if space != "higher_order" and not hasattr(getattr(torch.ops, space), name):
            raise SourceError(
                f"cannot load {path}: this version of torch and attnopt has no operator {target}"
            )


def _package(need: str) -> str:
    """`transformers` for `torch.ops.transformers.x` and for `transformers.modeling_outputs.X`."""
    return need.removeprefix("torch.ops.").partition(".")[0]


def _register(path: Path, package: str) -> None:
    """Imports the modules of a known package that register its operators and output types with torch."""
    try:
        for module in _REGISTRARS[package]:
            importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"{path} needs the package {package}; install it") from error


def _load(stream: BinaryIO) -> "ExportedProgram":
    """What torch.export.load does, but telling the cause when it fails."""
    from torch.export.pt2_archive._package import load_pt2

    return load_pt2(stream).exported_programs["model"]


def _load_as_is(stream: BinaryIO) -> "ExportedProgram":
    """Reads older forms, too."""
    import torch

    return torch.export.load(stream)


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
