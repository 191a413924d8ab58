"""AttentionSpec: what one attention site computes, however it was spelled. Frozen, hashable, printable, free of FX."""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Literal

import torch
from torch import Tensor

from attnopt.mask import FULL, TOP_LEFT, Length, Mask


class EmptyRow(Enum):
    """What a query returns that sees no key: the mask hides all, or a bias is -inf for all."""

    NEVER = "never"  # proven: the mask leaves every query a key (where a bias hides all: NaN)
    NAN = "nan"  # -inf fill and plain softmax
    ZERO = "zero"  # scaled_dot_product_attention, the safe softmax
    UNIFORM = "uniform"  # a finite fill that absorbs the score: the mean of all values
    ABSORBED = (
        "absorbed"  # the same, by a number added to the scores: gradients reach them, as if all were visible
    )


#: Those that return the mean of all values.
MEANS = (EmptyRow.UNIFORM, EmptyRow.ABSORBED)


class Decay(Enum):
    """How a linear attention forgets; the factor is exp(log_decay), log_decay <= 0, per step."""

    NONE = "none"
    PER_HEAD = "per head"  # operand log_decay (H,)
    PER_TOKEN = "per token"  # operand log_decay (B, H, S); the state is scaled before token t is added


@dataclass(frozen=True, slots=True)
class Alibi:
    """A bias that is linear in the distance (Press et al. 2022, arXiv:2108.12409): slopes * (j - i - offset).

    The operand `slopes`, (H,) or (B, H), holds a number of any sign for each head. symmetric:
    -slopes * |j - i - offset| instead.
    """

    offset: Length = TOP_LEFT
    symmetric: bool = False

    def dense(self, slopes: Tensor, sq: int, sk: int) -> Tensor:
        """The bias as a tensor (B or 1, H, Sq, Sk) in the dtype of the slopes: the definition of what it means."""
        i, j = (torch.arange(n, device=slopes.device) for n in (sq, sk))
        distance = j[None, :] - (i[:, None] + self.offset.at(sq, sk))
        distance = -distance.abs() if self.symmetric else distance
        return slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance.to(slopes.dtype)

    def __str__(self) -> str:
        offset = "" if self.offset == TOP_LEFT else str(self.offset)
        said = [*filter(None, ("symmetric" if self.symmetric else "", offset))]
        return f"alibi({', '.join(said)})" if said else "alibi"


@dataclass(frozen=True, slots=True)
class Heads:
    """How query heads share keys and values: `share` query heads to one key/value head."""

    share: int = 1  # head h reads kv head h // share; a tiled graph is brought into this order by its layout


@dataclass(frozen=True, slots=True)
class Normaliser:
    """What a linear attention divides by, with w the row of weights: sum(w) + eps, or max(|sum(w)|, floor)."""

    eps: float = 0.0
    floor: float | None = None
    signed: bool = False  # max(sum(w), floor)
    detached: bool = False  # no gradient goes through it


@dataclass(frozen=True, slots=True)
class Sparse:
    """SparQ for one query: `rank` channels score all keys, `topk` keys are read, the last `local` among them always.

    beside: operands that a cache keeps in step with k and v: "k_t" (B, Hkv, D, Sk), "v_mean" (B, Hkv, Dv) in fp32.
    """

    rank: int
    topk: int
    local: int
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stream:
    """Positions are places among the keys that a query sees (StreamingLLM, arXiv:2309.17453, section 3.2).

    Query i stands at t = i + offset, at the place min(t, last) once keys are dropped. turned: of the first `sinks` keys
    those that the window has left behind are scored with the operand `far` (B, H, Sq, D) in the stead of q: the query
    turned to its place. With `alibi` their distance is counted from the place. The window lies at its true distance.

    kept: the operand, bool (B, Sk), that says which keys count; "" where all do. Then the mask is causality and that
    padding, and the cut is made here: j and t are how many keys that count lie before a key, and before the last key up
    to i + offset that counts, so that a row is what it would be without its padding.
    """

    sinks: int
    window: int
    offset: Length = TOP_LEFT
    turned: bool = False
    kept: str = ""

    @property
    def last(self) -> int:
        """The place of every query that has lost a key: L - 1 for L = sinks + window."""
        return self.sinks + self.window - 1

    def __str__(self) -> str:
        places = f"positions as places (last {self.last})"
        return f"{places} of kept keys, {self.sinks} first and {self.window} last" if self.kept else places


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes in which the graph holds scores, probabilities and output; kernels keep at least as much inside."""

    scores: torch.dtype | None = None
    weights: torch.dtype | None = None
    out: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One attention site. Operands: q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), and those named here.

    softmax:  o = softmax(softcap(scale * q k^T) + bias..., over visible keys) v; with hidden_logit over all keys,
              where that number is the logit of a hidden one
    linear:   o = (decay * mask * scale * q k^T) v, divided by the normaliser if there is one
    """

    family: Literal["softmax", "linear"]
    scale: float = 1.0
    heads: Heads = Heads()
    mask: Mask = FULL
    empty_row: EmptyRow = EmptyRow.NEVER
    bias: tuple[str, ...] = ()  # float operands, broadcastable to (B, H, Sq, Sk), added to the scaled scores
    softcap: float | None = None  # cap * tanh(scores / cap), before the bias
    sink_logits: bool = False  # operand sink_logits (H,): exp(z) joins each row's denominator
    sink_per_query: bool = False  # sink_logits is (B, H, Sq): each query has its own
    decay: Decay = Decay.NONE
    normaliser: Normaliser | None = None
    initial_state: bool = False  # operand initial_state (B, H, D, Dv): what is known before the first key
    final_state: bool = False  # the state after the last key is wanted too
    dropout: float = (
        0.0  # each weight becomes 0 with this probability, the others are divided by one minus it
    )
    sparse: Sparse | None = None  # never read from a graph: an approximation that the user asked for
    precision: Precision = Precision()
    alibi: Alibi | None = None  # operand slopes, in at least fp32: one more bias, which no tensor holds
    stream: Stream | None = None  # never read from a graph, as `sparse`
    hidden_logit: float | None = None  # of keys that the mask hides, where they weigh: a finite number

    def operand_names(self) -> tuple[str, ...]:
        """Every tensor that the site reads, in order; a kernel call must read exactly these."""
        named = [*self.mask.operand_names(), *self.bias]
        extra = [
            ("far", self.stream is not None and self.stream.turned),
            ("slopes", self.alibi is not None), ("sink_logits", self.sink_logits),
            ("log_decay", self.decay is not Decay.NONE), ("initial_state", self.initial_state),
        ]  # fmt: skip
        beside = () if self.sparse is None else self.sparse.beside
        return ("q", "k", "v", *named, *(name for name, there in extra if there), *beside)

    def __str__(self) -> str:
        return " ".join([self.family, *filter(None, (_describe(self, f.name) for f in fields(self)[1:]))])


#: Fields that change no value, only rounding; `reads` of a kernel need not name them.
NEUTRAL = frozenset({"family", "precision"})


def unread_fields(spec: AttentionSpec, reads: frozenset[str]) -> tuple[str, ...]:
    """Fields of `spec` that are not plain and that a kernel with `reads` does not honour; it must refuse the site.

    `scale` has no plain value: each kernel reads it.
    """
    plain = AttentionSpec(spec.family, scale=spec.scale)
    names = (f.name for f in fields(spec) if f.name not in NEUTRAL | reads)
    return tuple(name for name in names if getattr(spec, name) != getattr(plain, name))


def _describe(spec: AttentionSpec, name: str) -> str:  # noqa: C901, PLR0912 - one line a field
    value = getattr(spec, name)
    match name, value:
        case "scale", _:
            return f"scale={value:.6g}"
        case "mask", _:
            return str(value)
        case "heads", Heads(share=1):
            return ""
        case "heads", Heads(share):
            return f"gqa={share}"
        case "empty_row", EmptyRow.NAN | EmptyRow.ZERO | EmptyRow.UNIFORM | EmptyRow.ABSORBED:
            return f"empty={value.value}"
        case "bias", (_, *_):
            return "bias" if len(value) == 1 else f"bias x{len(value)}"
        case (("alibi" | "stream"), Alibi() | Stream()):
            return str(value)
        case "decay", Decay.PER_HEAD | Decay.PER_TOKEN:
            return f"decay {value.value}"
        case "hidden_logit", float():
            return f"hidden={value:g}"
        case (("softcap" | "dropout"), float()) if value:
            return f"{name}={value:g}"
        case "sparse", Sparse(rank, topk, local, beside):
            return f"sparq({', '.join((f'r={rank}', f'k={topk}', f'l={local}', *beside))})"
        case "sink_logits", True:
            return "sink logits"
        case "sink_per_query", True:
            return "per query"
        case (("initial_state" | "final_state"), True):
            return name.replace("_", " ")
        case "normaliser", Normaliser():
            return _describe_normaliser(value)
    return ""


def _describe_normaliser(of: Normaliser) -> str:
    said = [f"eps={of.eps:g}, floor={of.floor}"] if of.floor is not None or of.eps else []
    said += [name for name in ("signed", "detached") if getattr(of, name)]
    return f"normalised({', '.join(said)})" if said else "normalised"
