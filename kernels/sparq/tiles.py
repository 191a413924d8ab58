"""How the Triton kernels cut the work: a pure function of the sizes."""

from dataclasses import dataclass

from attnopt.kernels.sparq.request import Request

#: Programs that keep a large GPU busy, where heads share keys and where not; so many splits there are, about.
PROGRAMS, ROW_PROGRAMS = 512, 1024
#: Programs of the kernel that writes bounds: two for each multiprocessor, which hold no more of them.
BOUND_PROGRAMS = 256
#: The most parts whose maxima and sums one program reduces at once.
MOST_PARTS = 128
#: Positions in a tile of the logits kernel.
BLOCK = 128
#: Logits of so many heads and positions do not stay in the cache of a large GPU until they are read again.
MANY_LOGITS = 2**23
#: The most scores that one program of the weights kernel holds: heads of a group times positions.
MOST_SCORES = 8192
#: The most bounds that one program of the bounded weights kernel holds: heads of a group times tiles of positions.
MOST_BOUNDS = 16384
#: The most weights that one program can choose from; above it torch chooses.
MOST_CANDIDATES = 32768

#: Groups times positions up to which launches are joined: there their starts and ends count for more than the programs
#: that joining takes away. On an H100 5.8 % less at 2**22, 1.9 % more at 2**24 (docs/perf-log.md).
FEW_POSITIONS = 2**22
#: Groups that share keys for which the last program to weigh positions ends the step; the programs that weigh, all of
#: which are to run at once, and the most scores that one of them then holds.
FEW_GROUPS, TICKETS, MOST_TICKETED = 16, 256, 16384


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes are powers of two from 16, the lengths of splits multiples of the tiles in them.

    block, split: positions in a tile, and in a program, of the logits kernel of several heads. row_block: positions in
    a tile of that of one head, which prefetches row_stages - 1 steps. dot_heads: the fewest heads in a group whose
    logits go to the tensor cores; one head alone can do without (2), or not (1).
    weight_block: positions in a program of the weights kernel. run: neighbours of which the largest weight is kept.
    chosen_block, chosen_split: chosen positions in a tile, and in a program, of the attention kernel.
    narrow: the most positions at or above the bar of the runs that are searched by themselves, or else all of the best
    runs are. bounded: heads that share keys write no logits, only bounds of each run; bound_split, open_split:
    positions in a program that writes bounds, and in one that weighs what they leave open. early: launches may overlap.
    start_joined: the launch of the logits or bounds appends the token and chooses the channels, each program for
    itself. end_joined: the program that chooses a group's positions attends to them, where they are one part.
    ticket: so does the last program that weighs positions of a group, which chooses too.
    """

    block: int = BLOCK
    split: int = 1024
    row_block: int = 1024
    row_stages: int = 3
    weight_block: int = 1024
    run: int = 32
    chosen_block: int = 32
    chosen_split: int = 256
    dot_heads: int = 2
    narrow: int = 256
    bounded: bool = False
    bound_split: int = 4096
    open_split: int = 2048
    early: bool = False
    start_joined: bool = False
    end_joined: bool = False
    ticket: bool = False


def choose_tiles(request: Request) -> Tiles:
    """Tiles for these sizes: splits long enough to be worth a program, and as many as a large GPU wants."""
    groups, sk = request.k.shape[0] * request.k.shape[1], request.k.shape[2]
    programs = PROGRAMS if request.group > 1 else ROW_PROGRAMS
    parts = min(MOST_PARTS, max(1, programs // groups))
    is_wide = max(request.q.shape[3], request.v.shape[3]) > 128
    heads = 1 << (request.group - 1).bit_length()
    ticketed_block = _part(sk, max(1, TICKETS // groups), least=weight_block(heads))
    is_joined = groups * sk <= FEW_POSITIONS
    has_ticket = is_joined and 1 < heads <= MOST_TICKETED // ticketed_block and groups <= FEW_GROUPS
    return Tiles(
        split=_part(sk, parts, least=512 if request.group > 1 else 1024),
        weight_block=ticketed_block if has_ticket else weight_block(heads),
        run=_run(sk, min(request.topk, sk), most=min(1024, MOST_SCORES // heads)),
        chosen_block=32 if is_wide else 128 if request.group > 1 and request.q.itemsize < 4 else 64,
        chosen_split=_part(min(request.topk, sk), parts, least=256),
        narrow=max(256, 4 * power_of_two(min(request.topk, sk))),
        bound_split=_part(sk, min(MOST_PARTS, max(1, BOUND_PROGRAMS // groups)), least=1024),
        open_split=_part(sk, parts, least=512),
        bounded=request.group > 1 and groups * heads * sk >= MANY_LOGITS and sk >= 4 * request.topk * BLOCK,
        early=has_ticket or (is_joined and request.group == 1),
        start_joined=is_joined,
        end_joined=is_joined,
        ticket=has_ticket,
    )


def weight_block(heads: int) -> int:
    """Positions in a program of the weights kernel where each has the scores of so many heads, a power of two."""
    return max(16, min(1024, MOST_SCORES // heads))


def ordered(*, early: bool) -> dict[str, bool]:
    """Keyword arguments of a launch: whether it may be set up before the one before it has ended."""
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def candidates(sk: int, topk: int, run: int) -> int:
    """The most weights among which one program has to choose: the largest of all runs, then all of the best runs."""
    return max(power_of_two(-(-sk // run)), power_of_two(topk) * run)


def _run(sk: int, topk: int, most: int) -> int:
    """The power of two, from 16, with the fewest candidates."""
    return min((run for run in (16, 32, 64, 128) if run <= most), key=lambda run: candidates(sk, topk, run))


def _part(length: int, parts: int, *, least: int) -> int:
    """The power of two, at least `least`, of which at most `parts` cover `length`."""
    return power_of_two(max(least, -(-length // parts)))


def power_of_two(n: int) -> int:
    """The smallest power of two from n."""
    return 1 << (n - 1).bit_length()
