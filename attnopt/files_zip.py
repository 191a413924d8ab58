"""Reading a zip archive so strictly that every other reader must see the same entries in it.

Python and torch read zips with different code. An archive that means one thing to the one that inspects and another
to the one that loads would defeat the inspection, so everything that leaves room for two readings is refused: bytes
before or after the archive, two directories, repeated names, compression, encryption, declared sizes that do not fit.
"""

import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from attnopt.errors import UnsafeFileError

_END, _LOCATOR, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL"), struct.Struct("<4sQ2H2L4Q")
_NAME = re.compile(r"[\w.\-+ ]+(/[\w.\-+ ]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive whose entries all lie below one folder, as torch writes them."""

    entries: Mapping[str, int]  # path below that folder -> bytes
    _zip: zipfile.ZipFile
    _root: str

    def read(self, path: str) -> bytes:
        """The bytes of one entry. Raises UnsafeFileError if it is missing or damaged."""
        if path not in self.entries:
            raise UnsafeFileError(f"it has no entry {path!r}")
        try:
            return self._zip.read(f"{self._root}/{path}")
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
            raise UnsafeFileError(f"entry {path!r} is damaged: {error}") from error


def open_archive(stream: BinaryIO) -> Archive:
    """The archive in `stream`, which stays open. Raises UnsafeFileError where two readers could disagree."""
    _need_one_directory(stream)
    try:
        archive = zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError) as error:
        raise UnsafeFileError(f"its directory is damaged: {error}") from error
    entries = archive.infolist()
    _need_plain_entries(entries, _size(stream))
    roots = {entry.filename.partition("/")[0] for entry in entries}
    if len(roots) != 1:
        raise UnsafeFileError(f"its entries lie in {len(roots)} folders; torch writes one")
    root = roots.pop()
    return Archive({entry.filename[len(root) + 1 :]: entry.file_size for entry in entries}, archive, root)


def names_in(stream: BinaryIO) -> tuple[str, ...]:
    """The entry names of any zip, to tell what kind of file it is; () when it is no zip."""
    try:
        with zipfile.ZipFile(stream) as archive:
            return tuple(archive.namelist())
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError):
        return ()


def _size(stream: BinaryIO) -> int:
    return stream.seek(0, 2)


def _need_one_directory(stream: BinaryIO) -> None:
    """The directory must end where its end record, without a comment, closes the file; offsets must be absolute."""
    size = _size(stream)
    tail = _unpack(stream, _END, size - _END.size)
    if tail[0] != b"PK\x05\x06" or tail[7] != 0:
        raise UnsafeFileError("it is not a complete zip archive: truncated, or something was added to it")
    end, length, start = size - _END.size, tail[5], tail[6]
    locator = _unpack(stream, _LOCATOR, end - _LOCATOR.size)
    if locator[0] == b"PK\x06\x07":
        end = end - _LOCATOR.size - _END64.size
        record = _unpack(stream, _END64, end)
        if record[0] != b"PK\x06\x06" or locator[2] != end:
            raise UnsafeFileError("its 64-bit directory is not where it says")
        length, start = record[8], record[9]
    if start + length != end:
        raise UnsafeFileError("its directory is not where it says: something was put before or behind it")


def _unpack(stream: BinaryIO, record: struct.Struct, at: int) -> tuple[Any, ...]:
    """A record of the file, or zeros where the file is too short to have one."""
    if at < 0:
        return (0,) * 16
    stream.seek(at)
    return record.unpack(stream.read(record.size))


def _need_plain_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    for complaint in (complaint for entry in entries for complaint in _complaints(entry)):
        raise UnsafeFileError(complaint)
    names = [entry.filename.casefold() for entry in entries]
    repeated = {name for name in names if names.count(name) > 1} if len({*names}) != len(names) else set()
    if repeated:
        raise UnsafeFileError(f"entry {min(repeated)!r} is there twice")
    if sum(entry.file_size for entry in entries) > size:
        raise UnsafeFileError("its entries claim more bytes than the file has")
    if not entries or min(entry.header_offset for entry in entries) != 0:
        raise UnsafeFileError("it does not start with its first entry")


def _complaints(entry: zipfile.ZipInfo) -> Iterator[str]:
    name = entry.filename
    if ".." in name.split("/") or name.startswith("/") or not _NAME.fullmatch(name):
        yield f"entry {name!r} has a path that torch does not write (absolute, '..' or unusual letters)"
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        yield f"entry {name!r} is compressed; torch stores its entries as they are"
    if entry.flag_bits & ~0x0808:  # torch sets "sizes follow the data" and "names are UTF-8"
        yield f"entry {name!r} is encrypted or of an unusual kind"
