"""Softmax attention as real code spells it: functions to read, each with what it means.

The sources are named in the comments; HF is huggingface/transformers. A function takes the tensors that its `inputs`
make; sizes are small, odd, and all different where they may be.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

B, H, HKV, S, D, DV = 3, 4, 2, 7, 16, 24
SQ, SK = 5, 9
#: Sizes that a model fixes; the others are symbolic when a test asks for that.
FIXED = frozenset({H, HKV, D, DV, H * D, 3 * H * D, 32})
NEG_INF = float("-inf")

Inputs = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Spelling:
    """attend: computes the attention of `inputs()`; the first `differentiable` of those have gradients.

    The rest is what the spec must say; `biases` counts them; where Sq and Sk are not known, some query may see no key
    (empty_row_symbolic). verdict: "kept" where torch's own call already is it.
    """

    attend: Callable[..., Tensor]
    inputs: Inputs
    scale: float | str = 1.0
    share: int = 1
    mask: str = "full"
    empty_row: str = "never"
    biases: int = 0
    softcap: float | None = None
    alibi: str = ""
    empty_row_symbolic: str | None = None
    verdict: str = "rewritten"
    differentiable: int = 3

    @property
    def name(self) -> str:
        return self.attend.__name__

    def line(self, *, symbolic: bool) -> str:
        """The spec as the report prints it; where sizes are symbolic, without the scale: a size may be part of it."""
        empty_row = (self.empty_row_symbolic if symbolic else None) or self.empty_row
        biases = {0: "", 1: "bias"}.get(self.biases, f"bias x{self.biases}")
        parts = (
            "softmax",
            ""
            if symbolic
            else f"scale={self.scale if isinstance(self.scale, str) else format(self.scale, '.6g')}",
            f"gqa={self.share}" if self.share != 1 else "",
            self.mask,
            f"empty={empty_row}" if empty_row != "never" else "",
            biases,
            f"softcap={self.softcap:g}" if self.softcap else "",
            self.alibi,
        )
        return " ".join(filter(None, parts))


Add = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def collect(found: list[Spelling]) -> Callable[..., Add]:
    """A decorator that adds functions to `found`: it takes what makes the inputs, and the meaning."""

    def spelling(inputs: Inputs, **meaning: object) -> Add:
        def add(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
            found.append(Spelling(attend, inputs, **meaning))  # type: ignore[arg-type]
            return attend

        return add

    return spelling


SPELLINGS: list[Spelling] = []
spelling = collect(SPELLINGS)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def mha() -> tuple[Tensor, ...]:
    """q, k, v with as many keys as queries."""
    return draw(B, H, S, D), draw(B, H, S, D), draw(B, H, S, D)


def cross() -> tuple[Tensor, ...]:
    """Other numbers of queries and keys, other widths of keys and values."""
    return draw(B, H, SQ, D), draw(B, H, SK, D), draw(B, H, SK, DV)


def gqa() -> tuple[Tensor, ...]:
    return draw(B, H, S, D), draw(B, HKV, S, D), draw(B, HKV, S, D)


def single() -> tuple[Tensor, ...]:
    """One head."""
    return draw(B, S, D), draw(B, S, D), draw(B, S, DV)


def by_position() -> tuple[Tensor, ...]:
    """(B, S, H, D): the head after the position."""
    return draw(B, SQ, H, D), draw(B, SK, H, D), draw(B, SK, H, DV)


def padded(make: Inputs) -> Inputs:
    """With a bool (B, Sk) that keeps keys; one row of the batch is padded on the left."""

    def inputs() -> tuple[Tensor, ...]:
        made = make()
        keep = torch.ones(B, next(n for n in made[1].shape if n in {S, SK}), dtype=torch.bool)
        keep[1, :3] = False
        return *made, keep

    return inputs


def with_last(make: Inputs, last: Callable[[], Tensor]) -> Inputs:
    return lambda: (*make(), last())


def upper(n: int, value: float, dtype: torch.dtype | None = None) -> Tensor:
    """`value` above the diagonal, 0 elsewhere: HF's and Meta's causal mask."""
    return torch.triu(torch.full((n, n), value, dtype=dtype), diagonal=1)


def lower_ones() -> Tensor:
    """The buffer of nanoGPT and GPT-2, longer than any sequence."""
    return torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32)


def repeat_kv(x: Tensor, n: int) -> Tensor:
    b, heads, s, d = x.shape
    return x[:, :, None, :, :].expand(b, heads, n, s, d).reshape(b, heads * n, s, d)


def slopes(heads: int) -> Tensor:
    return 2.0 ** -torch.arange(1, heads + 1)


# --- where the scale stands ---


@spelling(mha)
def scale_absent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


@spelling(mha, scale=D**-0.5)
def scale_on_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) * D**-0.5, dim=-1) @ v


@spelling(mha, scale=D**-0.5)
def scale_from_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * (1.0 / math.sqrt(k.size(-1))), dim=-1) @ v


@spelling(mha, scale=D**-0.5)
def scale_divides_by_root_of_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v


@spelling(cross, scale=0.3)
def scale_on_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * 0.3) @ k.transpose(-2, -1)).softmax(dim=-1) @ v  # timm layers/attention.py


@spelling(cross, scale=0.5)
def scale_on_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ (k / 2).transpose(-2, -1), -1) @ v


@spelling(cross, scale=D**-0.5)
def scale_split(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = D**-0.25
    return torch.softmax((q * root) @ (k * root).mT, -1) @ v  # openai/whisper, SDPA's math form


@spelling(mha, scale=0.25)
def scale_is_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale_attn = torch.sqrt(torch.tensor(float(D), dtype=torch.float32))
    return (
        torch.softmax((q.to(torch.float32) @ k.to(torch.float32).mT) / scale_attn, -1).to(v.dtype) @ v
    )  # HF gptj


@spelling(with_last(mha, lambda: torch.tensor(0.7)), scale="1/tensor")
def scale_is_an_input(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / temperature, -1) @ v


@spelling(with_last(mha, lambda: torch.rand(H, 1, 1) + 0.5), scale="tensor", differentiable=4)
def scale_per_head(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT) * temperature, -1) @ v


@spelling(mha, scale=-0.5)
def scale_negative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-(q @ k.mT) * 0.5, -1) @ v


@spelling(mha, scale=0.0)
def scale_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(0.0 * (q @ k.mT), -1) @ v


@spelling(mha, scale=8.0)
def scale_above_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(8.0 * (q @ k.mT), -1) @ v


# --- operands, products and layouts ---


@spelling(cross, scale=0.25)
def product_of_keys_and_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(0.25 * (k @ q.mT), dim=-2).transpose(-1, -2) @ v


@spelling(lambda: (draw(B, S, D), draw(B, D, S), draw(B, DV, S)), scale=D**-0.5)
def values_times_transposed_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = functional.softmax(torch.bmm(q, k) * D**-0.5, dim=2)
    return torch.bmm(v, weights.permute(0, 2, 1))  # CompVis ldm/modules/diffusionmodules/model.py


@spelling(single, scale=0.5)
def three_dimensions_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(q * 0.5, k.transpose(1, 2)), dim=-1), v)


@spelling(lambda: (draw(S, D), draw(S, D), draw(S, DV)), scale=0.5)
def two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.mm(torch.softmax(torch.mm(q, k.t()) * 0.5, dim=1), v)


@spelling(with_last(mha, lambda: draw(B, H, 1, S)), scale=0.5, biases=1, differentiable=4)
def baddbmm_with_bias(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k, v, alibi = (
        q.reshape(b * h, n, d),
        k.mT.reshape(b * h, d, n),
        v.reshape(b * h, n, d),
        alibi.view(b * h, 1, n),
    )
    scores = alibi.baddbmm(batch1=q, batch2=k, beta=1.0, alpha=0.5).view(b, h, n, n)  # HF bloom
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype).view(b * h, n, n)
    return torch.bmm(weights, v).view(b, h, n, d)


@spelling(with_last(single, lambda: draw(B, S, S)), scale=D**-0.5, biases=1)
def baddbmm_with_factors(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.baddbmm(
        mask, q * math.sqrt(1.0 / D), k.transpose(-2, -1), beta=0.5
    )  # torch.nn.functional, and beta
    return torch.bmm(functional.softmax(scores, dim=-1), v)


@spelling(single, scale=0.25)
def baddbmm_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    return (
        torch.softmax(torch.baddbmm(empty, q, k.mT, beta=0, alpha=0.25), -1) @ v
    )  # diffusers get_attention_scores


@spelling(cross, scale=0.25)
def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(0.25).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@spelling(cross)
def einsum_implied_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("...id,...jd", q, k).softmax(-1), v)


@spelling(cross, scale=0.5)
def einsum_with_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum(
        "...ij, ...je -> ...ie", torch.einsum("... i d, ... j d -> ... i j", q, k * 0.5).softmax(-1), v
    )


@spelling(by_position, scale=D**-0.5)
def einsum_head_axis_last_but_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bthd->bsht", q, k) * D**-0.5  # deepseek-ai/DeepSeek-V3 inference/model.py
    return torch.einsum("bsht,bthd->bshd", scores.softmax(dim=-1, dtype=torch.float32).type_as(q), v)


@spelling(by_position, scale=0.125)
def einsum_temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(0.125 * torch.einsum("nlhe,nshe->nhls", q, k), dim=-1)
    return torch.einsum(
        "nhls,nshd->nlhd", weights, v
    ).contiguous()  # idiap/fast-transformers full_attention.py


@spelling(
    lambda: (draw(SQ, B, H, D), draw(SK, B, H, D), draw(SK, B, H, DV), draw(H, D)),
    scale=0.25,
    differentiable=4,
)
def einsum_positions_first(q: Tensor, k: Tensor, v: Tensor, r_w_bias: Tensor) -> Tensor:
    weights = functional.softmax(torch.einsum("ibnd,jbnd->bnij", q + r_w_bias, k) * 0.25, dim=3)  # HF xlnet
    return torch.einsum("bnij,jbnd->ibnd", weights, v)


@spelling(lambda: (draw(B, S, H * D), draw(B, S, H * D), draw(B, S, H * D)), scale=0.25)
def heads_cut_out_of_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(x.shape[0], -1, H, D).transpose(1, 2) for x in (q, k, v))
    out = torch.softmax(q @ k.transpose(2, 3) * 0.25, -1) @ v
    return out.transpose(1, 2).contiguous().view(out.shape[0], -1, H * D)


@spelling(lambda: (draw(B, S, 3 * H * D),), scale=D**-0.5, differentiable=1)
def one_tensor_of_queries_keys_and_values(qkv: Tensor) -> Tensor:
    b, n, _ = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)  # timm vision_transformer.py
    weights = (q * D**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, H * D)


@spelling(lambda: (draw(B, 3, S, H, D), draw(B, 3, S, H, D), draw(B, 3, S, H, D)), scale=1.0)
def batch_of_two_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    scores = torch.matmul(q, k.permute(0, 1, 2, 4, 3))  # aqlaboratory/openfold primitives.py
    return torch.matmul(functional.softmax(scores, -1), v).transpose(-2, -3)


@spelling(lambda: (draw(B, H, S, D), draw(B, H, D, S), draw(B, H, S, D)), scale=0.25)
def keys_stored_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q.matmul(k) * 0.25, dim=-1).to(v.dtype).matmul(v)  # mosaicml/llm-foundry, openai-gpt


# --- precision, dropout ---


@spelling(mha, scale=0.25)
def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.25
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = functional.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()  # HF clip


@spelling(mha, scale=0.5)
def softmax_as_a_module(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.Softmax(dim=-1)(q @ k.mT / 2.0).type(v.dtype) @ v  # HF codegen, gpt2


@spelling(mha, scale=0.5)
def softmax_between_casts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.softmax((q @ k.mT / 2.0).float(), dim=-1).type_as(q) @ v  # meta-llama/llama model.py


# --- masks ---


@spelling(mha, scale=0.25, mask="causal")
def causal_added_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 4 + upper(q.shape[2], NEG_INF), -1) @ v


@spelling(mha, scale=0.25, mask="causal")
def causal_added_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 4 + upper(q.shape[2], torch.finfo(q.dtype).min, q.dtype), -1) @ v


@spelling(mha, scale=0.25, mask="causal")
def causal_mask_plus_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = upper(q.shape[2], NEG_INF)
    return torch.softmax(mask.to(q.dtype)[None, None] + q @ k.mT / 4, -1) @ v


@spelling(mha, scale=0.5, mask="causal")
def causal_added_before_the_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT + upper(q.shape[2], torch.finfo(q.dtype).min, q.dtype)) / 2  # HF codegen
    return torch.nn.Softmax(dim=-1)(scores) @ v


@spelling(mha, scale=0.25, mask="causal")
def causal_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    scores = torch.where(j[None, :] <= i[:, None], q @ k.mT * 0.25, NEG_INF)
    return scores.softmax(-1) @ v


@spelling(mha, scale=1.0, mask="causal")
def causal_by_where_with_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    lowest = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)  # HF gpt_neo
    return functional.softmax(torch.where(seen, scores, lowest), dim=-1) @ v


@spelling(mha, scale=0.25, mask="causal")
def causal_by_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.triu(torch.ones(q.shape[2], k.shape[2]), diagonal=1).bool()
    return (q @ k.mT * 0.25).masked_fill(hidden, NEG_INF).softmax(-1) @ v


@spelling(mha, scale=0.25, mask="causal")
def causal_by_masked_fill_of_the_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().logical_not()
    return ((q @ k.mT).masked_fill(hidden, -1e38) * 0.25).softmax(-1) @ v


@spelling(mha, scale=0.25, mask="causal")
def causal_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores /= 4.0
    scores.masked_fill_(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1), NEG_INF)
    return scores.softmax(-1) @ v


@spelling(with_last(mha, lower_ones), scale=0.25, mask="opaque", empty_row="nan")
def causal_buffer_sliced(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    t = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    return (
        functional.softmax(scores.masked_fill(bias[:, :, :t, :t] == 0, NEG_INF), dim=-1) @ v
    )  # karpathy/nanoGPT


@spelling(cross, scale=0.25, mask="causal(Sk-Sq)", empty_row_symbolic="nan")
def causal_after_a_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    past = k.shape[2] - q.shape[2]
    i, j = torch.arange(q.shape[2])[:, None] + past, torch.arange(k.shape[2])[None, :]
    return torch.softmax((q @ k.mT * 0.25).masked_fill(j > i, NEG_INF), -1) @ v


@spelling(lambda: (draw(B, H, 1, D), draw(B, H, SK, D), draw(B, H, SK, D)), scale=0.25)
def one_query_over_a_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) * 0.25, dim=-1, dtype=torch.float32).to(q.dtype) @ v


@spelling(mha, scale=0.25, mask="causal & window(3)", empty_row_symbolic="uniform")
def causal_and_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
    seen = (distance >= 0) & (distance < 3)
    return torch.softmax((q @ k.mT * 0.25).masked_fill(~seen, torch.finfo(q.dtype).min), -1) @ v


@spelling(padded(mha), scale=0.25, mask="padding", empty_row="nan")
def padding_by_masked_fill(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT * 0.25).masked_fill(~keep[:, None, None, :], NEG_INF), -1) @ v


@spelling(padded(cross), scale=0.25, mask="padding", empty_row="uniform")
def padding_in_place(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.matmul(q / 4, k.transpose(2, 3))
    hidden = (keep == 0).view(keep.shape[0], 1, 1, -1).expand_as(scores)
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)  # HF xlm
    return functional.softmax(scores.float(), dim=-1).type_as(scores) @ v


@spelling(padded(cross), scale=0.25, mask="padding", empty_row="absorbed")
def padding_by_arithmetic(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(
        q.dtype
    ).min  # HF get_extended_attention_mask
    return torch.softmax(q @ k.mT / 4 + mask, -1) @ v


@spelling(padded(cross), scale=0.25, biases=1)
def padding_subtracted(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q * 0.25, k)
    return (scores - 1e30 * (1 - keep[:, None, None].float())).softmax(-1) @ v  # HF xlnet, funnel


@spelling(
    padded(lambda: (draw(SQ, B, H * D), draw(SK, B, H * D), draw(SK, B, H * D))),
    scale=0.25,
    mask="padding",
    empty_row="nan",
)
def padding_through_a_view(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    t, b, s = q.shape[0], q.shape[1], k.shape[0]
    q, k, v = (x.contiguous().view(-1, b * H, D).transpose(0, 1) for x in (q * 0.25, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(b, H, t, s)
    scores = scores.masked_fill(~keep.unsqueeze(1).unsqueeze(2).to(torch.bool), NEG_INF).view(b * H, t, s)
    weights = functional.softmax(scores.float(), dim=-1).type_as(q)
    return (
        torch.bmm(weights, v).transpose(0, 1).contiguous().view(t, b, H * D)
    )  # fairseq multihead_attention.py


@spelling(padded(mha), scale=0.25, mask="causal & padding", empty_row="nan")
def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    t = q.shape[2]
    seen = torch.ones(t, t, dtype=torch.bool).tril()[None, None] & keep[:, None, None, :]
    return torch.where(seen, q @ k.mT * 0.25, NEG_INF).softmax(-1) @ v


@spelling(
    with_last(cross, lambda: torch.rand(B, 1, SQ, SK) > 0.4), scale=0.25, mask="opaque", empty_row="nan"
)
def opaque_boolean(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(torch.where(mask, q @ k.mT * 0.25, NEG_INF), -1) @ v


@spelling(
    with_last(cross, lambda: torch.rand(B * H, SQ, SK) > 0.4), scale=0.25, mask="opaque", empty_row="uniform"
)
def opaque_boolean_over_folded_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * 0.25  # CompVis ldm/modules/attention.py
    sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
    return torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)


# --- biases, soft cap ---


@spelling(with_last(cross, lambda: draw(1, H, SQ, SK)), biases=1, differentiable=4)
def bias_of_positions(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += position_bias  # HF t5
    return functional.softmax(scores.float(), dim=-1).type_as(scores) @ v


@spelling(with_last(mha, lambda: draw(1, H, S, S)), biases=1, mask="causal", differentiable=4)
def bias_of_positions_and_causal(q: Tensor, k: Tensor, v: Tensor, position_bias: Tensor) -> Tensor:
    scores = (
        torch.matmul(q, k.transpose(3, 2))
        + position_bias
        + upper(q.shape[2], torch.finfo(q.dtype).min, q.dtype)
    )
    return torch.softmax(scores, -1) @ v


@spelling(with_last(mha, lambda: draw(B, H, S, S)), biases=2, scale=0.25, differentiable=4)
def bias_list_in_place(q: Tensor, k: Tensor, v: Tensor, pair: Tensor) -> Tensor:
    scores = torch.matmul(q / 4, k.mT)
    for bias in (pair, pair[:, :1].detach() * 2):
        scores += bias  # aqlaboratory/openfold
    return torch.softmax(scores, -1) @ v


@spelling(mha, scale=0.25, mask="causal", alibi="alibi")
def alibi_with_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    j = torch.arange(k.shape[2], dtype=q.dtype)
    scores = q @ k.mT * 0.25 + (slopes(H)[:, None, None] * (j - k.shape[2] + 1)[None, None, :])
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (
        torch.softmax(scores.masked_fill(hidden, torch.finfo(q.dtype).min).float(), -1).to(v.dtype) @ v
    )  # HF mpt


@spelling(with_last(mha, lambda: draw(B, H, 1, S)), scale=0.25, biases=1, differentiable=4)
def bias_scaled_with_the_scores(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    return functional.softmax((q @ k.mT + alibi) * 0.25, dim=-1, dtype=q.dtype) @ v  # HF falcon


@spelling(
    with_last(cross, lambda: torch.where(torch.rand(B, 1, SQ, SK) > 0.3, 0.0, NEG_INF)), scale=0.25, biases=1
)
def opaque_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT
    scores /= 4
    return functional.softmax(scores + mask, dim=-1, dtype=scores.dtype) @ v  # HF falcon


@spelling(with_last(cross, lambda: torch.randint(0, 2, (B, 1, SQ, SK)).bool()), scale=0.25, biases=1)
def boolean_added_is_a_bias(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.25 + mask, -1) @ v  # 1 where True: not a mask


@spelling(lambda: (*by_position(), draw(B, SQ, H, D), draw(B, SK, D)), scale=0.25, differentiable=5)
def two_products_summed(q: Tensor, k: Tensor, v: Tensor, q_rope: Tensor, k_rope: Tensor) -> Tensor:
    scores = (torch.einsum("bshd,bthd->bsht", q, k) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)) * 0.25
    return torch.einsum("bsht,bthd->bshd", scores.softmax(-1), v)  # DeepSeek-V3's two parts of a score


@spelling(mha, scale=0.25, softcap=5.0, mask="causal")
def soft_cap_then_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * 0.25 / 5.0) * 5.0  # HF gemma2
    return torch.softmax(scores + upper(q.shape[2], NEG_INF), -1, dtype=torch.float32).to(q.dtype) @ v


@spelling(mha, softcap=5.0)
def soft_cap_with_queries_scaled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q + 0
    q.mul_(0.25)  # google/gemma_pytorch
    scores = q @ k.mT
    scores = scores / 5.0
    return torch.softmax(torch.tanh(scores) * 5.0, -1) @ v


@spelling(mha, scale=0.25)
def constant_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(3.0 + q @ k.mT * 0.25 - 1.5, -1) @ v  # adds nothing to a softmax


# --- heads that share keys and values ---


@spelling(gqa, scale=0.25, share=2, mask="causal")
def heads_repeated_by_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeat_kv(k, H // HKV), repeat_kv(v, H // HKV)
    weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5
    weights = weights + upper(q.shape[2], torch.finfo(q.dtype).min, q.dtype)[None, None, :, : k.shape[-2]]
    weights = functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return (
        torch.matmul(functional.dropout(weights, 0.0, training=False), v).transpose(1, 2).contiguous()
    )  # HF llama


@spelling(gqa, scale=0.25, share=2)
def heads_repeated_by_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, dim=1), torch.repeat_interleave(v, 2, 1)
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


@spelling(gqa, scale=0.25, share=2)
def heads_tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)  # head h reads kv head h % Hkv
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


@spelling(lambda: (draw(B, S, HKV, 2, D), draw(B, S, HKV, D), draw(B, S, HKV, DV)), scale=0.25, share=2)
def heads_grouped_in_five_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhgd,bkhd->bhgqk", q * 0.25, k).softmax(-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, v)  # fla ops/attn/naive.py


@spelling(lambda: (draw(B, H, SQ, D), draw(B, SK, D), draw(B, SK, DV)), scale=0.25, share=H)
def one_key_head_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("b h i d, b j d -> b h i j", q, k).mul(0.25).softmax(dim=-1)
    return torch.einsum("b h i j, b j d -> b h i d", weights, v)  # lucidrains/x-transformers


@spelling(lambda: (draw(B, H, SQ, D), draw(B, 1, SK, D), draw(B, 1, SK, DV)), scale=0.25, share=H)
def one_key_head_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


@spelling(lambda: (draw(S, HKV, 2, D), draw(S, HKV, D), draw(S, HKV, D)), scale=0.25, share=2, mask="causal")
def heads_grouped_without_a_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[0]
    k = k[:, :, None, :].expand(-1, -1, 2, -1)
    v = v[:, :, None, :].expand(-1, -1, 2, -1)
    scores = torch.einsum("qhmd,khmd->hmqk", q, k)  # openai/gpt-oss torch/model.py
    scores *= 0.25
    scores += upper(n, NEG_INF, q.dtype)[None, None, :, :]
    return torch.einsum("hmqk,khmd->qhmd", torch.softmax(scores, dim=-1), v).reshape(n, -1)


# --- torch's own call ---


@spelling(cross, scale=D**-0.5, verdict="kept")
def sdpa_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


@spelling(cross, scale=0.3, mask="causal", verdict="kept")
def sdpa_causal_aligns_at_the_top_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@spelling(gqa, scale=D**-0.5, share=2, mask="causal", verdict="kept")
def sdpa_grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@spelling(mha, scale=D**-0.5, mask="causal")
def sdpa_with_a_causal_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@spelling(
    with_last(cross, lambda: torch.rand(B, 1, SQ, SK) > 0.9),
    scale=D**-0.5,
    mask="opaque",
    empty_row="zero",
    verdict="kept",
)
def sdpa_with_an_opaque_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling(
    with_last(cross, lambda: draw(H, SQ, SK)),
    scale=D**-0.5,
    biases=1,
    empty_row="zero",
    verdict="kept",
    differentiable=4,
)
def sdpa_with_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
