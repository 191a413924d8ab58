"""In padded batches each row is what it would be alone: StreamingLLM token by token, in prefill and in decode."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compiling import reports_after
from streaming_models import CLOSE, ROTARY, SINKS, STREAMING, WINDOW, build, published
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import attnopt
from attnopt.report import Report

#: Lengths of the prompts in a batch: beyond the last place, at it, within the sinks, and the longest.
LENGTHS = (13, SINKS + WINDOW, SINKS, 17)
STEPS = 9


def model_of(kind: str) -> PreTrainedModel:
    """transformers' own spelling of eager attention casts a mask of fp64 to fp32, which ends earlier."""
    model = build(kind, **ROTARY[kind][0])
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("sdpa")
    return model


def prompts() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (n,), generator=draw) for n in LENGTHS]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Tokens and mask (B, N)."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, own in enumerate(rows):
        at = slice(width - len(own), width) if side == "left" else slice(0, len(own))
        ids[row, at], mask[row, at] = own, 1
    return ids, mask


def alone(model: PreTrainedModel, kind: str, row: Tensor) -> Tensor:
    """(N, vocabulary)."""
    logits = published(model, row[None], neighbours=ROTARY[kind][1])[0]
    model.set_attn_implementation("sdpa")
    return logits


def compiled(model: PreTrainedModel, **more: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model.forward, backend="attnopt", options={**STREAMING, "inner": "eager"}, **more)


def assert_streamed(earlier: Sequence[Report]) -> None:
    sites = reports_after(earlier).sites
    assert sites
    assert {(site.kernel, site.exact) for site in sites} == {("streaming", False)}


def test_generate_of_a_left_padded_batch_is_generate_of_each_prompt() -> None:
    model = model_of("llama")
    ids, mask = padded(prompts(), "left")
    earlier = attnopt.reports()
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        plain, model.forward = model.forward, compiled(model, dynamic=True)
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        model.forward = plain
    assert_streamed(earlier)
    logits = torch.stack(made.logits, 1)
    for row, prompt in enumerate(prompts()):
        text = torch.cat([prompt, made.sequences[row, ids.shape[1] :]])
        wanted = alone(model, "llama", text)[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row], wanted.float(), **CLOSE)
        assert torch.equal(wanted.argmax(-1), text[len(prompt) :])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "given"), [("llama", False), ("cohere", True), ("phi", True)])
def test_a_prefill_of_a_padded_batch_is_that_of_each_row(kind: str, side: str, *, given: bool) -> None:
    """Positions come with the batch, or the model counts slots, the padding too: distances are the same."""
    model = model_of(kind)
    ids, mask = padded(prompts(), side)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if given else {}
    earlier = attnopt.reports()
    with torch.no_grad():
        got = compiled(model)(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    assert_streamed(earlier)
    for row, prompt in enumerate(prompts()):
        torch.testing.assert_close(got[row, mask[row].bool()], alone(model, kind, prompt), **CLOSE)


def test_any_split_of_padded_texts_gives_the_same() -> None:
    """Padding on the right, so that it lies between a prompt and what comes after it."""
    model = model_of("llama")
    ids, mask = padded(prompts(), "right")
    more = torch.randint(3, 64, (len(ids), STEPS), generator=torch.Generator().manual_seed(2))
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pieces, at = [], 0
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        run, cache = compiled(model, dynamic=True), DynamicCache(config=model.config)
        for count in (9, 8, *(1,) * STEPS):
            here = slice(at, at + count)
            at += count
            parts = {
                "input_ids": ids[:, here],
                "position_ids": positions[:, here],
                "attention_mask": mask[:, :at],
            }
            fed = {name: part.clone() for name, part in parts.items()}
            pieces.append(run(**fed, past_key_values=cache).logits)
    got = torch.cat(pieces, 1)
    for row, keep in enumerate(mask.bool()):
        torch.testing.assert_close(got[row, keep], alone(model, "llama", ids[row, keep]), **CLOSE)


@pytest.mark.parametrize("padding", [True, False], ids=["padded", "full"])
def test_steps_over_a_static_cache_are_streamed(*, padding: bool) -> None:
    """Without padding the prompt as well; with it, the prompt is no longer than sinks and window, and runs as it is."""
    model = model_of("llama")
    rows = [row[: SINKS + WINDOW] for row in prompts()] if padding else [prompts()[3], prompts()[3].flip(0)]
    ids, mask = padded(rows, "left")
    earlier = attnopt.reports()
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        plain, model.forward = model.forward, compiled(model)
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=2 * STEPS, do_sample=False, output_logits=True,
            return_dict_in_generate=True, past_key_values=StaticCache(config=model.config, max_cache_len=40),
        )  # fmt: skip
        model.forward = plain
    sites = reports_after(earlier).sites
    assert [site.exact for site in sites] == [padding, padding, False, False]
    if padding:
        assert "only prompts without padding and steps of one token are cut" in sites[0].reason
    assert "taken to lie in the order of their positions, and its mask to end" in sites[2].reason
    logits = torch.stack(made.logits, 1)
    for row, prompt in enumerate(rows):
        text = torch.cat([prompt, made.sequences[row, ids.shape[1] :]])
        wanted = alone(model, "llama", text)[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row], wanted.float(), **CLOSE)
