"""SparQ's cache as transformers sees it: layers in buffers that never move, and share their lengths."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache

from attnopt.caches_sparq_layer import Choices, Counts, Made, SparqLayer
from attnopt.errors import OptionError, ShapeError
from attnopt.sparq_cache import Memory, SparqCache


class TransformersSparqCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A transformers Cache in buffers that never move: made by `attnopt.caches.sparq`.

    Detached (after the `with`) it is a plain static cache: every attention reads all of it, exactly. Then
    torch.compile(model, backend="attnopt", options={"softmax": "sparq"}) decodes over it with SparQ.
    """

    def __init__(self, made: Made) -> None:
        self.made, self.counts = made, Counts()
        layers = [SparqLayer(made, self.counts, n) for n in range(made.layers)]
        super().__init__(layers=layers)

    def fresh(self) -> "TransformersSparqCache":
        """Another, empty cache for the same model and the same `with`."""
        return TransformersSparqCache(self.made)

    def memory(self) -> Memory:
        """What the buffers of all layers take; nothing before the first forward."""
        return sum((cache.memory() for cache in self._held()), Memory(0, 0, 0))

    def _held(self) -> list[SparqCache]:
        return [layer.cache for layer in self.layers if layer.cache is not None]

    def reset(self) -> None:
        """Forgets all tokens and the padding; the memory stays."""
        self.made.session.waiting = None
        for cache in self._held():
            cache.reset()
        self.counts.is_fresh = True

    def pad(self, starts: Tensor) -> None:
        """Says how many positions of each row are left padding, (B,): for a detached cache, before its first token."""
        self.reset()
        self.counts.claim(len(starts), starts.device)[0].copy_(starts)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -`tokens_to_remove` tokens back; reads all values, for their mean."""
        if tokens_to_remove > 0:
            raise OptionError(f"crop({tokens_to_remove}); wanted minus the number of tokens to take back")
        if self.counts.lengths is None:
            return
        wanted = self.counts.lengths + tokens_to_remove
        for cache in self._held():
            cache.crop(wanted)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row n becomes what row beam_idx[n] was, in place."""
        held = self._held()
        if not held:
            return
        if beam_idx.shape[0] != held[0].plan.batch:
            raise ShapeError(
                f"{beam_idx.shape[0]} rows for a batch of {held[0].plan.batch}; wanted batch_select_indices"
            )
        shared = held[0].starts, held[0].lengths
        for buffer in (*shared, *(x for cache in held for x in cache.stored())):
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The batch becomes the rows `indices`, any number of them; the buffers move when their number changes."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        held = self._held()
        if not held or rows.shape[0] == held[0].plan.batch:
            return self.reorder_cache(rows)
        others = [cache.select(rows) for cache in held]
        self.counts.starts, self.counts.lengths = others[0].starts, others[0].lengths
        for layer, other in zip(self.layers, others, strict=True):
            layer.hold(other)
        return None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one behind the other."""
        held = self._held()
        if held:
            rows = torch.arange(held[0].plan.batch, device=held[0].k.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def choosing(self, choices: Choices) -> None:
        """Other choices from now on; what is stored does not depend on them."""
        self.made = replace(self.made, choices=choices)
        for layer in self.layers:
            layer.made = self.made
