"""What streaming_text_gpu.py runs a model with: streams, single steps, fresh windows, and a plain reference."""

import time
from collections.abc import Callable, Iterator

import torch
from _smollm2_gpu import Attention, Llama
from _streaming_text_plan import Text
from torch import Tensor
from torch.nn import functional

from attnopt.caches import StreamingCache

#: Tokens whose logits exist at a time.
HEAD_CHUNK = 8192
#: Queries that the plain reference scores at a time.
BLOCK = 1024


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device) -> int | None:
    """Bytes of all tensors on the GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else None


# Streams.


def stream(model: Llama, sinks: int, window: int) -> StreamingCache:
    """An empty cache for the model: the window counts the query's own key."""
    return StreamingCache(sinks=sinks, window=window, rotary=model.rotary)


def through(cache: StreamingCache) -> Attention:
    """The attention function that reads and writes a cache."""
    return lambda q, k, v, layer: cache.attend(q, k, v, layer=layer)


def losses(model: Llama, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden (T, W), targets (T,) -> what each target costs in nats, (T,) fp32, on the CPU."""
    pieces = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat(
        [functional.cross_entropy(model.logits(h).float(), t, reduction="none") for h, t in pieces]
    ).cpu()


def streamed_losses(model: Llama, cache: StreamingCache, ids: Tensor, segment: int) -> Tensor:
    """ids (N,) on the device -> the loss of each token but the first, given those before it: (N - 1,)."""
    found, read = [], reading(model, cache, ids[None, :segment])
    for start in range(0, ids.shape[0] - 1, segment):
        targets = ids[start + 1 : start + 1 + segment]
        hidden = read(ids[None, start : start + targets.shape[0]])
        found.append(losses(model, hidden[0], targets))
    return torch.cat(found)


def recomputed_losses(model: Llama, ids: Tensor, ends: Tensor, window: int) -> Tensor:
    """The loss of token end + 1 after the `window` tokens that end with `end`, as a text of their own: (ends,)."""
    at = ends[:, None] + torch.arange(1 - window, 1, device=ids.device)
    return losses(model, model.hidden(ids[at])[:, -1], ids[ends + 1])


# Graphs, and single steps.


def captured(run: Callable[[], Tensor], warm: Callable[[], object]) -> Callable[[], Tensor]:
    """`run` as one CUDA graph, whose result is overwritten by the next; `run` itself where there is no GPU.

    warm: does the like without side effects, so that every kernel is compiled before.
    """
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            warm()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def replayed(run: Callable[[Tensor], Tensor], ids: Tensor) -> Callable[[Tensor], Tensor]:
    """`run`, for ids of this shape as one CUDA graph: a layer has more launches than the host keeps up with.

    It is run once here, on these ids, so that all is compiled and claimed. A result is overwritten by the next.
    """
    given = ids.clone()
    run(given)
    again = captured(lambda: run(given), lambda: None)

    def call(some: Tensor) -> Tensor:
        if some.shape != given.shape:
            return run(some)
        given.copy_(some)
        return again()

    return call


def reading(model: Llama, cache: StreamingCache, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Takes tokens (B, N) into the cache, which is empty at first, and returns their states (B, N, W)."""
    read = replayed(lambda some: model.hidden(some, through(cache)), ids)
    cache.reset()
    return read


class Stepper:
    """Decodes with a cache that has taken in one token at least, one token of each sequence at a time.

    read: what to make of the states (B, 1, W); the logits, say.
    """

    def __init__(
        self, model: Llama, cache: StreamingCache, read: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        read = read or (lambda states: states)
        ids = torch.zeros(cache.lengths().shape[0], 1, dtype=torch.int64, device=model.embedding.device)

        def run() -> Tensor:
            return read(model.hidden(ids, through(cache)))

        def warm() -> None:
            run()
            cache.crop(1)

        self.ids, self.run = ids, captured(run, warm)

    def step(self, ids: Tensor) -> Tensor:
        """ids (B, 1) -> (B, 1, ...), which the next step overwrites."""
        self.ids.copy_(ids)
        return self.run()

    def steps(self, ids: Tensor) -> tuple[Tensor, float]:
        """ids (B, N) -> (B, N, ...), and the seconds that it took."""
        wait(ids.device)
        begin = time.perf_counter()
        found = [self.step(column).clone() for column in ids.split(1, dim=1)]
        wait(ids.device)
        return torch.cat(found, dim=1), time.perf_counter() - begin


# What a stream has to be equal to.


def fresh_texts(text: Text, ends: Tensor, layers: int, cache: StreamingCache) -> Tensor:
    """All that the logits at positions `ends` depend on in a stream, (len(ends), M): a short text with the same logits.

    A layer sees the sinks and window - 1 tokens before its own; so with all layers, the sinks and
    layers * (window - 1) tokens before the last one.
    """
    reach = torch.arange(-layers * (cache.span.window - 1), 1)
    first = text.at(torch.arange(cache.span.sinks)).expand(len(ends), -1)
    return torch.cat([first, text.at(ends[:, None] + reach)], dim=1)


def plain(model: Llama, sinks: int, window: int) -> Attention:
    """Attention over sinks + window as it is defined, for a text from its start: written apart from attnopt's kernels.

    Keys are kept unrotated and each block of queries rotates those that it sees anew, at their places counted from the
    first key of its window (sinks: from 0, with the query at most at place sinks + window - 1).
    """
    turned = model.rotary.turned

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        del layer
        return torch.cat(list(blocks(q, k, v)), dim=2)

    def blocks(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        everything = torch.arange(q.shape[2], device=q.device)
        for t in everything.split(BLOCK):
            first = max(0, int(t[0]) - window + 1)
            j, s = everything[first : int(t[-1]) + 1], everything[:sinks]
            near = turned(q[:, :, t], (t - first)[None]) @ turned(k[:, :, j], (j - first)[None]).mT
            far = turned(q[:, :, t], t.clamp(max=sinks + window - 1)[None]) @ turned(k[:, :, s], s[None]).mT
            i = t[:, None]
            seen = torch.cat([s <= i, (j >= sinks) & (j <= i) & (j > i - window)], dim=1)
            scores = torch.cat([far, near], dim=3) * q.shape[3] ** -0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            yield weights @ torch.cat([v[:, :, s], v[:, :, j]], dim=2)

    return attend


def row_gaps(a: Tensor, b: Tensor) -> Tensor:
    """||a - b|| / ||b|| by row."""
    return (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats between rows of logits."""
    p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# Recomputing a window as fast as may be.


def fused_window(model: Llama, length: int) -> Attention:
    """Full causal attention by the library's kernel; positions turned by a table that is made once."""
    turned = by_table(model, length)

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        del layer
        return functional.scaled_dot_product_attention(
            turned(q), turned(k), v, is_causal=True, enable_gqa=True
        )

    return attend


def eager_window(model: Llama, length: int) -> Attention:
    """The same spelled N x N, softmax in fp32: what transformers ran when the paper was written."""
    turned, at = by_table(model, length), torch.arange(length, device=model.embedding.device)
    future = at > at[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        del layer
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (turned(k), v))
        scores = (turned(q) @ k.mT * q.shape[3] ** -0.5).masked_fill(future, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return attend


def by_table(model: Llama, length: int) -> Callable[[Tensor], Tensor]:
    """Rotation at positions 0 to length - 1 in the dtype of the weights."""
    at = torch.arange(length, device=model.embedding.device)
    cos, sin = (torch.cat([x, x], -1)[0] for x in model.rotary.waves(model.norm.float(), at[None], 1.0))
    cos, sin = cos.to(model.embedding.dtype), sin.to(model.embedding.dtype)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned
