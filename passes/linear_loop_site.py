"""From a loop that was read to a site, and the trials in which the loop is compared with what the site says."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.mask import Causal
from attnopt.passes import emit
from attnopt.passes.linear_finite import check_decay, check_operands
from attnopt.passes.linear_loop_numbers import times
from attnopt.passes.linear_loop_probe import Draw, run, symbols_of
from attnopt.passes.linear_loop_reading import Reading
from attnopt.passes.linear_loop_reference import recurrence
from attnopt.passes.site import Filled, Operand, Result, check_unmutated, with_dtype, working_dtype
from attnopt.rule import Reject, Site
from attnopt.spec import AttentionSpec, Decay, Precision

NAME = "linear loop"
TOLERANCE = 1e-9
DRAWS = (
    Draw(11, sign=-1.0, positive=False),
    Draw(12, sign=1.0, positive=False),
    Draw(13, sign=-1.0, spread=0.05),
)


def build(r: Reading) -> Site:
    """The site of a reading."""
    region, cast, roles = r.region, r.cast, r.labels.roles
    root = region.root
    bases = (cast.q, cast.k, cast.v)
    dtype = working_dtype([(n, n.meta["val"].dtype) for n in bases], root.meta["val"].dtype)
    operands: dict[str, Operand | Filled] = {
        name: with_dtype(Operand(node, r.labels.by[node]), dtype)
        for name, node in zip("qkv", bases, strict=True)
    }
    operands |= _scaled(r, operands)
    if r.decay is not None:
        operands["log_decay"] = decay = _decay_operand(r)
        check_decay(decay)
    wide = torch.promote_types(dtype, torch.float32)
    if cast.state is not None:
        layout = (roles.batch, roles.heads, roles.d, roles.dv)
        operands["initial_state"] = with_dtype(
            Operand(cast.state, r.labels.by[cast.state], layout=layout), wide
        )
    spec = AttentionSpec(
        "linear", r.scale, mask=Causal(), decay=_KINDS[r.decay.kind] if r.decay else Decay.NONE,
        initial_state=cast.state is not None, final_state=region.state is not None,
        precision=Precision(scores=bases[0].meta["val"].dtype, out=root.meta["val"].dtype),
    )  # fmt: skip
    _check_operands(r, operands)
    tensors = {name: o for name, o in operands.items() if isinstance(o, Operand)}
    check_operands(tensors)
    check_unmutated(tensors, root)
    result = Result(roles, r.labels.out, root.meta["val"].dtype)
    interior = frozenset({*region.nodes, *([region.state] if region.state is not None else [])})
    return Site(
        NAME, root, spec, operands, result, interior - {root},
        body=region.nodes, state=_state_result(r), assumed={t.node: t for t in r.tables},
        trial=lambda seed: _values(r, replace(DRAWS[seed % len(DRAWS)], seed=100 + seed)),
    )  # fmt: skip


def _scaled(r: Reading, operands: Mapping[str, Operand | Filled]) -> dict[str, Operand | Filled]:
    """Queries and keys times the symbolic numbers that the loop multiplies by."""
    q = tuple(part for factor in r.factors for part in times(factor.node, factor.queries))
    k = tuple(part for factor in r.factors for part in times(factor.node, factor.keys))
    given = {"q": q, "k": k}
    return {
        n: replace(o, times=given[n]) for n, o in operands.items() if n in given and isinstance(o, Operand)
    }


_KINDS = {"per_head": Decay.PER_HEAD, "per_token": Decay.PER_TOKEN}


def _check_operands(r: Reading, operands: Mapping[str, Operand | Filled]) -> None:
    tensors = {name: o for name, o in operands.items() if isinstance(o, Operand)}
    devices = {o.node.meta["val"].device for o in tensors.values()}
    if len(devices) != 1:
        raise Reject(
            f"operands on different devices: {', '.join(sorted(map(str, devices)))}", r.region.root, 2
        )
    for end in (r.region.root, r.region.state):
        if end is not None:
            check_unmutated(tensors, end)


def _decay_operand(r: Reading) -> Operand | Filled:
    found, roles = r.decay, r.labels.roles
    if found is None:
        raise Reject("nothing is forgotten", r.region.root)
    layout = (roles.heads,) if found.kind == "per_head" else (roles.batch, roles.heads, roles.query)
    if found.node is None:
        return Filled(found.factor, layout)
    dtype = torch.promote_types(found.node.meta["val"].dtype, torch.float32)
    axes = dict(zip(roles.key, roles.query, strict=True))
    dims = tuple(tuple(axes.get(a, a) for a in group) for group in found.dims)  # type: ignore[attr-defined]
    return Operand(found.node, dims, found.factor, dtype=dtype, function=found.function, layout=layout)


def _state_result(r: Reading) -> tuple[Node, Result] | None:
    state, roles = r.region.state, r.labels.roles
    if state is None or r.state_dims is None:
        return None
    layout = (roles.batch, roles.heads, roles.d, roles.dv)
    return state, Result(roles, r.state_dims, state.meta["val"].dtype, layout=layout)  # type: ignore[arg-type]


def _values(r: Reading, how: Draw) -> tuple[dict[Node, Tensor], tuple[Tensor, ...]]:
    """Values for the leaves of the site, and what the loop makes of them: the root, and the last state if used."""
    factors = {r.decay.node} if r.decay is not None and r.decay.function == "log" else set()
    trial = run(r.region, r.tables, replace(how, factors=frozenset(factors - {None})), r.shapes)  # type: ignore[arg-type]
    ends = (r.region.root, *([r.region.state] if r.region.state is not None else []))
    return dict(trial.values), tuple(trial.values[end] for end in ends)


def check_trials(r: Reading, site: Site) -> None:
    """Raises Reject where the loop differs from the recurrence."""
    for how in (*DRAWS, *([replace(DRAWS[0], shorter=True)] if symbols_of(r.region) else [])):
        try:
            values, expected = _values(r, how)
        except (RuntimeError, ValueError, IndexError):
            if how.shorter:  # the graph is for other lengths only
                return
            raise
        wide = _uncast(site)
        actual = emit.call_all(wide, site.spec, recurrence, [values[n] for n in emit.leaves(site)])
        for got, want in zip(actual, expected, strict=True):
            error = _row_error(got.double(), want)
            if not error <= TOLERANCE:
                raise Reject(
                    f"a loop over positions that looks like linear attention ({site.spec}) but differs from it by "
                    f"{error:.1e} on random values", r.region.root, 4,
                )  # fmt: skip


def _uncast(site: Site) -> Site:
    """The site in fp64 throughout."""
    operands = {n: replace(o, dtype=None) if isinstance(o, Operand) else o for n, o in site.operands.items()}
    ends = [emit.result_of(site), *([site.state[1]] if site.state is not None else [])]
    root, *states = (replace(end, dtype=torch.float64) for end in ends)  # type: ignore[type-var]
    state = (site.state[0], states[0]) if site.state is not None else None
    return replace(site, operands=operands, result=root, state=state)


def _row_error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or not bool(want.isfinite().all()):
        return float("inf")
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)).max())
