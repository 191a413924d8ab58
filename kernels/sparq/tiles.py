"""How the Triton kernels cut the work: a pure function of the sizes."""

from dataclasses import dataclass

from attnopt.kernels.sparq.request import Request

#: Programs that keep a large GPU busy; the sequence is split until there are about this many.
PROGRAMS = 512
#: The most parts whose maxima and sums one program reduces at once.
MOST_PARTS = 128
#: The most scores that one program of the keys kernel holds: heads of a group times positions.
MOST_SCORES = 8192


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes are powers of two from 16, the lengths of splits multiples of the tiles in them.

    block, split: positions in a tile, and in a program, of the logits kernel. key_block: positions in a program of the
    keys kernel. chosen_block, chosen_split: chosen positions in a tile, and in a program, of the attention kernel.
    """

    block: int = 128
    split: int = 1024
    key_block: int = 1024
    chosen_block: int = 32
    chosen_split: int = 256


def choose_tiles(request: Request) -> Tiles:
    """Tiles for these sizes: splits long enough to be worth a program, and as many as a large GPU wants."""
    groups, sk = request.k.shape[0] * request.k.shape[1], request.k.shape[2]
    parts = min(MOST_PARTS, max(1, PROGRAMS // groups))
    is_wide = max(request.q.shape[3], request.v.shape[3]) > 128
    heads = 1 << (request.group - 1).bit_length()
    return Tiles(
        key_block=max(16, min(1024, MOST_SCORES // heads)),
        split=_part(sk, parts, least=512),
        chosen_block=16 if is_wide else 32,
        chosen_split=_part(min(request.topk, sk), parts, least=256),
    )


def _part(length: int, parts: int, *, least: int) -> int:
    """The power of two, at least `least`, of which at most `parts` cover `length`."""
    each = max(least, -(-length // parts))
    return 1 << (each - 1).bit_length()
