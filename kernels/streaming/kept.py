"""Which keys count, and in which order: the arithmetic by which a padded row becomes what it is without its padding.

A key's place is the number of keys that count before it. The last keys that count are brought together at the end of
each row, whatever the padding lies between, so that a window over them is a plain window again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """upto (B, Sk): how many keys count up to each, itself included. total (B, 1): how many of them some query sees.

    places (B, Sq): of the queries, -1 before all keys.
    """

    upto: Tensor
    places: Tensor
    total: Tensor

    def last(self, count: int) -> Tensor:
        """The places of the last `count` keys that some query sees (B, count); below 0 where there are not so many."""
        return self.total - count + torch.arange(count, device=self.total.device)

    def slots(self, places: Tensor) -> Tensor:
        """Where the keys at these places (B, n) lie (B, n); anywhere, where there is no such key."""
        return torch.searchsorted(self.upto, places + 1).clamp(max=self.upto.shape[1] - 1)


def counted(keep: Tensor, queries: int, offset: int) -> Kept:
    """What there is to know of keep, bool (B, Sk), for queries i at the slots i + offset."""
    upto = keep.cumsum(1)
    before = torch.arange(queries + 1, device=keep.device) + offset
    seen = pad(upto, (1, 0)).index_select(1, before.clamp(min=0, max=keep.shape[1]))
    return Kept(upto, seen[:, 1:] - 1, seen[:, -1:])


def rows(x: Tensor, slots: Tensor) -> Tensor:
    """The rows of x (B, H, S, D) at the slots (B, n): (B, H, n, D); `gather` moves single numbers, and is slower."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    return x.transpose(1, 2)[row, slots].transpose(1, 2)


def cut(bias: Tensor, queries: Tensor | None, keys: Tensor) -> Tensor:
    """A bias (B or 1, H or 1, Sq or 1, Sk or 1) of the queries and keys at those slots (B, n); None: of all queries."""
    for dim, slots in ((2, queries), (3, keys)):
        size = bias.shape[dim]
        if slots is None or (isinstance(size, int) and size == 1):
            continue
        shape = [slots.shape[0], *bias.shape[1:]]
        shape[dim] = slots.shape[1]
        at = slots[:, None, :, None] if dim == 2 else slots[:, None, None, :]
        bias = bias.expand(slots.shape[0], -1, -1, -1).gather(dim, at.expand(shape))
    return bias
