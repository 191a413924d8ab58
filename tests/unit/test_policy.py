"""Which kernel serves a site: exact by itself, an approximation only when named, and never one that failed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from attnopt.mask import BOTTOM_RIGHT, FULL, Causal, First, KeyPadding, Mask, Opaque, Window
from attnopt.options import Options
from attnopt.policy import choose, is_quarantined, quarantine
from attnopt.rule import Cost, SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec, EmptyRow, Sparse, Stream

READS = frozenset({"scale", "mask", "empty_row", "heads"})


@dataclass(frozen=True)
class Fake:
    """A kernel that computes nothing, and says what it is told to say."""

    name: str
    flops: float = 1.0
    exact: bool = True
    reads: frozenset[str] = READS
    reason: str | None = None
    family: Literal["softmax", "linear"] = "softmax"

    def refuse(self, site: SiteMeta) -> str | None:
        del site
        return self.reason

    def cost(self, site: SiteMeta) -> Cost:
        del site
        return Cost(0.0, self.flops)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError


CHEAP, DEAR = Fake("cheap", 1.0), Fake("dear", 9.0)
SPARQ = Fake("sparq", 0.1, exact=False, reads=READS | {"sparse"})
STREAMING = Fake("streaming", 0.5, reads=READS | {"stream"})


def site(mask: Mask = FULL, sq: int = 8, **changes: object) -> SiteMeta:
    shape = TensorMeta((1, 2, 8, 4), torch.float32, torch.device("cpu"))
    query = replace(shape, shape=(1, 2, sq, 4))
    return SiteMeta(
        replace(AttentionSpec("softmax", mask=mask), **changes), {"q": query, "k": shape, "v": shape}
    )


def name_of(meta: SiteMeta, *kernels: Fake, **options: object) -> str | None:
    kernel = choose(meta, kernels, Options.parse(options, {})).kernel
    return kernel.name if kernel else None


def test_the_cheapest_kernel_that_may_serve_is_chosen() -> None:
    assert name_of(site(), DEAR, CHEAP) == "cheap"
    assert name_of(site(), DEAR, CHEAP, deny=["cheap"]) == "dear"
    assert name_of(site(), DEAR, CHEAP, allow=["dear"]) == "dear"
    assert name_of(site(), DEAR, CHEAP, deny=["cheap", "dear"]) is None


def test_no_kernel_serves_what_it_does_not_read_or_refuses() -> None:
    choice = choose(site(softcap=3.0), [CHEAP, Fake("picky", reason="too long")], Options())
    assert choice.kernel is None
    assert "cheap: does not honour softcap" in choice.reason
    assert "too long" in choose(site(), [Fake("picky", reason="too long")], Options()).reason
    assert name_of(site(), Fake("other", family="linear")) is None


def test_the_reference_never_serves_by_itself() -> None:
    reference = Fake("reference", 0.0)
    assert name_of(site(), reference) is None
    assert name_of(site(), reference, DEAR) == "dear"
    assert name_of(site(), reference, DEAR, allow=["reference"]) == "reference"


def test_an_approximation_happens_only_when_it_is_named() -> None:
    decode = site(sq=1)
    assert name_of(decode, SPARQ, DEAR) == "dear"
    choice = choose(decode, [SPARQ, DEAR], Options(softmax="sparq", rank=2, topk=4, local=1))
    assert (choice.kernel, choice.exact, choice.spec.sparse) == (SPARQ, False, Sparse(2, 4, 1))
    several = choose(site(sq=8), [SPARQ, DEAR], Options(softmax="sparq"))
    assert (several.kernel, several.exact, several.spec.sparse) == (DEAR, True, None)
    assert "several queries" in several.reason


def test_a_site_is_streamed_where_it_could_be_read_so() -> None:
    cut = site(Causal() & (First(2) | Window(3)), stream=Stream(2, 3))
    choice = choose(replace(site(Causal()), streamed=cut), [STREAMING], Options(softmax="streaming"))
    assert (choice.kernel, choice.exact, choice.spec) == (STREAMING, False, cut.spec)
    unasked = choose(replace(site(Causal()), streamed=cut), [STREAMING], Options())
    assert (unasked.exact, unasked.spec) == (True, site(Causal()).spec)


def test_a_site_that_cannot_be_streamed_stays_exact_and_says_why() -> None:
    known = replace(site(FULL), streamed="its mask is not plainly causal (full)")
    choice = choose(known, [STREAMING], Options(softmax="streaming"))
    assert (choice.spec.mask, choice.exact) == (FULL, True)
    assert choice.reason == "its mask is not plainly causal (full)"


def test_where_no_kernel_serves_the_approximation_the_exact_one_does() -> None:
    choice = choose(site(sq=1), [DEAR], Options(softmax="sparq"))
    assert (choice.kernel, choice.exact, choice.spec.sparse) == (DEAR, True, None)
    assert "sparq cannot serve it" in choice.reason


def test_a_mask_is_assumed_to_be_causal_only_on_the_users_word_and_noted() -> None:
    unknown = site(Opaque("mask") & KeyPadding("padding"), empty_row=EmptyRow.NAN)
    assert choose(unknown, [CHEAP], Options()).spec == unknown.spec
    choice = choose(unknown, [CHEAP], Options(assume_causal=True))
    assert choice.spec.mask == Causal(BOTTOM_RIGHT) & KeyPadding("padding")
    assert not choice.exact
    assert "on your word" in choice.reason
    proven = choose(site(Causal()), [CHEAP], Options(assume_causal=True))
    assert (proven.exact, proven.reason) == (True, "")


def test_a_quarantined_kernel_does_not_serve_that_spec_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.policy._quarantined", set())
    failed, meta = Fake("failed once"), site(scale=0.125)
    assert name_of(meta, failed) == "failed once"
    quarantine(failed.name, meta.spec)
    assert is_quarantined(failed.name, meta.spec)
    assert "quarantined" in choose(meta, [failed], Options()).reason
    assert name_of(meta, failed, DEAR) == "dear"
    assert name_of(site(scale=0.25), failed) == "failed once"
