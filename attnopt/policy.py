"""Chooses what becomes of a site: which kernel, for which spec. Exact by itself; an approximation only on request."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from attnopt.mask import BOTTOM_RIGHT, And, Causal, Mask, Opaque, Or
from attnopt.options import Options
from attnopt.rule import Cost, Kernel, SiteMeta
from attnopt.spec import AttentionSpec, EmptyRow, Sparse, unread_fields


@dataclass(frozen=True, slots=True)
class Choice:
    """kernel: None if none can serve the site. spec: what it will compute. reason: why this, or why none."""

    kernel: Kernel | None
    spec: AttentionSpec
    reason: str
    exact: bool = True


_lock = threading.Lock()
#: Kernels that failed a check on real data, with the spec; the one set that outlives a compilation, behind the lock.
_quarantined: set[tuple[str, AttentionSpec]] = set()


def quarantine(kernel: str, spec: AttentionSpec) -> None:
    """Keeps a kernel from serving a spec for the rest of the process."""
    with _lock:
        _quarantined.add((kernel, spec))


def is_quarantined(kernel: str, spec: AttentionSpec) -> bool:
    """Whether the kernel failed on this spec before."""
    with _lock:
        return (kernel, spec) in _quarantined


def choose(site: SiteMeta, kernels: Iterable[Kernel], options: Options) -> Choice:
    """The cheapest kernel that states the site exactly, or the approximation that the user named.

    A kernel may serve the site in other words (`site.otherwise`) where it cannot use what is proven of the mask, or
    where reading a tensor that the graph holds anyway costs less than building the mask anew.
    """
    allowed = [kernel for kernel in kernels if _is_allowed(kernel, options)]
    if options.assume_causal and has_opaque(site.spec.mask):
        chosen = choose(
            replace(site, spec=waived(site.spec), otherwise=()),
            kernels,
            replace(options, assume_causal=False),
        )
        return _noted(
            replace(chosen, exact=False), "its mask could not be proven and is taken as causal, on your word"
        )
    wanted = _approximation(site, options)
    if isinstance(wanted, SiteMeta):
        chosen = _serve(wanted, allowed, exact=False)
        if chosen.kernel is not None:
            return chosen
        return _noted(
            _serve(site, allowed, exact=True), f"{options.softmax} cannot serve it ({chosen.reason})"
        )
    return _noted(_serve(site, allowed, exact=True), wanted)


def waived(spec: AttentionSpec) -> AttentionSpec:
    """The spec by `assume_causal`."""
    if not has_opaque(spec.mask):
        return spec
    return replace(spec, mask=assumed_causal(spec.mask), empty_row=EmptyRow.NEVER)


def has_opaque(mask: Mask) -> bool:
    """Whether part of the mask is a tensor of unknown form."""
    if isinstance(mask, And | Or):
        return any(has_opaque(part) for part in mask.parts)
    return isinstance(mask, Opaque)


def assumed_causal(mask: Mask) -> Mask:
    """The mask with its unknown parts taken as causal, the last query aligned with the last key."""
    known = [part for part in (mask.parts if isinstance(mask, And) else (mask,)) if not has_opaque(part)]
    result: Mask = Causal(BOTTOM_RIGHT)
    for part in known:
        result = result & part
    return result


def _is_allowed(kernel: Kernel, options: Options) -> bool:
    """The reference is an oracle: it serves only when it is named."""
    if options.allow:
        return kernel.name in options.allow
    return kernel.name not in {*options.deny, "reference"}


def _noted(choice: Choice, note: str) -> Choice:
    return replace(choice, reason="; ".join(filter(None, (note, choice.reason))))


def _approximation(site: SiteMeta, options: Options) -> SiteMeta | str:
    """The site as the approximation that was asked for, or why there is none ("" when none was)."""
    if options.softmax == "exact" or site.spec.family != "softmax":
        return ""
    return site.streamed if options.softmax == "streaming" else _sparse(site, options)


def _sparse(site: SiteMeta, options: Options) -> SiteMeta | str:
    """One query over many keys, of which SparQ reads a few."""
    if site.sizes.sq != 1:
        return "not a decode step (several queries): left exact"
    beside = tuple(name for name in ("k_t", "v_mean") if name in site.operands)
    spec = replace(site.spec, sparse=Sparse(options.rank, options.topk, options.local, beside))
    return replace(site, spec=spec, otherwise=())


def _serve(site: SiteMeta, kernels: Iterable[Kernel], *, exact: bool) -> Choice:
    able: list[tuple[Kernel, SiteMeta]] = []
    reasons = []
    for kernel in kernels:
        for words in (site, *site.otherwise):
            reason = _refusal(kernel, words, exact=exact)
            if reason is None:
                able.append((kernel, words))
            elif reason and words is site:
                reasons.append(f"{kernel.name}: {reason}")
    if not able:
        return Choice(None, site.spec, "; ".join(reasons) or "no kernel is allowed", exact)
    kernel, words = min(
        able, key=lambda pair: (pair[0].cost(pair[1]).effort + _held(site, pair[1]), pair[0].name)
    )
    return Choice(kernel, words.spec, "", exact)


def _held(site: SiteMeta, words: SiteMeta) -> float:
    """What it takes to write and read the tensors of a bias that the site knows by its slopes alone.

    The graph makes them for such sites only; of long sequences they are the largest tensors there are.
    """
    if site.spec.alibi is None or words.spec.alibi is not None:
        return 0.0
    held = [words.operands[name] for name in words.spec.bias if name not in site.operands]
    return Cost(sum(2.0 * prod(x.shape) * x.dtype.itemsize for x in held), 0.0).effort


def _refusal(kernel: Kernel, site: SiteMeta, *, exact: bool) -> str | None:
    """None: it can serve. An empty reason: it is for something else altogether."""
    if kernel.name != "reference" and kernel.family != site.spec.family:
        return ""
    if exact and not kernel.exact:
        return ""
    if is_quarantined(kernel.name, site.spec):
        return "quarantined: it failed a check on real data"
    unread = unread_fields(site.spec, kernel.reads)
    if unread:
        return f"does not honour {', '.join(unread)}"
    return kernel.refuse(site)
