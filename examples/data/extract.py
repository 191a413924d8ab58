"""Takes the opening of *Emma* out of Debian's `r-cran-janeaustenr`; how `emma.txt` was made.

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb unpacked
    python extract.py unpacked/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb > emma.txt

No R is needed: the file is a row of objects, each a big-endian length and a zlib stream; a stream is R's XDR
serialisation, here one character vector with a line of the book per element. *Emma* is the first object.
"""

import struct
import sys
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

#: Enough for 4,200 tokens of SmolLM2, and whole paragraphs.
CHARACTERS = 24_000
HEADER = b"X\n"
CHARACTER_VECTOR = 16


def first_object(database: bytes) -> bytes:
    """The first object of an R lazy-load database, inflated."""
    (size,) = struct.unpack_from(">I", database)
    raw = zlib.decompressobj().decompress(database[4:])
    if len(raw) != size or not raw.startswith(HEADER):
        message = f"the first object has {len(raw)} bytes, wanted {size} that start with {HEADER!r}: is this Rdata.rdb?"
        raise ValueError(message)
    return raw


def character_vector(raw: bytes) -> Iterator[str]:
    """The elements of a serialised character vector (R Internals 1.8, format version 3)."""
    position = len(HEADER) + 3 * 4
    (encoding,) = struct.unpack_from(">I", raw, position)
    position += 4 + encoding
    flags, count = struct.unpack_from(">II", raw, position)
    if flags & 0xFF != CHARACTER_VECTOR:
        message = f"an R object of type {flags & 0xFF}, wanted a character vector ({CHARACTER_VECTOR})"
        raise ValueError(message)
    position += 8
    for _ in range(count):
        _flags, length = struct.unpack_from(">II", raw, position)
        position += 8
        yield raw[position : position + length].decode()
        position += length


def paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Runs of lines that are not blank, each run joined by spaces."""
    for is_text, run in groupby(lines, key=lambda line: bool(line.strip())):
        if is_text:
            yield " ".join(run)


def opening(texts: Iterator[str], characters: int) -> Iterator[str]:
    """Whole paragraphs from the start until there are at least `characters`."""
    seen = 0
    for text in texts:
        if seen >= characters:
            return
        seen += len(text)
        yield text


def main(path: str) -> None:
    """Prints the excerpt, one paragraph a line, a blank line between."""
    lines = character_vector(first_object(Path(path).read_bytes()))
    print("\n\n".join(opening(paragraphs(lines), CHARACTERS)))


if __name__ == "__main__":
    main(sys.argv[1])
