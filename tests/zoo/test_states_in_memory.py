"""A loop whose output is used before its last state is written to a cache: Mamba-2 with `use_cache`."""

import torch
import transformers
from compiling import reports_after

import attnopt


def test_a_state_may_be_written_to_a_cache_after_the_output_is_used() -> None:
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, expand=2, state_size=16,
        n_groups=1, chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.Mamba2ForCausalLM(config).eval(), torch.randint(0, 64, (2, 16))
    before = attnopt.reports()
    compiled = torch.compile(model, backend="attnopt", options={"inner": "eager"})
    with torch.no_grad():
        want, got = model(ids), compiled(ids)
    assert [site.verdict for site in reports_after(before).attention] == ["rewritten"] * 2
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    following = torch.randint(0, 64, (2, 1))
    with torch.no_grad():
        after = [model(following, cache_params=out.cache_params).logits for out in (want, got)]
    torch.testing.assert_close(*after, rtol=1e-5, atol=1e-5)
