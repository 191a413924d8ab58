"""Laws of operations that move elements: the claimed element is the element, and nothing is left as unknown data."""

import pytest
import torch
from mask_trace import interpret

N, M = 4, 5


def grid():
    """Elements that are functions of their place, all different."""
    return torch.arange(N)[:, None] * 10 + torch.arange(M)[None, :]


VIEWS = {
    "unsqueeze": lambda x: grid().unsqueeze(1),
    "unsqueeze from the end": lambda x: grid().unsqueeze(-1),
    "squeeze": lambda x: grid()[None, :, None].squeeze(),
    "squeeze one": lambda x: grid()[None, :, None].squeeze(0),
    "squeeze some": lambda x: grid()[None, :, None].squeeze((0, 2)),
    "expand": lambda x: grid()[:, :1].expand(N, 3),
    "expand a new dimension": lambda x: grid().expand(2, -1, -1),
    "expand_as": lambda x: grid()[:1].expand_as(grid()),
    "broadcast_to": lambda x: torch.broadcast_to(grid(), (2, N, M)),
    "permute": lambda x: grid()[None].permute(1, 2, 0),
    "permute from the end": lambda x: grid()[None].permute(-1, 0, 1),
    "transpose": lambda x: grid().transpose(0, -1),
    "swapaxes": lambda x: grid().swapaxes(1, 0),
    "t": lambda x: grid().t(),
    "T": lambda x: grid().T,
    "mT": lambda x: grid()[None].mT,
    "slice": lambda x: grid()[1:3],
    "slice with a step": lambda x: grid()[:, 1::2],
    "slice from the end": lambda x: grid()[:, -2:],
    "slice up to the end": lambda x: grid()[:-1],
    "narrow": lambda x: grid().narrow(1, 2, 2),
    "select": lambda x: grid()[2],
    "select from the end": lambda x: grid()[:, -1],
    "flip": lambda x: grid().flip(1),
    "view": lambda x: grid().view(1, N, 1, M),
    "reshape back": lambda x: grid()[:, None, :, None].reshape(N, M),
    "flatten": lambda x: grid()[:, :1].flatten(),
    "reshape that merges": lambda x: grid().reshape(N * M),
    "reshape that merges some": lambda x: grid()[:, None, :, None].expand(N, 2, M, 3).reshape(N * 2, M * 3),
    "reshape that splits": lambda x: torch.arange(N * M).reshape(N, M),
    "reshape that splits in three": lambda x: (torch.arange(24) * 3).view(2, 3, 4)[:, 1:],
    "unflatten": lambda x: grid().unflatten(1, (1, M)),
    "repeat of a number": lambda x: torch.tensor(3).repeat(2, 2),
    "repeat of one": lambda x: grid()[:1].repeat(3, 1),
    "tile of one": lambda x: grid()[:, :1].tile((1, 3)),
    "contiguous and clone": lambda x: grid().t().contiguous().clone(),
    "casts": lambda x: grid().to(torch.float32).to(torch.int32).type_as(x),
    "cat": lambda x: torch.cat([grid(), grid()[:2] + 100], dim=0),
    "cat from the end": lambda x: torch.cat([grid()[:, :1], grid(), grid()], dim=-1),
    "pad": lambda x: torch.nn.functional.pad(grid(), (1, 2, 0, 1), value=-7),
    "pad that crops": lambda x: torch.nn.functional.pad(grid(), (-1, 1)),
    "slice_scatter": lambda x: torch.slice_scatter(grid(), grid()[:, :2] + 100, 1, 2, 4),
    "slice_scatter up to the end": lambda x: torch.slice_scatter(grid(), grid()[1:3] + 100, 0, -2),
    "select_scatter": lambda x: torch.select_scatter(grid(), grid()[0] + 100, 0, -1),
    "meshgrid": lambda x: torch.meshgrid(torch.arange(N), torch.arange(M), indexing="ij")[1],
    "meshgrid xy": lambda x: torch.meshgrid(torch.arange(N), torch.arange(M), indexing="xy")[0],
    "unbind": lambda x: grid().unbind(1)[3],
    "split": lambda x: grid().split([1, 3, 1], dim=1)[1],
    "chunk": lambda x: grid().chunk(2, dim=0)[1],
    "index": lambda x: grid()[torch.arange(N).flip(0)],
    "index of two": lambda x: grid()[torch.arange(3)[:, None] + 1, torch.arange(2)],
    "index in the middle": lambda x: grid()[None][:, torch.arange(2)],
    "index from the end": lambda x: grid()[:, torch.arange(2) - 2],
    "index_select": lambda x: grid().index_select(1, torch.arange(3) + 1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_elements_are_found_where_they_went(name):
    seen = interpret(VIEWS[name], torch.ones(2, dtype=torch.int64))
    assert torch.equal(seen.claimed, seen.actual)
    assert not seen.own


DYNAMIC_VIEWS = {
    "slice at a size": lambda x: torch.arange(x.shape[0])[x.shape[1] :],
    "slice from a size before the end": lambda x: torch.arange(x.shape[0])[-x.shape[0] :],
    "select the last": lambda x: (torch.arange(x.shape[0])[:, None] * torch.arange(x.shape[1]))[-1],
    "flip": lambda x: torch.arange(x.shape[0]).flip(0),
    "expand": lambda x: torch.arange(x.shape[0])[:, None].expand(-1, x.shape[1]),
    "cat": lambda x: torch.cat([torch.arange(x.shape[0]), torch.arange(x.shape[1])]),
    "view": lambda x: torch.arange(x.shape[0]).view(1, x.shape[0]),
}


@pytest.mark.parametrize("name", DYNAMIC_VIEWS)
def test_elements_are_found_at_symbolic_sizes(name):
    seen = interpret(DYNAMIC_VIEWS[name], torch.ones(6, 3), dynamic=True)
    assert torch.equal(seen.claimed, seen.actual)
    assert not seen.own


UNKNOWN = {
    "reshape that cuts across": lambda x: grid().reshape(2, 10),
    "tile of the last": lambda x: grid()[:, :1].tile(3),
    "repeat of many": lambda x: grid().repeat(2, 1),
    "bits read anew": lambda x: grid().to(torch.int32).view(torch.float32).isnan(),
    "index of unknown sign": lambda x: grid()[torch.arange(4) - 2],
    "index by data": lambda x: grid()[x],
    "index by booleans": lambda x: grid()[torch.ones(N, dtype=torch.bool)],
    "index apart": lambda x: grid()[None, :, None, :][torch.arange(1), :, torch.arange(1)],
    "pad by reflection": lambda x: torch.nn.functional.pad(grid().float(), (1, 1), mode="reflect"),
    "every other row scattered": lambda x: torch.slice_scatter(grid(), grid()[:2] + 100, 0, 0, N, 2),
    "rolled": lambda x: grid().roll(1, 0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_rule_is_the_nodes_own_data(name):
    seen = interpret(UNKNOWN[name], torch.ones(2, dtype=torch.int64))
    assert torch.equal(seen.claimed, seen.actual)
    assert seen.own
