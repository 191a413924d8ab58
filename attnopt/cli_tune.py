"""Which channels and positions SparQ may leave out of a model: quality and traffic over a grid, `attnopt tune`."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from attnopt.approximation_rows import Reader, by_sparq, exactly, perplexity
from attnopt.errors import OptionError
from attnopt.ops import sparq_attention
from attnopt.rule import SiteMeta, Sizes
from attnopt.spec import Sparse

#: Shares of D, and of the text, that the grid tries where the user names no numbers.
RANKS, TOPKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2), (1 / 16, 1 / 8, 1 / 4)
#: Share of topk that goes to the last positions, as in the paper.
LOCAL = 1 / 4
#: Calls that are timed, after a few that are not.
CALLS, WARMUP = 50, 10


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the grid. traffic: elements that a step reads and writes over those of dense attention, at the end
    of the text, from a cache with both key layouts. increase: of the perplexity, as a share. seconds: of the attention
    of one such step over all layers, on a GPU.
    """

    rank: int
    topk: int
    local: int
    traffic: float
    perplexity: float
    increase: float
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was measured. limit: the largest increase that is accepted; tokens, prompt: of the text."""

    settings: tuple[Setting, ...]
    dense: float
    dense_seconds: float | None
    limit: float
    tokens: int
    prompt: int
    sites: int
    others: int

    @property
    def chosen(self) -> Setting | None:
        """The fastest setting within the limit, where there is no GPU that with the least traffic; None: none is."""
        fine = [setting for setting in self.settings if setting.increase <= self.limit]
        return min(fine, key=lambda s: (s.seconds or 0.0, s.traffic, s.perplexity), default=None)

    def options(self) -> dict[str, object]:
        """The choice as attnopt's options; empty if there is none."""
        best = self.chosen
        if best is None:
            return {}
        return {"softmax": "sparq", "rank": best.rank, "topk": best.topk, "local": best.local}

    def as_dict(self) -> dict[str, object]:
        """For JSON: the options, and beside them what they were chosen from."""
        return {"options": self.options(), "measured": asdict(self)}

    def __str__(self) -> str:
        best = self.chosen
        kept = f", {self.others} attentions of another kind stay as they are" if self.others else ""
        head = f"{self.tokens - self.prompt} tokens decoded behind a prompt of {self.prompt}; {self.sites} sites{kept}"
        if best is None:
            return f"{head}\n\n{table(self)}\n\nno setting keeps the perplexity within {self.limit:+.2%}"
        said = f"rank={best.rank}, topk={best.topk}, local={best.local}: traffic {best.traffic:.3f}"
        return f"{head}\n\n{table(self)}\n\nchosen: {said}, perplexity {best.increase:+.2%}"

    def to_json(self) -> str:
        """The text of the file that `--options` and ATTNOPT_OPTIONS read."""
        return json.dumps(self.as_dict(), indent=1) + "\n"


def table(tuned: Tuned) -> str:
    """All settings as plain text, the least traffic first."""
    head = ("rank", "topk", "local", "traffic", "perplexity", "change", "step")
    rows = [head, ("dense", "", "", "1.000", f"{tuned.dense:.3f}", "", _milliseconds(tuned.dense_seconds))]
    for s in sorted(tuned.settings, key=lambda s: s.traffic):
        mark = " *" if s == tuned.chosen else ""
        numbers = (str(s.rank), str(s.topk), str(s.local), f"{s.traffic:.3f}", f"{s.perplexity:.3f}")
        rows.append((*numbers, f"{s.increase:+.2%}", _milliseconds(s.seconds) + mark))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)) for row in rows)
    return "\n".join(f"{line}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"


@dataclass(frozen=True, slots=True)
class Plan:
    """ranks, topks: what to try, () for shares of D and of the text. prompt: tokens before decoding, None for half."""

    limit: float = 0.01
    ranks: tuple[int, ...] = ()
    topks: tuple[int, ...] = ()
    prompt: int | None = None


def tune(model: nn.Module, ids: Tensor, plan: Plan, told: Callable[[str], None]) -> Tuned:
    """Measures every setting of the grid on the text ids (1, N); `told` hears of each.

    Raises OptionError for numbers that cannot be, SourceError for a model that cannot be read or returns no logits.
    """
    tokens = ids.shape[1]
    prompt = tokens // 2 if plan.prompt is None else plan.prompt
    if not 0 < prompt < tokens:
        raise OptionError(
            f"a prompt of {prompt} tokens, and a text of {tokens}; wanted a shorter prompt, from 1"
        )
    reader = Reader.of(model, ids)
    shapes = reader.shapes
    grid = list(settings(plan, shapes[0].sizes))
    dense = perplexity(reader.logits(ids, exactly), ids, prompt)
    told(f"dense: perplexity {dense:.3f}")
    found = []
    for sparse in grid:
        value = perplexity(reader.logits(ids, by_sparq(sparse, prompt)), ids, prompt)
        found.append(_setting(sparse, value, dense, shapes))
        told(f"rank {sparse.rank}, topk {sparse.topk}: perplexity {value:.3f}, {found[-1].increase:+.2%}")
    return Tuned(
        tuple(found), dense, _seconds(shapes, None), plan.limit, tokens, prompt, len(shapes), reader.others
    )


def _setting(sparse: Sparse, value: float, dense: float, shapes: Sequence[SiteMeta]) -> Setting:
    share = sum(traffic(s.sizes, sparse) for s in shapes) / len(shapes)
    seconds = _seconds(shapes, sparse)
    return Setting(sparse.rank, sparse.topk, sparse.local, share, value, value / dense - 1, seconds)


def settings(plan: Plan, sizes: Sizes) -> Iterator[Sparse]:
    """The grid, without settings that read no less than dense attention."""
    ranks = plan.ranks or tuple(dict.fromkeys(max(1, round(share * sizes.d)) for share in RANKS))
    topks = plan.topks or tuple(dict.fromkeys(max(1, round(share * sizes.sk)) for share in TOPKS))
    for rank, topk in product(ranks, topks):
        if rank < 1 or topk < 1:
            raise OptionError(f"rank {rank} and topk {topk}; wanted at least 1")
        sparse = Sparse(rank, topk, int(LOCAL * topk))
        if traffic(sizes, sparse) < 1 or (plan.ranks and plan.topks):
            yield sparse


def traffic(sizes: Sizes, sparse: Sparse) -> float:
    """Elements a step reads and writes for a key/value head, over those of dense attention (arXiv 2312.04985, sec. 4).

    n r + k (D + Dv) + 2 (D + Dv) over n (D + Dv) + (D + Dv): r channels of n keys, k rows, the new token, the mean.
    """
    n, width = sizes.sk, sizes.d + sizes.dv
    read = n * min(sparse.rank, sizes.d) + min(sparse.topk, n) * width
    return (read + 2 * width) / (n * width + width)


def _seconds(shapes: Sequence[SiteMeta], sparse: Sparse | None) -> float | None:
    """Of one step's attention over all layers at the length of the text; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    kinds = {(s.sizes, s.operands["q"].dtype): s for s in shapes}
    times = {kind: _timed(meta, sparse) for kind, meta in kinds.items()}
    return sum(times[s.sizes, s.operands["q"].dtype] for s in shapes)


def _timed(meta: SiteMeta, sparse: Sparse | None) -> float:
    s, dtype = meta.sizes, meta.operands["q"].dtype
    q, k, v = (
        torch.randn(s.batch, heads, n, wide, dtype=dtype, device="cuda")
        for heads, n, wide in ((s.heads, 1, s.d), (s.kv_heads, s.sk, s.d), (s.kv_heads, s.sk, s.dv))
    )
    k_t, mean = k.mT.contiguous(), v.mean(2, dtype=torch.float32)

    def step() -> Tensor:
        if sparse is None:
            return functional.scaled_dot_product_attention(q, k, v, enable_gqa=s.heads != s.kv_heads)
        return sparq_attention(
            q, k, v, rank=sparse.rank, topk=sparse.topk, local=sparse.local, k_t=k_t, v_mean=mean
        )

    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS
