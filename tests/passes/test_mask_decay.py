"""Laws of decay matrices: what is read rebuilds the matrix, and what only looks like one is not read."""

import math

import pytest
import torch
from mask_trace import inputs_of, results, roles_of, run, trace

from attnopt.passes.linear_coefficient import Const, Log, Negative, Read, Times
from attnopt.passes.mask_decay import read_decay
from attnopt.passes.sizes import shape_of

B, H, S = 2, 3, 6
INF = math.inf


def given():
    """x (B, H, S, 1), rates (H,) in (0, 1), logs (B, H, S) below 0."""
    return torch.ones(B, H, S, 1), torch.rand(H) * 0.8 + 0.1, -torch.rand(B, H, S)


def distance(x):
    n = x.shape[2]
    return torch.arange(n)[:, None] - torch.arange(n)[None, :]


def heads(rates):
    return rates[:, None, None]


def read(make, *, dynamic):
    module = trace(make, *given(), dynamic=dynamic)
    (node,) = results(module)
    b, _, s, _ = shape_of(inputs_of(module)[0])
    h = shape_of(node)[-3] if len(shape_of(node)) > 2 else H
    return module, node, read_decay(node, roles_of(node.meta["val"]), {"b": b, "h": h, "i": s, "j": s})


def compute(rate, values):
    """A coefficient as a tensor (B or 1, H or 1, S or 1), in double."""
    match rate:
        case Const(value):
            return torch.full((1, 1, 1), value, dtype=torch.float64)
        case Read(leaf):
            roles = [role for role in leaf.roles if role]
            shape = [
                values[leaf.node].shape[leaf.roles.index(role)] if role in roles else 1 for role in "bhi"
            ]
            return values[leaf.node].double().reshape(shape)
        case Negative(of):
            return -compute(of, values)
        case Log(of):
            return compute(of, values).log()
        case Times(left, right):
            return compute(left, values) * compute(right, values)
    raise TypeError(rate)


def rebuilt(reading, values, s):
    """The matrix (B or 1, H or 1, S, S) that a reading states."""
    i, j = torch.arange(s)[:, None], torch.arange(s)[None, :]
    exponent = torch.zeros(1, 1, s, s, dtype=torch.float64)
    if reading.kind == "per_head":
        exponent = compute(reading.log_decay, values)[..., None] * (i - j)
    if reading.kind == "per_token":
        steps = compute(reading.log_decay, values)
        total = steps if reading.cumulative else steps.cumsum(-1)
        exponent = total[..., :, None] - total[..., None, :]
    return torch.where(reading.causal.dense(s, s), exponent, -INF).exp()


PER_HEAD = {
    "exponential, lower triangle": lambda x, r, g: torch.exp(-heads(r) * distance(x)).tril(),
    "where": lambda x, r, g: torch.where(distance(x) >= 0, torch.exp(-0.25 * distance(x)), 0),
    "filled before the exponential": lambda x, r, g: (
        torch.exp((-r.view(-1, 1, 1) * distance(x)).masked_fill(distance(x) < 0, -INF))
    ),
    "filled after it": lambda x, r, g: torch.exp(-heads(r) * distance(x)).masked_fill(distance(x) < 0, 0),
    "power": lambda x, r, g: torch.tril(heads(r) ** distance(x)),
    "power of a constant": lambda x, r, g: torch.tril(0.9 ** distance(x)),
    "power of the absolute distance": lambda x, r, g: torch.tril(0.5 ** distance(x).abs()),
    "power times a mask": lambda x, r, g: heads(r) ** distance(x) * (distance(x) >= 0),
    "logarithm of the rate": lambda x, r, g: torch.exp(heads(r.log()) * distance(x).clamp(min=0)).tril(),
    "literal slopes": lambda x, r, g: (
        torch.exp(-heads(torch.tensor([0.5, 0.25, 0.2])) * distance(x)) * x.new_ones(x.shape[2], x.shape[2]).tril()
    ),
    "slopes that are evenly spaced": lambda x, r, g: (
        torch.exp(-heads(torch.tensor([3.0, 2.0, 1.0])) * distance(x)).tril()
    ),
    "slopes computed in the graph": lambda x, r, g: (
        torch.exp(-(2.0 ** (-8.0 * (torch.arange(3) + 1) / 3))[:, None, None] * distance(x)).tril()
    ),
    "infinite distance": lambda x, r, g: (
        torch.exp(distance(x).float().masked_fill(distance(x) < 0, INF) * -0.5)
    ),
    "scaled slopes": lambda x, r, g: torch.exp(-heads(r * 0.5) * distance(x)).tril()[None],
    "quotient of exponentials": lambda x, r, g: (
        torch.exp(-0.5 * torch.arange(x.shape[2]))[:, None] / torch.exp(-0.5 * torch.arange(x.shape[2]))[None, :]
    ).tril(),
}  # fmt: skip
NONE = {
    "triangle of ones": lambda x, r, g: torch.ones(x.shape[2], x.shape[2]).tril(),
    "boolean triangle": lambda x, r, g: distance(x) >= 0,
    "boolean triangle as numbers": lambda x, r, g: (distance(x) >= 0).float()[None, None],
    "ones everywhere": lambda x, r, g: torch.ones(x.shape[2], x.shape[2]),
}
PER_TOKEN = {
    "difference of running sums": lambda x, r, g: _differences(g.cumsum(-1)).exp().tril(),
    "filled before the exponential": lambda x, r, g: _differences(g).masked_fill(distance(x) < 0, -INF).exp(),
    "negative running sums": lambda x, r, g: (-_differences((-g).cumsum(-1))).exp().tril(),
    "product of exponentials": lambda x, r, g: (g[..., :, None].exp() * (-g[..., None, :]).exp()).tril(),
}


def _differences(sums):
    return sums.unsqueeze(-1) - sums.unsqueeze(-2)


ALL = {
    **{
        (kind, name): make
        for kind, table in (("per_head", PER_HEAD), ("none", NONE))
        for name, make in table.items()
    },
    **{("per_token", name): make for name, make in PER_TOKEN.items()},
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("key", ALL, ids=": ".join)
def test_what_is_read_rebuilds_the_matrix(key, dynamic):
    module, node, reading = read(ALL[key], dynamic=dynamic)
    assert reading is not None
    assert reading.kind == key[0]
    values = run(module, *given())
    claimed, actual = torch.broadcast_tensors(rebuilt(reading, values, S), values[node].double())
    torch.testing.assert_close(claimed, actual, rtol=1e-5, atol=1e-7)


def test_running_sums_give_way_to_what_they_sum():
    _, _, of_sums = read(PER_TOKEN["difference of running sums"], dynamic=True)
    _, _, of_anything = read(PER_TOKEN["filled before the exponential"], dynamic=True)
    assert (of_sums.cumulative, of_anything.cumulative) == (False, True)
    assert of_sums.log_decay.leaf.node.op == "placeholder"


def test_the_triangle_may_be_any_proven_mask():
    _, _, windowed = read(lambda x, r, g: (0.5 ** distance(x)).tril().triu(-2), dynamic=True)
    _, _, everywhere = read(lambda x, r, g: 0.5 ** distance(x), dynamic=True)
    assert [str(windowed.causal), str(everywhere.causal)] == ["causal & window(3)", "full"]


NEAR_MISSES = {
    "symmetric": lambda x, r, g: torch.exp(-0.5 * distance(x).abs()),
    "squared distance": lambda x, r, g: torch.exp(-0.5 * distance(x) ** 2).tril(),
    "constant factor": lambda x, r, g: 2 * torch.exp(-0.5 * distance(x)).tril(),
    "constant in the exponent": lambda x, r, g: torch.exp(-0.5 * distance(x) + 1).tril(),
    "shifted distance": lambda x, r, g: torch.exp(-0.5 * (distance(x) + 1)).tril(),
    "growing": lambda x, r, g: torch.exp(0.5 * distance(x)).tril(),
    "sum of running sums": lambda x, r, g: (g[..., :, None] + g[..., None, :]).exp().tril(),
    "two sequences": lambda x, r, g: (g[..., :, None] - (2 * g)[..., None, :]).exp().tril(),
    "scores": lambda x, r, g: (x @ x.transpose(-1, -2)).tril(),
    "one everywhere else": lambda x, r, g: torch.where(distance(x) >= 0, 0.5 ** distance(x), 1.0),
    "two rates": lambda x, r, g: torch.where(distance(x) > 2, 0.5 ** distance(x), 0.25 ** distance(x)).tril(),
    "masked by data": lambda x, r, g: (0.5 ** distance(x)) * (g > -0.5)[..., None],
    "rate for each query": lambda x, r, g: torch.exp(g[..., None] * distance(x)).tril(),
    "infinite distance times data": lambda x, r, g: torch.exp(
        distance(x).float().masked_fill(distance(x) < 0, INF) * -heads(r)
    ),
    "negative base": lambda x, r, g: torch.tril((-0.5) ** distance(x)),
    "normalised": lambda x, r, g: (
        (0.5 ** distance(x)).tril() / (0.5 ** distance(x)).tril().sum(-1, keepdim=True)
    ),
    "written later": lambda x, r, g: _written((0.5 ** distance(x)).tril()),
}


def _written(matrix):
    matrix.diagonal().fill_(0)
    return matrix


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_only_looks_like_a_decay_is_not_read(name):
    _, _, reading = read(NEAR_MISSES[name], dynamic=True)
    assert reading is None
