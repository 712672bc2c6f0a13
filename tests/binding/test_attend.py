"""ksort_attend against float64, within the bound that native_support.attend_bound derives, at every kernel level."""

import numpy as np
import pytest
from native_support import (
    BFP_TYPES,
    EXP_ERROR,
    FLOAT_TYPES,
    SCALE_BYTES,
    UNIT,
    Shape,
    assert_close,
    attend_bound,
    drawn,
    new_cache,
    random_problem,
    random_shapes,
    rope_for,
    rotated,
)

from ksort_gguf import reference
from ksort_gguf.binding import cpu
from ksort_gguf.errors import KsortError
from ksort_gguf.reference_blocks import SCALED_TYPES

SCORES = [(k_type, query_type) for k_type in BFP_TYPES + FLOAT_TYPES for query_type in ("f32", "bfp16")]


@drawn(60, shape=random_shapes(60), scores=SCORES)
def test_attend_within_bound(level, rng, shape, scores):
    """Catches any wrong score, mask, head group, merge or value; unwritten slots hold NaN, which must not leak."""
    k_type, query_type = scores
    k_cache, v_cache, q, rope, used = random_problem(rng, shape, k_type, query_type)
    scale = shape.head_dim**-0.5
    out = cpu.attend(
        k_cache, v_cache, q, shape.first_slot,
        scale=scale, window=shape.window, query_type=query_type, nth=shape.nth, **rope,
    )  # fmt: skip
    assert_close(out, *used, shape.first_slot, scale, shape.window, shape.v_type)


@drawn(6, head_dim=[2, 4, 6, 8, 12, 14], n_queries=[1, 30])
def test_tiny_heads(level, rng, head_dim, n_queries):
    """Catches vector loops that assume at least one whole register of channels; no block size fits, so floats only."""
    shape = Shape(head_dim, 16, 4, 2, 50, n_queries, 0, 2, "f16", 2)
    k_cache, v_cache, q, rope, used = random_problem(rng, shape, "bf16", "f32")
    out = cpu.attend(k_cache, v_cache, q, 50, scale=0.7, query_type="f32", nth=2, **rope)
    assert_close(out, *used, 50, 0.7, 0)


@drawn(12, scores=SCORES[: 2 * len(BFP_TYPES)], n_queries=[1, 19])
def test_any_stored_bytes(level, rng, scores, n_queries):
    """Catches kernels that only read our encoder's bytes: mantissa -2^(m-1), E = 0 or padding with mantissas set."""
    k_type, query_type = scores
    head_dim, block_size, n_slots = 90, 32, 128
    k_cache, tiles = new_cache(k_type, head_dim, block_size, 1, n_slots)
    tiles[:] = rng.integers(0, 256, tiles.shape)
    tiles[..., -64 * 3 :] = rng.choice(SCALE_BYTES[k_type], (2, 1, 64 * 3))
    v_cache, _ = new_cache("f32", head_dim, block_size, 1, n_slots)
    v_cache.pack(rng.standard_normal((n_slots, 1, head_dim)).astype(np.float32), 0)
    q = rng.standard_normal((n_queries, 2, head_dim)).astype(np.float32)
    q_used = reference.round_blocks(q, "bfp16", block_size) if query_type == "bfp16" else q
    out = cpu.attend(k_cache, v_cache, q, n_slots - n_queries, scale=0.1, query_type=query_type, nth=2)
    assert_close(out, k_cache.unpack(0, n_slots), v_cache.unpack(0, n_slots), q_used, n_slots - n_queries, 0.1, 0)


@pytest.mark.parametrize("k_type", ["bfp12", "sbfp12", "f16"])
@pytest.mark.parametrize("n_queries", [1, 3])
def test_splits_agree(level, rng, k_type, n_queries):
    """Catches a merge of splits that loses one, weighs one wrongly, or a part that has no work and leaves garbage."""
    shape = Shape(64, 32, 3, 1, 1000, n_queries, 0, 64, "f16", 1)
    k_cache, v_cache, q, rope, used = random_problem(rng, shape, k_type, "bfp16")
    bound = attend_bound(*used, 1000, 0.125)
    whole = cpu.attend(k_cache, v_cache, q, 1000, scale=0.125, **rope)
    for nth in (2, 3, 5, 8, 64):
        out = cpu.attend(k_cache, v_cache, q, 1000, scale=0.125, nth=nth, **rope)
        assert (np.abs(out - whole) <= 2 * bound).all()


@pytest.mark.parametrize("group", [1, 4])
def test_weights_are_exp(level, rng, group):
    """Catches an exp whose error is more than attend_bound counts with, such as a wrong entry of a table: among many
    slots it would not show. Every KV head has a score of 0 and one of -x: out = exp(-x) / (1 + exp(-x))."""
    n_kv_heads = 4096
    x = np.concatenate([np.linspace(0, 86.9, n_kv_heads // 2), rng.uniform(0, 2, n_kv_heads // 2)]).astype(np.float32)
    k, v = np.zeros((2, 2, n_kv_heads, 2), dtype=np.float32)
    k[1, :, 0], v[1] = -x, 1.0
    (k_cache, _), (v_cache, _) = (new_cache("f32", 2, 16, n_kv_heads, 2) for _ in range(2))
    k_cache.pack(k, 0)
    v_cache.pack(v, 0)
    q = np.tile(np.float32([1, 0]), (1, n_kv_heads * group, 1))
    out = cpu.attend(k_cache, v_cache, q, 1, scale=1.0, query_type="f32")
    weight = np.repeat(np.exp(-x.astype(float)), group)[None, :, None]
    expected = weight / (1 + weight)
    roundings = np.where(weight > UNIT, 3, 0)  # of the sum, its inverse and the product; else the sum is 1
    assert (np.abs(out - expected) <= (EXP_ERROR + roundings * UNIT) * expected).all()


def test_folding_changes_nothing(level, rng):
    """Catches folded tables that turn the wrong pair: one order for q, k and RoPE leaves attention as it was."""
    head_dim, n_kv_heads, n_heads, n_tokens, first_slot, scale = 64, 2, 6, 100, 90, 0.125
    k, v = rng.standard_normal((2, n_tokens, n_kv_heads, head_dim)).astype(np.float32)
    q = rng.standard_normal((n_tokens - first_slot, n_heads, head_dim)).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, (n_tokens, 24))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    v_cache, _ = new_cache("f32", head_dim, 32, n_kv_heads, n_tokens)
    v_cache.pack(v, 0)

    def attended(order, tables):
        k_cache, _ = new_cache("f32", head_dim, 32, n_kv_heads, n_tokens)
        k_cache.pack(np.take_along_axis(k, order[None], axis=2), 0, tables, cos, sin)
        folded_q = np.take_along_axis(q, np.repeat(order, n_heads // n_kv_heads, axis=0)[None], axis=2)
        positions = {"cos": cos[first_slot:], "sin": sin[first_slot:]}
        return cpu.attend(
            k_cache, v_cache, folded_q, first_slot, scale=scale, rope=tables, query_type="f32", **positions
        )

    (order, rope), (folded_order, folded_rope) = (
        rope_for(rng, n_kv_heads, head_dim, 48, "interleaved", 1, folded) for folded in (False, True)
    )
    stock = rope["rope"]
    difference = np.abs(attended(order, stock) - attended(folded_order, folded_rope["rope"]))
    turned_q = rotated(q, stock, cos[first_slot:], sin[first_slot:])
    assert (difference <= 2 * attend_bound(rotated(k, stock, cos, sin), v, turned_q, first_slot, scale)).all()


@drawn(16, scores=SCORES, bad=[np.nan, np.inf, -np.inf])
def test_non_finite_queries_are_refused(level, rng, scores, bad):
    """Catches NaN in a query, in any channel, that becomes a plausible answer."""
    k_type, query_type = scores
    shape = Shape(18, 16, 2, 1, 70, 2, 0, 18, "f16", 1)
    k_cache, v_cache, q, rope, _ = random_problem(rng, shape, k_type, query_type)
    for place in np.ndindex(q.shape):
        damaged = q.copy()
        damaged[place] = bad
        with pytest.raises(KsortError, match="NaN or infinity"):
            cpu.attend(k_cache, v_cache, damaged, 70, scale=0.2, query_type=query_type, nth=2, **rope)


@drawn(20, scores=[scores for scores in SCORES if scores[0] != "f16"], n_queries=[1, 17], n_large=[64, 1])
def test_overflowing_scores_are_an_error(level, scores, n_queries, n_large):
    """Catches finite keys and queries whose scores overflow, and NaN answers out of infinity minus infinity.

    A single score of minus infinity is no NaN: it would drop its token without a word.
    """
    k_type, query_type = scores
    k_cache, _ = new_cache(k_type, 32, 32, 1, 64)
    v_cache, _ = new_cache("f32", 32, 32, 1, 64)
    k = np.ones((64, 1, 32), np.float32)
    k_large, q_large = (1e5, 1e35) if k_type in SCALED_TYPES else (1e30, 1e30)
    k[:n_large] = k_large
    k_cache.pack(k, 0)
    v_cache.pack(np.ones((64, 1, 32), np.float32), 0)
    for sign in (1, -1):
        q = np.full((n_queries, 1, 32), sign * q_large, np.float32)
        with pytest.raises(KsortError, match="NaN or infinity"):
            cpu.attend(k_cache, v_cache, q, 64 - n_queries, scale=1.0, query_type=query_type)


@drawn(10, v_type=["f32", "bf16", "bfp16", "bfp14", "bfp12"], n_queries=[1, 17], nth=[1, 2])
def test_overflowing_sums_are_an_error(level, v_type, n_queries, nth):
    """Catches infinity as an answer: the weighted sum of the largest values overflows although their mean would not."""
    k_cache, _ = new_cache("bfp12", 32, 32, 1, 128)
    v_cache, _ = new_cache(v_type, 32, 32, 1, 128)
    k_cache.pack(np.ones((128, 1, 32), np.float32), 0)
    v_cache.pack(np.full((128, 1, 32), 3e38, np.float32), 0)
    q = np.ones((n_queries, 1, 32), np.float32)
    with pytest.raises(KsortError, match="NaN or infinity"):
        cpu.attend(k_cache, v_cache, q, 128 - n_queries, scale=1.0, nth=nth)


@pytest.mark.parametrize("k_type", ["bfp12", "f32"])
@pytest.mark.parametrize("n_queries", [1, 17])
def test_large_scores(level, rng, k_type, n_queries):
    """Catches a softmax without its maximum taken off, or one that drops the largest score when it comes late."""
    shape = Shape(64, 32, 8, 1, 200, n_queries, 0, 64, "f32", 3)
    k_cache, v_cache, q, rope, used = random_problem(rng, shape, k_type, "bfp16")
    out = cpu.attend(k_cache, v_cache, q, 200, scale=200.0, nth=3, **rope)
    k, v, q_used = used
    scores = 200.0 * np.einsum("tc,nhc->nht", k[:, 0].astype(float), q_used.astype(float))
    clear = 0
    for i, g in np.ndindex(n_queries, 8):
        seen = scores[i, g, : 201 + i]
        best, second = np.sort(seen)[[-1, -2]]
        if best - second > 40:  # the others weigh less than 217 * e^-40 together
            np.testing.assert_allclose(out[i, g], v[seen.argmax(), 0], rtol=1e-6)
            clear += 1
    assert clear >= 4 * n_queries


@drawn(20, scores=[scores for scores in SCORES if scores[0] != "f16"], power=[-100, -30, 30, 100])
def test_extreme_magnitudes(level, rng, scores, power):
    """Catches block factors that overflow or vanish before they meet: tiny keys times huge queries are plain scores."""
    k_type, query_type = scores
    head_dim, n_tokens, n_queries = 80, 70, 3
    power = power // 10 if k_type in SCALED_TYPES else power  # within what scales reach
    k = np.ldexp(rng.standard_normal((n_tokens, 1, head_dim)), power).astype(np.float32)
    q = np.ldexp(rng.standard_normal((n_queries, 2, head_dim)), -power).astype(np.float32)
    k_cache, _ = new_cache(k_type, head_dim, 32, 1, n_tokens)
    v_cache, _ = new_cache("f32", head_dim, 32, 1, n_tokens)
    k_cache.pack(k, 0)
    v_cache.pack(k * np.float32(2.0**-power), 0)
    out = cpu.attend(k_cache, v_cache, q, n_tokens - n_queries, scale=0.1, query_type=query_type)
    q_used = reference.round_blocks(q, "bfp16", 32) if query_type == "bfp16" else q
    used = k_cache.unpack(0, n_tokens), v_cache.unpack(0, n_tokens), q_used
    assert_close(out, *used, n_tokens - n_queries, 0.1, 0)


@pytest.mark.parametrize(
    ("k_type", "v_type"),
    [("bfp12", "f16"), ("bfp16", "bfp12"), ("f16", "bfp14"), ("sbfp12", "sbfp11"), ("sbfp11", "sbfp12")],
)
def test_prompt_and_single_queries_agree(level, rng, k_type, v_type):
    """Catches the many-row path and the one-row path computing different attention."""
    shape = Shape(64, 32, 6, 2, 60, 40, 0, 64, v_type, 2)
    k_cache, v_cache, q, rope, used = random_problem(rng, shape, k_type, "bfp16")
    together = cpu.attend(k_cache, v_cache, q, 60, scale=0.125, **rope)
    bound = attend_bound(*used, 60, 0.125)
    for i in range(40):
        position = {part: rope[part][i : i + 1] for part in ("cos", "sin")}
        alone = cpu.attend(k_cache, v_cache, q[i : i + 1], 60 + i, scale=0.125, rope=rope["rope"], **position)
        assert (np.abs(alone[0] - together[i]) <= 2 * bound[i]).all()
