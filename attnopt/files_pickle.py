"""Reading a pickle without running it: which instructions it has and which names it would import.

A pickle is a program. Here only those instructions pass that build plain data and rebuild tensors, and only the
imports that tensors need; the list is what `torch.save` writes for tensors, numbers, strings and containers of them.
"""

import io
import pickletools
import re

from attnopt.errors import UnsafeFileError
from attnopt.files_graph import words
from attnopt.files_zip import open_archive

_INSTRUCTIONS = words(
    "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID REDUCE"
)
_DTYPES = words(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
)
_STORAGES = words("Bool Byte Char Short Int Long Half BFloat16 Float Double ComplexFloat ComplexDouble")
_IMPORTS = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch.storage UntypedStorage",
        "torch Size",
        "torch device",
        *(f"torch {name}" for name in _DTYPES),
        *(f"torch {name}Storage" for name in _STORAGES),
    }
)
_ENTRIES = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+"
)
_MEMO = 1_000_000  # a larger slot number only serves to exhaust memory


def check_saved(content: bytes, what: str) -> None:
    """Raises UnsafeFileError unless `content`, written by `torch.save`, holds tensors and plain data only.

    what: how to call it in the message. Nothing is unpickled.
    """
    try:
        _check_archive(content)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{what}: {error}") from error


def _check_archive(content: bytes) -> None:
    if not content:
        return
    archive = open_archive(io.BytesIO(content))
    for path in archive.entries:
        if not _ENTRIES.fullmatch(path):
            raise UnsafeFileError(f"it has the unexpected entry {path!r}")
    _check_pickle(archive.read("data.pkl"))


def _check_pickle(content: bytes) -> None:
    try:
        for instruction, argument, _ in pickletools.genops(content):
            _check_instruction(instruction.name, argument)
    except (ValueError, UnicodeError, IndexError) as error:
        raise UnsafeFileError(f"its pickle is malformed: {error}") from error


def _check_instruction(name: str, argument: object) -> None:
    if name not in _INSTRUCTIONS:
        raise UnsafeFileError(f"its pickle uses the instruction {name}, which plain tensors do not need")
    if name == "GLOBAL" and argument not in _IMPORTS:
        raise UnsafeFileError(f"its pickle would import {str(argument).replace(' ', '.')!r}")
    if name == "LONG_BINPUT" and isinstance(argument, int) and argument > _MEMO:
        raise UnsafeFileError("its pickle asks for an absurd amount of memory")
