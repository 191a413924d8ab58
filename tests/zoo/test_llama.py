"""A small Llama of Hugging Face: every layer rewritten, whatever the masks and sizes, in training and generation."""

import pytest
import torch
from oracle import assert_same
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import attnopt

LAYERS = 2


def llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padded(length: int) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :3] = 0
    return mask


def compiled(model: LlamaForCausalLM, *, dynamic: bool | None = False) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="attnopt", options={"inner": "aot_eager"}, dynamic=dynamic)


def assert_logits(
    model: LlamaForCausalLM, run: torch.nn.Module, ids: Tensor, mask: Tensor | None = None
) -> None:
    """Of the tokens that are no padding; the yardstick is the library's call, whose masks hold in fp64 too."""
    kept = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        got, eager = (m(ids, attention_mask=mask, use_cache=False).logits[kept > 0] for m in (run, model))
        exact = llama("sdpa").double()
        assert_same(got, exact(ids, attention_mask=mask, use_cache=False).logits[kept > 0], eager)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_eager_attention_is_rewritten_in_every_layer(*, dynamic: bool) -> None:
    model = llama("eager")
    run = compiled(model, dynamic=dynamic)
    for length in (9, 14):
        assert_logits(model, run, tokens(length))
    sites = attnopt.reports()[-1].sites
    assert [(s.verdict, s.module) for s in sites] == [
        ("rewritten", f"model.layers.{n}.self_attn") for n in range(LAYERS)
    ]
    assert all("gqa=2 causal" in s.spec and s.error is not None and s.error < 1e-9 for s in sites)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding_is_respected(attention: str) -> None:
    model = llama(attention)
    run = compiled(model)
    assert_logits(model, run, tokens(9), left_padded(9))
    assert {s.verdict for s in attnopt.reports()[-1].sites} <= {"rewritten", "kept"}


def test_the_librarys_own_calls_are_read_too() -> None:
    model = llama("sdpa")
    assert_logits(model, compiled(model), tokens(9))
    sites = attnopt.reports()[-1].sites
    assert [s.spec for s in sites] == ["softmax scale=0.25 gqa=2 causal"] * LAYERS
    assert {s.verdict for s in sites} <= {
        "kept",
        "rewritten",
    }  # rewritten where a causal mask came as a tensor


def test_a_training_step_has_eagers_loss_and_gradients() -> None:
    model, ids = llama("eager").train(), tokens(9)
    run = compiled(model)
    for step in (model, run):
        model.zero_grad()
        loss = step(ids, labels=ids, use_cache=False).loss
        loss.backward()
        if step is model:
            wanted, gradients = loss.detach(), [p.grad.clone() for p in model.parameters()]
    torch.testing.assert_close(loss.detach(), wanted)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=1e-4, atol=1e-6)


def test_generation_says_the_same() -> None:
    model, ids = llama("eager"), tokens(5)
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.forward = compiled(model.forward, dynamic=True)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), wanted)


def test_explain_leaves_the_model_as_it_is() -> None:
    model, ids = llama("eager"), tokens(9)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    report = attnopt.explain(model, ids, use_cache=False)
    assert [s.verdict for s in report.sites] == ["rewritten"] * LAYERS
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert type(model) is LlamaForCausalLM
