"""A sink that is trained for the purpose: two small language models, with it and without, then streamed.

    python examples/dedicated_sink.py [--steps N] [--text FILE] [--seed N]

The pre-training study of StreamingLLM (Xiao et al., arXiv 2309.17453, section 3.3 and table 3) at a size that trains
here. Both models read bytes and are trained alike on the opening of Austen's *Emma*, in pieces of `CONTEXT` keys. In
the second one each head has a learned logit that takes part in its softmax and has no value (as in gpt-oss; fixed at
zero, it is the study's "zero sink"): weight that a head has no use for goes there, not to the first tokens. Then they
read what was held out as one stream through `attnopt.caches.StreamingCache`, many times as long as any piece, seeing as
many keys as in training: the last ones, and the first 0, 1, 2 or 4 of the stream.

A sink logit z is a key: in one more feature it has z * sqrt(D) where all other keys have 0 and all queries 1; its
value is zero. So the cache serves it exactly, as its one sink: "1" in the table. "0" drops it, which the model has not
learned to bear; first keys beside it are of little use. (The study's own way, a sink token, is learned too slowly for
a minute: after 500 steps no head gave it 3 % of its weight.)
"""

import argparse
import math
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from attnopt.caches import Rotary, StreamingCache

TEXT = Path(__file__).parent / "data" / "emma.txt"
SINKS = (0, 1, 2, 4)

LAYERS, WIDTH, HEADS, BYTES = 2, 64, 4, 256
HEAD = WIDTH // HEADS
CONTEXT, BATCH = 64, 16
RATE, RATE_OF_SINKS = 6e-3, 5e-2
#: Bytes at the end of the text that are not trained on.
HELD_OUT = 4_096

out, progress = Console(), Console(stderr=True)


class Attention(nn.Module):
    """x (B, N, W) -> the same. logits (H,): what each head's sink scores, or None."""

    def __init__(self, *, has_sink: bool) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.logits = nn.Parameter(torch.zeros(HEADS)) if has_sink else None
        self.rotary = Rotary.of(HEAD)

    def forward(self, x: Tensor, cache: StreamingCache | None, layer: int) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for y in self.project(x).chunk(3, dim=-1))
        if self.logits is not None:
            begins = cache is None or layer not in cache.layers
            q, k, v = with_sink(q, k, v, self.logits) if begins else (*widened(q, k), v)
        mixed = self.mixed(q, k, v) if cache is None else cache.attend(q, k, v, layer=layer, scale=HEAD**-0.5)
        return self.out(mixed[:, :, -x.shape[1] :].transpose(1, 2).flatten(2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over the piece of text alone."""
        at = torch.arange(q.shape[2])[None]
        q, k = self.rotary.turned(q, at), self.rotary.turned(k, at)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=HEAD**-0.5)


def widened(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """One more feature, by which a sink alone is scored."""
    return F.pad(q, (0, 1), value=1.0), F.pad(k, (0, 1))


def with_sink(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the sink in front: q, k (B, H, N + 1, D + 1), v (B, H, N + 1, D)."""
    q, k, v = (F.pad(x, (0, 0, 1, 0)) for x in (*widened(q, k), v))
    sink = F.pad(logits[:, None, None] * HEAD**0.5, (HEAD, 0)).expand_as(k[:, :, :1])
    return q, torch.cat([sink, k[:, :, 1:]], dim=2), v


class Block(nn.Module):
    """Attention, then an MLP, each on normed input and added to what came in."""

    def __init__(self, *, has_sink: bool) -> None:
        super().__init__()
        self.attention = Attention(has_sink=has_sink)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, cache: StreamingCache | None, layer: int) -> Tensor:
        x = x + self.attention(self.norm_1(x), cache, layer)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class ByteModel(nn.Module):
    """Bytes (B, N), int64, to logits of the next ones (B, N, 256): of a piece, or of a stream that goes on."""

    def __init__(self, *, has_sink: bool) -> None:
        super().__init__()
        self.has_sink, self.rotary = has_sink, Rotary.of(HEAD)
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.blocks = nn.ModuleList(Block(has_sink=has_sink) for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, BYTES, bias=False)

    @property
    def piece(self) -> int:
        """Bytes that it reads at a time in training: CONTEXT keys with the sink."""
        return CONTEXT - self.has_sink

    def forward(self, ids: Tensor, cache: StreamingCache | None = None) -> Tensor:
        x = self.embedding(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        logits: Tensor = self.head(self.norm(x))
        return logits


def losses(model: ByteModel, ids: Tensor, cache: StreamingCache | None = None) -> Tensor:
    """What each byte of ids (B, N) but the first costs in nats, given those before it: (B, N - 1)."""
    return F.cross_entropy(model(ids[:, :-1], cache).transpose(1, 2), ids[:, 1:], reduction="none")


def trained(data: Tensor, *, has_sink: bool, steps: int, seed: int) -> ByteModel:
    """A model after `steps` batches of pieces of data (N,)."""
    torch.manual_seed(seed)
    model = ByteModel(has_sink=has_sink)
    sinks = [p for name, p in model.named_parameters() if name.endswith("logits")]
    others = [p for name, p in model.named_parameters() if not name.endswith("logits")]
    optimiser = torch.optim.AdamW(others, lr=RATE, weight_decay=0.1, betas=(0.9, 0.98))
    if has_sink:
        optimiser.add_param_group({"params": sinks, "lr": RATE_OF_SINKS, "weight_decay": 0.0})
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min(1.0, (n + 1) / 20) * (1 - n / (steps + 1))
    )
    name = "with a sink" if has_sink else "plain"
    for _ in track(range(steps), f"training: {name}", console=progress):
        starts = torch.randint(data.shape[0] - model.piece, (BATCH, 1))
        loss = losses(model, data[starts + torch.arange(model.piece + 1)]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def streamed(model: ByteModel, ids: Tensor, sinks: int) -> float:
    """The perplexity of a byte of ids (1, N), once the cache is full, read as one stream."""
    cache = StreamingCache(sinks=sinks, window=CONTEXT - sinks, rotary=model.rotary)
    return math.exp(losses(model, ids, cache)[0, CONTEXT:].mean())


@torch.no_grad()
def recomputed(model: ByteModel, ids: Tensor) -> float:
    """The same with each byte predicted from a piece of its own: slow, and what streaming stands for."""
    pieces = ids[0, 1 + CONTEXT - model.piece :].unfold(0, model.piece + 1, 1)
    return math.exp(torch.cat([losses(model, some)[:, -1] for some in pieces.split(256)]).mean())


def study(text: bytes, steps: int, seed: int) -> Table:
    """Trains both and streams them: the study's table."""
    data = torch.tensor(list(text))
    data, rest = data[:-HELD_OUT], data[None, -HELD_OUT:]
    columns = ("first keys kept", *map(str, SINKS), "recomputed")
    table = Table(*columns, title=f"Perplexity of a byte in {HELD_OUT:,}, {CONTEXT} keys seen")
    for name, has_sink in (("plain", False), ("with a sink in each head", True)):
        model = trained(data, has_sink=has_sink, steps=steps, seed=seed)
        figures = [*(streamed(model, rest, n) for n in SINKS), recomputed(model, rest)]
        table.add_row(name, *(f"{x:.3f}" for x in figures))
    return table


def main() -> None:
    """Trains, streams, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="batches of each model")
    parser.add_argument("--text", type=Path, default=TEXT, help="what to train on; its end is held out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    begin = perf_counter()
    out.print(study(given.text.read_bytes(), given.steps, given.seed))
    progress.print(f"{perf_counter() - begin:.0f} s", style="dim")


if __name__ == "__main__":
    main()
