"""PackedCache, the public cache of one layer, against the slow reference in float64."""

from pathlib import Path

import numpy as np
import pytest
from drawn_support import draw
from tiny_support import write_tiny_gguf

from ksort_gguf import CacheTypeError, ContextError, KsortError, KVPlan, PackedCache, PlanError, make_plan, reference
from ksort_gguf.names import CACHE_TYPES, K_TYPES, V_TYPES
from ksort_gguf.reference_blocks import decode_blocks, encode_transformed

N_HEADS, N_KV_HEADS, HEAD_DIM = 6, 2, 32
HEADS = {"n_kv_heads": N_KV_HEADS, "head_dim": HEAD_DIM}
PLANS = (None, "ksort", "balanced", "ksort,balanced", "rotate,scale")
CASES = draw(20, K_TYPES, V_TYPES, PLANS, (0, 7), (16, 32), (None, "f32", "bfp16"), (1, 3, 70))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def plans(tiny) -> dict[str | None, KVPlan | None]:
    return {name: None if name is None else make_plan(tiny, plan=name, block_size=16) for name in PLANS}


def heads(rng, n: int, n_heads: int) -> np.ndarray:
    """float32 [n, n_heads, HEAD_DIM] with an outlier channel in each head."""
    x = rng.standard_normal((n, n_heads, HEAD_DIM)).astype(np.float32)
    x[..., 5] *= 20
    return x


def stored(x: np.ndarray, type_name: str, block_size: int, transform) -> np.ndarray:
    """What is read back of keys or values, in the transformed space."""
    if transform is None or not CACHE_TYPES[type_name].is_bfp:
        return reference.round_blocks(x, type_name, block_size)
    encoded = encode_transformed(reference.transform_keys(x, transform), type_name, block_size, transform.feedback)
    return decode_blocks(*encoded, type_name, block_size)


def expected(k, v, q, k_type, v_type, block_size, query_type, window, plan) -> np.ndarray:
    """Attention of layer 1 in float64, float32 inside the transforms."""
    is_bfp = CACHE_TYPES[k_type].is_bfp
    k_transform = plan.keys.layer(1) if plan and is_bfp else None
    v_transform = plan.values.layer(1) if plan and CACHE_TYPES[v_type].is_bfp else None
    if plan and plan.order is not None and is_bfp:
        k = reference.reorder(k, plan.order[1])
        q = reference.reorder(q, np.repeat(plan.order[1], N_HEADS // N_KV_HEADS, axis=0))
    q = q if k_transform is None else reference.transform_queries(q, k_transform)
    q = reference.round_blocks(q, query_type or ("bfp16" if is_bfp else "f32"), block_size)
    k, v = stored(k, k_type, block_size, k_transform), stored(v, v_type, block_size, v_transform)
    out = reference.attend(k, v, q, len(k) - len(q), HEAD_DIM**-0.5, window).astype(np.float32)
    return out if v_transform is None else reference.restore_values(out, v_transform)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_attention_equals_the_reference(rng, plans, case):
    """Catches an order that queries do not get, another layer's tables, values' tables given to keys, transforms of
    float types, and tokens of several calls that are stored in the wrong slots."""
    k_type, v_type, plan_name, window, block_size, query_type, n_queries = case
    plan = plans[plan_name]
    k, v, q = heads(rng, 150, N_KV_HEADS), heads(rng, 150, N_KV_HEADS), heads(rng, n_queries, N_HEADS)
    cache = PackedCache(
        **HEADS, n_ctx=200, cache_type_k=k_type, cache_type_v=v_type, block_size=block_size, query_type=query_type,
        plan=plan, layer=1, exact_tail=0, exact_sinks=0,
    )  # fmt: skip
    for start, stop in ((0, 61), (61, 62), (62, 150)):
        cache.append(k[start:stop], v[start:stop])
    out = cache.attend(q, window=window)
    assert out.dtype == np.float32 and out.shape == q.shape
    correct = expected(k, v, q, k_type, v_type, block_size, query_type, window, plan)
    np.testing.assert_allclose(out, correct, rtol=0, atol=2e-4 * np.abs(correct).max())


def test_truncated_tokens_are_forgotten_and_bytes_counted(rng):
    """Catches slots behind the end that are seen, and bytes that do not follow."""
    k, v, q = heads(rng, 100, N_KV_HEADS), heads(rng, 100, N_KV_HEADS), heads(rng, 10, N_HEADS)
    cache, fresh = PackedCache(**HEADS, n_ctx=100), PackedCache(**HEADS, n_ctx=100)
    cache.append(k, v)
    assert cache.n_bytes == 2 * 128 * N_KV_HEADS * HEAD_DIM * (4.25 / 8 + 2) + 2 * 64 * N_KV_HEADS * HEAD_DIM * 2
    cache.truncate(40)
    assert cache.n_tokens == 40 and cache.n_bytes == 64 * N_KV_HEADS * HEAD_DIM * (4.25 / 4 + 2 * 2 * 2)
    fresh.append(k[:40], v[:40])
    for each in (cache, fresh):
        each.append(k[90:], v[90:])
    assert np.array_equal(cache.attend(q), fresh.attend(q))
    for n_tokens in (-1, 51):
        with pytest.raises(ValueError, match="cannot keep"):
            cache.truncate(n_tokens)


@pytest.mark.parametrize(
    ("keys", "kind", "field"),
    [
        ({"cache_type_k": "q4_0"}, CacheTypeError, "cache_type_k"),
        ({"cache_type_v": "bfp13"}, CacheTypeError, "cache_type_v"),
        ({"query_type": "f16"}, CacheTypeError, "query_type"),
        ({"n_kv_heads": 0}, KsortError, "n_kv_heads"),
        ({"head_dim": 33}, CacheTypeError, "head_dim"),
        ({"head_dim": 258}, CacheTypeError, "head_dim"),
        ({"n_ctx": 0}, ContextError, "n_ctx"),
        ({"block_size": 64}, CacheTypeError, "block_size"),
        ({"exact_tail": -1}, CacheTypeError, "exact_tail"),
        ({"exact_tail": 1 << 21}, CacheTypeError, "exact_tail"),
        ({"exact_sinks": 1025}, CacheTypeError, "exact_sinks"),
        ({"exact_sinks": 1, "cache_type_k": "f16", "cache_type_v": "bf16"}, CacheTypeError, "exact_sinks"),
        ({"layer": 2, "plan": "ksort"}, PlanError, "layer"),
        ({"layer": -1}, PlanError, "layer"),
        ({"n_kv_heads": 4}, PlanError, "plan"),
        ({"head_dim": 64}, PlanError, "plan"),
    ],
)
def test_what_does_not_fit_is_blamed(plans, keys, kind, field):
    """Catches memory read with another shape than it has, and a plan of another model."""
    names = [keys["plan"]] if "plan" in keys else ["ksort,balanced", "balanced"]
    for name in names:
        with pytest.raises(kind) as caught:
            PackedCache(**{**HEADS, "n_ctx": 10, **keys, "plan": plans[name]})
        assert caught.value.field == field


def test_tokens_that_do_not_fit_leave_the_cache_as_it_was(rng):
    """Catches half of a step stored: keys without values, or a count without either."""
    k, v, q = heads(rng, 20, N_KV_HEADS), heads(rng, 20, N_KV_HEADS), heads(rng, 3, N_HEADS)
    cache = PackedCache(**HEADS, n_ctx=25)
    cache.append(k, v)
    before = cache.attend(q)
    nan = np.where(np.arange(HEAD_DIM) == 3, np.float32("nan"), k[:2])
    with pytest.raises(ContextError, match="26 tokens do not fit the context of 25"):
        cache.append(k[:6], v[:6])
    for bad in ((nan, v[:2]), (k[:2], nan)):
        with pytest.raises(KsortError, match="NaN or infinity"):
            cache.append(*bad)
    with pytest.raises(KsortError, match="NaN or infinity"):
        cache.attend(np.full_like(q, np.inf))
    for bad in ((k[:2], v[:1]), (k[:2, :1], v[:2]), (k[:2, :, :16], v[:2])):
        with pytest.raises(ValueError):
            cache.append(*bad)
    for bad in (q[:, :5], q[:0], np.repeat(q, 7, axis=0), q[..., :16]):
        with pytest.raises(ValueError):
            cache.attend(bad)
    assert cache.n_tokens == 20 and np.array_equal(cache.attend(q), before)
