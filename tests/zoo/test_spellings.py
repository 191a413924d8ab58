"""Ten architectures of Hugging Face, each with a spelling of its own: every site rewritten, results as eager's."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from coverage_measure import measure
from coverage_modes import Mode
from coverage_subjects import Subject, hugging_face

#: Model class -> what is peculiar about it, and how many sites its two layers have.
ARCHITECTURES = {
    "BloomForCausalLM": ("baddbmm with ALiBi", 2),
    "FalconForCausalLM": ("one key head, divided in place", 2),
    "CodeGenForCausalLM": ("the mask added before the scores are divided", 2),
    "Gemma2ForCausalLM": ("a soft cap, a window in every other layer", 2),
    "GptOssForCausalLM": ("a learned sink concatenated to the scores; a router of experts", 2),
    "MptForCausalLM": ("ALiBi, then masked_fill", 2),
    "DeepseekV2ForCausalLM": ("keys of two parts, values narrower than keys", 2),
    "XLNetLMHeadModel": ("einsum with the heads last, relative positions", 2),
    "DebertaV2ForMaskedLM": ("disentangled biases", 2),
    "T5ForConditionalGeneration": ("a learned bias, three kinds of attention", 6),
}
MODES = [Mode(), Mode(mask="left"), Mode(training=True)]


def subject(model: str) -> Subject:
    """The benchmark's subject for a model class."""
    return next(
        s for family in ("causal", "masked", "seq2seq") for s in hugging_face(family) if s.name == model
    )


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # how bloom calls its own GELU
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_every_site_is_rewritten_and_the_results_are_eagers(model: str, mode: Mode) -> None:
    torch.set_num_threads(1)
    row = measure(subject(model), mode, peers=False)
    _, sites = ARCHITECTURES[model]
    assert (row.error, row.wrong, row.crashes) == ("", [], [])
    assert Counter(row.verdicts)["rewritten"] == sites, row.left


def test_a_router_is_left_alone_with_a_reason() -> None:
    row = measure(subject("MixtralForCausalLM"), Mode(), peers=False)
    assert row.verdicts == {"rewritten": 2, "rejected": 2}
    assert all(reason for _, _, reason, _, _ in row.left)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_model_that_is_partly_left_to_python_is_proven_in_fp64() -> None:
    """Zaya's residual stream is fp32 by name; its experts have a loop in fp64, which leaves the model to Python."""
    torch.set_num_threads(1)
    row = measure(subject("ZayaForCausalLM"), Mode(training=True), peers=False)
    assert (row.wrong, row.proven, row.verdicts["rewritten"]) == ([], True, 2), row.notes
