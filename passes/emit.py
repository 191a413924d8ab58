"""Brings operands into their canonical layout and the kernel's output back: plain tensor code, traced by `splice`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from attnopt.passes.layout import Axes, Axis, Dims
from attnopt.passes.site import Filled, Operand, Result, Roles
from attnopt.passes.site_block import padded
from attnopt.rule import Reject, Site
from attnopt.spec import AttentionSpec

#: What computes a spec from canonical operands: a kernel's `run`, or the reference's.
Run = Callable[[AttentionSpec, Mapping[str, Tensor]], Tensor | tuple[Tensor, Tensor]]

Lengths = dict[Axis, Any]  # axis -> int or SymInt


def leaves(site: Site) -> list[Any]:
    """The nodes whose values the call takes, each once, in a fixed order."""
    return list(dict.fromkeys(part.node for _, part in parts(site)))


def parts(site: Site) -> Iterator[tuple[str, Operand]]:
    """What the operands are made of: each under its own name, what is multiplied onto one under "factor"."""
    for name, operand in site.operands.items():
        if isinstance(operand, Operand):
            yield from (
                (name if part in (operand, *operand.beside) else "factor", part) for part in operand.parts
            )
    yield from (("factor", factor) for factor in result_of(site).times)


def call(
    site: Site, spec: AttentionSpec, run: Run, values: Sequence[Any], given: Lengths | None = None
) -> Tensor:
    """The root's value, as `call_all` makes it."""
    return call_all(site, spec, run, values, given)[0]


def ends(site: Site) -> tuple[Any, ...]:
    """The nodes whose values the call makes: the root, and the last state where it is used."""
    return (site.root,) if site.state is None else (site.root, site.state[0])


def call_all(
    site: Site, spec: AttentionSpec, run: Run, values: Sequence[Any], given: Lengths | None = None
) -> tuple[Tensor, ...]:
    """The values of `ends(site)`: operands arranged, the kernel run, its output arranged back.

    values: those of `leaves(site)`. spec: what to compute (the site's own, or an approximation of it). given:
    lengths of axes that differ from those of the graph (a check at reduced sizes).
    """
    result = result_of(site)
    sizes = lengths(site, values, given)
    made = run(spec, operands(site, spec, values, sizes))
    out, *states = made if isinstance(made, tuple) else (made,)
    held = dict(zip(leaves(site), values, strict=True))
    out = _multiplied(out, result.times, (*result.roles.output[:-1], ()), held, sizes)
    out = out if result.factor == 1.0 else out * result.factor
    root = _cast(restore(out, result, sizes), result.dtype)
    if site.state is None:
        return (root,)
    wanted = cast(Result, site.state[1])
    return root, _cast(restore(states[0], wanted, sizes), wanted.dtype)


def result_of(site: Site) -> Result:
    """The layout of the root."""
    return cast(Result, site.result)


def operands(site: Site, spec: AttentionSpec, values: Sequence[Any], sizes: Lengths) -> dict[str, Tensor]:
    """The canonical operands that `spec` names."""
    held = dict(zip(leaves(site), values, strict=True))
    roles = result_of(site).roles
    return {name: _operand(site.operands[name], name, roles, held, sizes) for name in spec.operand_names()}


def _operand(operand: object, name: str, roles: Roles, held: Mapping[Any, Any], sizes: Lengths) -> Tensor:
    if isinstance(operand, Filled):
        like = next(
            value for value in held.values() if isinstance(value, Tensor) and value.is_floating_point()
        )
        shape = [_merged(axes, sizes) for axes in operand.layout]
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.full(shape, operand.value, dtype=dtype, device=like.device)
    return arrange(cast(Operand, operand), name, roles, held, sizes)


def lengths(site: Site, values: Sequence[Any], given: Lengths | None = None) -> Lengths:
    """The length of every axis, from the shapes of the tensors at hand."""
    held = dict(zip(leaves(site), values, strict=True))
    tensors = [p for _, p in parts(site) if isinstance(held[p.node], Tensor)]
    pending = [pair for p in tensors for pair in _pairs(p, held[p.node])]
    known: Lengths = dict(given or {})
    while pending:
        left = [(axes, size) for axes, size in pending if not _solve(axes, size, known)]
        if len(left) == len(pending):
            _split_known_sizes(left, known)
        pending = left
    return known


def _pairs(operand: Operand, tensor: Tensor) -> list[tuple[Axes, Any]]:
    return [(axes, size) for axes, size in zip(operand.dims, tensor.shape, strict=True) if axes]


def _solve(axes: Axes, size: Any, known: Lengths) -> bool:
    """Takes the one unknown axis of a dimension from its size."""
    unknown = [a for a in axes if a not in known]
    if len(unknown) > 1:
        return False
    for axis in unknown:
        rest = 1
        for other in axes:
            rest = rest * known.get(other, 1)
        known[axis] = size // rest if len(axes) > 1 else size
    return True


def _split_known_sizes(left: list[tuple[Axes, Any]], known: Lengths) -> None:
    """A merged dimension that nothing else tells apart: the sizes seen in the graph do, where they are numbers."""
    for axes, _ in left:
        for axis in axes:
            if axis not in known and isinstance(axis.size, int):
                known[axis] = axis.size
                return
    raise Reject(
        "dimensions are merged whose symbolic lengths only their product tells (windows of an image, say); compile "
        "with those sizes fixed (torch._dynamo.mark_static, or dynamic=False)"
    )


def arrange(operand: Operand, name: str, roles: Roles, held: Mapping[Any, Any], sizes: Lengths) -> Tensor:
    """One operand in its canonical layout, cast and scaled."""
    value = held[operand.node]
    value = value.logical_not() if operand.negated else value
    value = value if operand.dtype is None else _cast(value, operand.dtype)
    needed = operand.layout is not None or name.rstrip("0123456789") in (
        "q",
        "far",
        "k",
        "v",
        "padding",
        "sink_logits",
    )
    out = _to_layout(value, operand.dims, operand.layout or roles.layout(name), sizes, expand=needed)
    out = out.log() if operand.function == "log" else out
    out = out.logsumexp(-1) if operand.function == "logsumexp" else out
    out = _differences(out) if operand.function == "differences" else out
    if operand.beside:
        out = torch.cat([out, *(arrange(part, name, roles, held, sizes) for part in operand.beside)], -1)
    out = _multiplied(out, operand.times, operand.layout or (*roles.layout(name)[:-1], ()), held, sizes)
    if operand.factor != 1.0:
        out = out * operand.factor
    if operand.rsqrt:
        out = out * _merged(operand.rsqrt, sizes) ** -0.5
    out = padded(out, operand)
    return out - out.amax(-1, keepdim=True) if operand.function == "relative" else out


def _differences(sums: Tensor) -> Tensor:
    """What each element of a running sum along the last dimension adds to the one before it; 0 for the first."""
    return torch.cat([torch.zeros_like(sums[..., :1]), sums[..., 1:] - sums[..., :-1]], -1)


def _multiplied(
    out: Tensor, times: Sequence[Operand], beside: Sequence[Axes], held: Mapping[Any, Any], sizes: Lengths
) -> Tensor:
    """`out` times some tensors, or numbers, that are laid out as `beside` says."""
    for factor in times:
        scaled = held[factor.node]
        if isinstance(scaled, Tensor):
            scaled = _to_layout(scaled, factor.dims, beside, sizes, expand=False)
        if factor.function == "keep":
            out = torch.where(scaled.logical_not() if factor.negated else scaled.bool(), out, 0.0)
            continue
        scaled = _cast(scaled, out.dtype) if isinstance(scaled, Tensor) else scaled
        out = out / scaled if factor.inverse else out * scaled
    return out


def _to_layout(value: Tensor, dims: Dims, groups: Sequence[Axes], sizes: Lengths, *, expand: bool) -> Tensor:
    """Splits, permutes and merges the dimensions of `value` into `groups`.

    A group of which `value` has no axis becomes a dimension of size 1, unless `expand` asks for its full size.
    """
    have = [a for axes in dims for a in axes]
    value = value if _is_one_each(dims) else value.reshape([sizes[a] for a in have])
    wanted = [a for group in groups for a in group if a in have or expand or any(b in have for b in group)]
    if any(a not in sizes for a in wanted):
        raise Reject(
            "a dimension of the attention is one of no operand: nothing but a mask that was read has it"
        )
    stray = set(have) - set(wanted)
    if stray:
        raise Reject("an operand varies along an axis that its canonical layout does not have")
    value = _permute(value, [have.index(a) for a in wanted if a in have])
    for place, axis in enumerate(wanted):
        if axis not in have:
            value = value.unsqueeze(place)
    full = [sizes[a] for a in wanted]
    value = value.expand(full) if any(a not in have for a in wanted) else value
    merged = [[a for a in group if a in wanted] for group in groups]
    return value if _is_one_each(merged) else value.reshape([_merged(axes, sizes) for axes in merged])


def _is_one_each(dims: Sequence[Sequence[Axis]]) -> bool:
    return all(len(axes) == 1 for axes in dims)


def _merged(axes: Sequence[Axis], sizes: Lengths) -> Any:
    total: Any = 1
    for axis in axes:
        total = total * sizes[axis]
    return total


def restore(out: Tensor, result: Result, sizes: Lengths) -> Tensor:
    """The kernel's output (B, H, Sq, Dv), or its state, with the dimensions of its node."""
    layout = result.layout or result.roles.output
    flat = [a for group in layout for a in group]
    wanted = [a for axes in result.dims for a in axes]
    if set(flat) != set(wanted):
        raise Reject("the output has other axes than the operands give")
    out = out if _is_one_each(layout) else out.reshape([sizes[a] for a in flat])
    out = _permute(out, [flat.index(a) for a in wanted])
    return out if _is_one_each(result.dims) else out.reshape([_merged(axes, sizes) for axes in result.dims])


def _permute(value: Tensor, order: list[int]) -> Tensor:
    return value if order == sorted(order) else value.permute(order)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else value.to(dtype)
