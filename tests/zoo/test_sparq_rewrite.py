"""options={"softmax": "sparq"}: decoding sites over each kind of cache, and what must not be taken for one."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import reports_after
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import attnopt
from attnopt import caches, ops
from attnopt.caches import Plan, SparqCache
from attnopt.report import SiteReport
from attnopt.spec import Sparse

CHOICES = {"rank": 2, "topk": 6, "local": 2}
OPTIONS = {"softmax": "sparq", "inner": "eager", **CHOICES}


def compiled(function: Any, **more: object) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="attnopt", fullgraph=True, options={**OPTIONS, **more})


def sites_of(run: Callable[[], object]) -> list[SiteReport]:
    earlier = attnopt.reports()
    run()
    return list(reports_after(earlier).attention)


# ---- steps written by hand over the buffers of a cache ----


def plan(keys: Any = "both", kv_heads: int = 2) -> Plan:
    return Plan(2, kv_heads, 64, 8, 8, torch.float32, keys=keys)


def filled(keys: Any = "both", kv_heads: int = 2) -> SparqCache:
    torch.manual_seed(0)
    cache = SparqCache(plan(keys, kv_heads))
    cache.reset(torch.tensor([0, 3], dtype=torch.int32))
    cache.append(torch.randn(2, kv_heads, 20, 8), torch.randn(2, kv_heads, 20, 8))
    return cache


def token(kv_heads: int = 2, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return 3 * torch.randn(2, heads, 1, 8), *(torch.randn(2, kv_heads, 1, 8) for _ in range(2))


def write(cache: SparqCache, k: Tensor, v: Tensor) -> None:
    ops.sparq_append(
        k, v, cache.k, cache.v,
        lengths=cache.lengths, k_t=cache.k_t, v_mean=cache.v_mean, starts=cache.starts,
    )  # fmt: skip


def visible(cache: SparqCache) -> Tensor:
    at = torch.arange(cache.capacity)
    return ((at >= cache.starts[:, None]) & (at <= cache.lengths[:, None]))[:, None, None]


def read(cache: SparqCache, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    k, v = cache.k if k is None else k, cache.v if v is None else v
    return scaled_dot_product_attention(q, k, v, attn_mask=visible(cache)[..., : k.shape[2]], enable_gqa=True)


def plainly(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    write(cache, k, v)
    return read(cache, q)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("keys", ["both", "one"])
@torch.no_grad()
def test_a_step_over_the_buffers_of_an_append_reads_what_is_in_step_with_them(
    keys: Any, kv_heads: int
) -> None:
    cache, other, (q, k, v) = filled(keys, kv_heads), filled(keys, kv_heads), token(kv_heads)
    step = compiled(plainly, inner="aot_eager")
    out: list[Tensor] = []
    (site,) = sites_of(lambda: out.append(step(cache, q, k, v)))
    beside = ("k_t", "v_mean") if keys == "both" else ("v_mean",)
    assert (site.verdict, site.kernel, site.exact) == ("rewritten", "sparq", False)
    assert f"sparq(r=2, k=6, l=2, {', '.join(beside)})" in site.spec
    torch.testing.assert_close(out[0], other.step(q, k, v, **CHOICES))
    torch.testing.assert_close(cache.k[:, :, 20:21], k)
    assert torch.equal(cache.v_mean, other.v_mean)
    exact = read(cache, q)
    error = float((out[0] - exact).norm() / exact.norm())
    assert site.approximation_error == pytest.approx(error, rel=1e-4)
    assert error > 1e-2


@torch.no_grad()
def test_with_every_position_chosen_it_is_the_step_as_it_was() -> None:
    cache, (q, k, v) = filled(), token()
    out = compiled(plainly, topk=64, rank=1)(cache, q, k, v)
    torch.testing.assert_close(out, read(cache, q))


@torch.no_grad()
def test_steps_compile_once_and_move_on() -> None:
    cache, other, (q, k, v) = filled(), filled(), token()

    def advancing(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = plainly(cache, q, k, v)
        cache.lengths.add_(1)
        return out

    step = compiled(advancing, inner="aot_eager")

    def run() -> None:
        for n in range(5):
            torch.testing.assert_close(step(cache, q + n, k - n, v), other.step(q + n, k - n, v, **CHOICES))

    assert len(sites_of(run)) == 1


@torch.no_grad()
def test_inductor_writes_into_the_buffers_and_copies_none() -> None:
    cache, other, (q, k, v) = filled(), filled(), token()
    step = compiled(plainly, inner="inductor")
    out, (code,) = run_and_get_code(step, cache, q, k, v)
    torch.testing.assert_close(out, other.step(q, k, v, **CHOICES))
    assert "attnopt.sparq_append" in code
    assert "attnopt.sparq_attention" in code
    made = re.findall(r"= empty_strided\w*\(\((.*?)\)", code)
    assert made == ["2, 64"]  # the mask


def twice_written(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Something else writes into the second layout."""
    write(cache, k, v)
    cache.k_t.mul_(2.0)
    return read(cache, q)


def written_by_hand(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Something else writes into the keys, before."""
    cache.k[:, :, 3] = k[:, :, 0]
    write(cache, k, v)
    return read(cache, q)


def changed_afterwards(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The keys are in step no more when they are read."""
    write(cache, k, v)
    cache.k.neg_()
    return read(cache, q)


def other_values(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to other values than the append wrote."""
    write(cache, k, v)
    return read(cache, q, v=cache.v + 1.0)


def first_half(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to a part of the buffers."""
    write(cache, k, v)
    return read(cache, q, cache.k[:, :, :32], cache.v[:, :, :32])


def two_layouts(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two appends into the same keys that do not agree on the layout beside them."""
    write(cache, k, v)
    ops.sparq_append(k, v, cache.k, cache.v, lengths=cache.lengths + 1, starts=cache.starts)
    return read(cache, q)


NEAR_MISSES = (
    twice_written, written_by_hand, changed_afterwards, other_values, first_half, two_layouts
)  # fmt: skip


@pytest.mark.parametrize("step", NEAR_MISSES, ids=lambda step: step.__name__)
@torch.no_grad()
def test_what_may_be_out_of_step_is_not_read(step: Callable[..., Tensor]) -> None:
    """With all positions chosen, so that whatever is rewritten must be exact."""
    cache, other, (q, k, v) = filled(), filled(), token()
    function, out = compiled(step, topk=64, allow=("sparq", "sdpa")), []
    (site,) = sites_of(lambda: out.append(function(cache, q, k, v)))
    assert "k_t" not in site.spec
    assert "v_mean" not in site.spec
    torch.testing.assert_close(out[0], step(other, q, k, v))


@torch.no_grad()
def test_what_is_read_before_the_append_is_no_decoding_over_it() -> None:
    def before(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = read(cache, q)
        write(cache, k, v)
        return out

    cache, other, (q, k, v) = filled(), filled(), token()
    function, out = compiled(before, topk=64, allow=("sparq", "sdpa")), []
    (site,) = sites_of(lambda: out.append(function(cache, q, k, v)))
    assert "k_t" not in site.spec
    torch.testing.assert_close(out[0], before(other, q, k, v))


def scaled_keys(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention to a multiple of the keys."""
    write(cache, k, v)
    return read(cache, q, cache.k * 0.5)


@torch.no_grad()
def test_a_factor_of_the_keys_belongs_to_the_scale() -> None:
    cache, other, (q, k, v) = filled(), filled(), token()
    function, out = compiled(scaled_keys), []
    (site,) = sites_of(lambda: out.append(function(cache, q, k, v)))
    assert "k_t" in site.spec
    torch.testing.assert_close(out[0], other.step(q, k, v, scale=0.5 * 8**-0.5, **CHOICES))


@pytest.mark.parametrize("softmax", ["exact", "sparq"])
@torch.no_grad()
def test_a_write_to_another_argument_than_the_first_is_seen(softmax: str) -> None:
    """The keys are written, as the values of an append, between the product that reads them and the output."""

    def late(cache: SparqCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ cache.k.mT, -1)
        ops.sparq_append(v, k, cache.k_t.mT.contiguous(), cache.k, lengths=cache.lengths)
        return weights @ cache.v

    cache, other, (q, k, v) = filled(kv_heads=4), filled(kv_heads=4), token(4)
    function = compiled(late, softmax=softmax, topk=64, allow=("sparq", "sdpa"))
    torch.testing.assert_close(function(cache, q, k, v), late(other, q, k, v))


# ---- other caches, and whether it pays ----


def growing(q: Tensor, old_k: Tensor, old_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        q, torch.cat([old_k, k], 2), torch.cat([old_v, v], 2), enable_gqa=True
    )


def static(q: Tensor, old_k: Tensor, old_v: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    old_k.index_copy_(2, at, k)
    old_v.index_copy_(2, at, v)
    return scaled_dot_product_attention(
        q, old_k, old_v, attn_mask=(torch.arange(old_k.shape[2]) <= at)[None], enable_gqa=True
    )


def held(length: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(2, kv_heads, length, 8), torch.randn(2, kv_heads, length, 8)


@pytest.mark.parametrize(
    ("step", "length", "kv_heads", "topk", "pays"),
    [
        (static, 256, 2, 6, True),  # shared keys: values are the half that is saved
        (static, 256, 2, 64, False),  # too many are chosen
        (static, 256, 4, 6, False),  # the mean takes all values
        (growing, 256, 2, 6, False),  # the copy costs more than attention
    ],
)
@torch.no_grad()
def test_over_an_ordinary_cache_a_step_is_rewritten_where_it_pays(
    step: Any, length: int, kv_heads: int, topk: int, *, pays: bool
) -> None:
    (q, k, v), at = token(kv_heads), torch.tensor([length - 1])
    last = () if step is growing else (at,)
    function, out = compiled(step, topk=topk), []
    (site,) = sites_of(lambda: out.append(function(q, *held(length, kv_heads), k, v, *last)))
    assert (site.kernel == "sparq") is pays
    assert site.exact is not pays
    if pays:
        assert "k_t" not in site.spec
        assert site.approximation_error > 0
        return
    assert "would not pay" in site.reason
    assert "attnopt.caches.sparq" in site.reason
    torch.testing.assert_close(out[0], step(q, *held(length, kv_heads), k, v, *last))
    forced = compiled(step, topk=topk, allow=("sparq",))
    (site,) = sites_of(lambda: forced(q, *held(length, kv_heads), k, v, *last))
    assert site.kernel == "sparq"


# ---- models of transformers ----


def a_model(kv_heads: int = 2, implementation: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(1)
    config = CONFIG_MAPPING["llama"](
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=256, attn_implementation=implementation,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return model


IDS = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_llama_decodes_over_its_cache_as_if_it_were_attached(implementation: str, kv_heads: int) -> None:
    model = a_model(kv_heads, implementation)
    with caches.sparq(model, capacity=64, **CHOICES) as attached:
        detached = attached.fresh()
        wanted = [model(IDS[:, :20], past_key_values=attached).logits[:, -1]]
        wanted += [model(IDS[:, n : n + 1], past_key_values=attached).logits[:, -1] for n in range(20, 26)]
    step, found = compiled(model), []

    def run() -> None:
        found.append(model(IDS[:, :20], past_key_values=detached).logits[:, -1])
        found.extend(step(IDS[:, n : n + 1], past_key_values=detached).logits[:, -1] for n in range(20, 26))

    sites = sites_of(run)
    assert [(s.verdict, s.kernel, "k_t, v_mean" in s.spec) for s in sites] == [
        ("rewritten", "sparq", True)
    ] * 2
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_its_prompt_stays_exact() -> None:
    model = a_model()
    with caches.sparq(model, capacity=64) as cache:
        pass
    wanted, out = model(IDS).logits, []
    sites = sites_of(lambda: out.append(compiled(model)(IDS, past_key_values=cache).logits))
    assert [s.exact for s in sites] == [True, True]
    torch.testing.assert_close(out[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "exact"), [("static", False), ("dynamic", True)])
@torch.no_grad()
def test_over_caches_of_transformers_the_rule_decides(kind: str, *, exact: bool) -> None:
    model = a_model()
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=256)
    )
    model(IDS[:, :20], past_key_values=cache)
    sites = sites_of(lambda: compiled(model)(IDS[:, 20:21], past_key_values=cache))
    assert [s.exact for s in sites] == [exact] * 2
    assert all(("would not pay" in s.reason) is exact for s in sites)


def test_the_spec_names_what_a_cache_keeps() -> None:
    from attnopt.spec import AttentionSpec

    spec = AttentionSpec("softmax", sparse=Sparse(4, 8, 2, ("k_t", "v_mean")))
    assert spec.operand_names() == ("q", "k", "v", "k_t", "v_mean")
    assert "sparq(r=4, k=8, l=2, k_t, v_mean)" in str(spec)
    assert attnopt.ops.sparq_step
