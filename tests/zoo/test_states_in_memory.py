"""A loop whose output is used before its last state is written to a cache: Mamba-2 with `use_cache`."""

import pytest
import torch
import transformers
from compiling import reports_after

import attnopt


@pytest.mark.parametrize("length", [16, 19], ids=["whole chunks", "padded"])
def test_a_state_may_be_written_to_a_cache_after_the_output_is_used(length: int) -> None:
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, expand=2, state_size=16,
        n_groups=1, chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.Mamba2ForCausalLM(config).eval(), torch.randint(0, 64, (2, length))
    before = attnopt.reports()
    compiled = torch.compile(model, backend="attnopt", options={"inner": "eager"})
    with torch.no_grad():
        want, got = model(ids), compiled(ids)
    sites = reports_after(before).attention
    assert [(site.verdict, site.nearest_rule) for site in sites] == [("rewritten", "linear loop")] * 2
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    following = torch.randint(0, 64, (2, 1))
    with torch.no_grad():
        after = [model(following, cache_params=out.cache_params).logits for out in (want, got)]
    torch.testing.assert_close(*after, rtol=1e-5, atol=1e-5)
