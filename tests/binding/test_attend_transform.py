"""Attention over keys and values that were packed with a plan's transforms, at every kernel level."""

import dataclasses

import numpy as np
import pytest
from native_support import (
    RUN_TIME_STEPS,
    SHARE,
    UNIT,
    assert_close,
    attend_bound,
    drawn,
    new_cache,
    random_transform,
    rope_for,
    rotated,
)

from ksort_gguf import reference
from ksort_gguf.binding import cpu
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import LayerStep, Pool
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import Transform

SHAPES = [  # head_dim, block_size, n_heads, n_kv_heads, first_slot, n_queries, nth
    (64, 32, 9, 3, 199, 1, 2),
    (128, 32, 4, 1, 90, 37, 3),
    (80, 64, 6, 2, 70, 3, 2),
    (90, 16, 2, 2, 0, 70, 1),
    (18, 16, 3, 1, 20, 5, 2),
]


class Problem:
    """Caches packed with transforms, raw q, and what attention must have used: all as float arrays."""

    def __init__(self, rng, shape, k_type, v_type, query_type, k_steps, v_steps):
        head_dim, block_size, n_heads, n_kv_heads, self.first_slot, n_queries, self.nth = shape
        n_tokens = self.first_slot + n_queries
        self.k_cache, _ = new_cache(k_type, head_dim, block_size, n_kv_heads, n_tokens, fill=0xFF)
        self.v_cache, _ = new_cache(v_type, head_dim, 16, n_kv_heads, n_tokens, fill=0xFF)
        self.k_transform = None if k_steps is None else random_transform(rng, n_kv_heads, head_dim, k_steps)
        self.v_transform = None if v_steps is None else random_transform(rng, n_kv_heads, head_dim, v_steps)
        self.raw_k, self.raw_v = rng.standard_normal((2, n_tokens, n_kv_heads, head_dim)).astype(np.float32)
        self.q = rng.standard_normal((n_queries, n_heads, head_dim)).astype(np.float32)
        _, rope = rope_for(rng, n_kv_heads, head_dim, head_dim // 4 * 2, "half", n_tokens)
        self.k_cache.pack(self.raw_k, 0, **rope, transform=self.k_transform)
        self.v_cache.pack(self.raw_v, 0, transform=self.v_transform)
        self.query_rope = {"rope": rope["rope"], **{part: rope[part][self.first_slot :] for part in ("cos", "sin")}}
        self.query_type, self.scale = query_type, head_dim**-0.5
        self.rotated_k, q_used = rotated(self.raw_k, **rope), rotated(self.q, **self.query_rope)
        self.rotated_q = q_used
        if self.k_transform:
            q_used = reference.transform_queries(q_used, self.k_transform)
        if query_type == "bfp16":
            q_used = reference.round_blocks(q_used, "bfp16", block_size)
        self.used = self.k_cache.unpack(0, n_tokens), self.v_cache.unpack(0, n_tokens), q_used

    def attend(self) -> np.ndarray:
        return cpu.attend(
            self.k_cache, self.v_cache, self.q, self.first_slot, scale=self.scale, query_type=self.query_type,
            nth=self.nth, k_transform=self.k_transform, v_transform=self.v_transform, **self.query_rope,
        )  # fmt: skip


STEPS = [("shift",), ("scale",), ("rotate",), ("permutation",), RUN_TIME_STEPS]


@drawn(15, shape=SHAPES, k_type=["bfp12", "sbfp12", "sbfp11"], query_type=["f32", "bfp16"], steps=STEPS)
def test_queries_meet_transformed_keys(level, rng, shape, k_type, query_type, steps):
    """Catches queries multiplied by the scale, rotated before RoPE, or rounded before the transform."""
    problem = Problem(rng, shape, k_type, "f16", query_type, steps, None)
    assert_close(problem.attend(), *problem.used, problem.first_slot, problem.scale, 0)


@drawn(15, shape=SHAPES, v_type=["bfp14", "sbfp11"], steps=STEPS)
def test_values_are_restored(level, rng, shape, v_type, steps):
    """Catches output rows restored twice, not at all (as after a merge), in another order or with another head's table.

    Restoring spreads the bound of the transformed output over a head: |W e| <= sqrt(d) max|e|, then / scale. Its own
    arithmetic adds (log2(d) + 4) roundings of what it works on.
    """
    problem = Problem(rng, shape, "bfp12", v_type, "bfp16", RUN_TIME_STEPS, steps)
    out, transform, head_dim = problem.attend(), problem.v_transform, shape[0]
    transformed = reference.attend(*problem.used, problem.first_slot, problem.scale)
    expected = reference.restore_values(transformed, transform)  # float32 in rotate: within its own roundings
    error_in = SHARE * attend_bound(*problem.used, problem.first_slot, problem.scale)
    error_in = error_in + 2 * (np.log2(head_dim) + 4) * UNIT * np.abs(transformed).max()
    group = shape[2] // shape[3]
    scale = 1 if transform.scale is None else np.repeat(transform.scale, group, axis=0)
    shift = 0 if transform.shift is None else np.abs(np.repeat(transform.shift, group, axis=0))
    bound = error_in * (np.sqrt(head_dim) if transform.rotate else 1) / scale + 2 * UNIT * (np.abs(expected) + shift)
    assert (np.abs(out - expected) <= bound).all()


# One register and less, several segments of rotating, a rest of 2 to 14 channels, the common heads, the largest.
HEAD_DIMS = (16, 18, 20, 24, 30, 40, 64, 80, 90, 96, 128, 160, 192, 250, 256)


@drawn(30, head_dim=HEAD_DIMS, steps=STEPS[1:], query_type=["f32", "bfp16"])
def test_queries_are_transformed_to_the_bit(level, rng, head_dim, steps, query_type):
    """Catches a kernel whose queries differ in a last bit: a reciprocal, a fused product, another order of strides.

    Large scores show it: then the softmax is far from what the oracle's queries make of the same keys.
    """
    transform = random_transform(rng, 2, head_dim, steps)
    cache, _ = new_cache("bfp12", head_dim, 16, 2, 64)
    cache.pack(rng.standard_normal((64, 2, head_dim)).astype(np.float32), 0)
    q = rng.standard_normal((5, 6, head_dim)).astype(np.float32)
    arguments = {"scale": 2.0, "query_type": query_type}
    out = cpu.attend(cache, cache, q, 59, k_transform=transform, **arguments)
    expected = cpu.attend(cache, cache, reference.transform_queries(q, transform), 59, **arguments)
    assert out.tobytes() == expected.tobytes()


@drawn(30, head_dim=HEAD_DIMS, steps=STEPS)
def test_values_are_restored_to_the_bit(level, rng, head_dim, steps):
    """Catches a kernel that restores with a reciprocal, fused, in another order, or permutes forwards.

    A query that sees one slot returns the value as decoded, so that restoring is all there is to see.
    """
    transform = random_transform(rng, 2, head_dim, steps)
    cache, _ = new_cache("bfp16", head_dim, 16, 2, 64)
    cache.pack(rng.standard_normal((64, 2, head_dim)).astype(np.float32), 0)
    q = rng.standard_normal((64, 6, head_dim)).astype(np.float32)
    out = cpu.attend(cache, cache, q, 0, scale=1.0, window=1, v_transform=transform)
    values = np.repeat(cache.unpack(0, 64), 3, axis=1)
    assert (out == reference.restore_values(values, transform)).all()


@pytest.mark.parametrize("n_queries", [1, 30])
def test_transforms_change_nothing_but_rounding(level, rng, n_queries):
    """Catches a mistake that oracle and library share: BFP16 with transforms is near attention over what was packed.

    Without feedback, whose random weights here would only add noise.
    """
    shape = (64, 32, 6, 2, 100, n_queries, 2)
    problem = Problem(rng, shape, "bfp16", "bfp16", "bfp16", RUN_TIME_STEPS[:4], RUN_TIME_STEPS[:4])
    exact = reference.attend(problem.rotated_k, problem.raw_v, problem.rotated_q, 100, problem.scale)
    assert np.abs(problem.attend() - exact).max() <= 0.2 * np.abs(exact).max()
    problem.v_transform = dataclasses.replace(problem.v_transform, shift=None)
    assert np.abs(problem.attend() - exact).max() > 0.5 * np.abs(exact).max()


@pytest.mark.parametrize("n_queries", [1, 20])
def test_overflow_on_the_way_is_an_error(level, rng, n_queries):
    """Catches infinite queries or outputs passed on: a tiny scale of keys or values, divided by, exceeds float32."""
    tiny = Transform(scale=np.full((1, 16), 1e-38, np.float32))
    cache, _ = new_cache("bfp12", 16, 16, 1, 64)
    cache.pack(np.ones((n_queries, 1, 16), np.float32), 0)
    q = np.full((n_queries, 2, 16), 10.0, np.float32)
    for transforms in ({"k_transform": tiny}, {"v_transform": Transform(scale=tiny.scale / 10)}):
        for query_type in ("f32", "bfp16"):
            with pytest.raises(KsortError, match="NaN or infinity"):
                cpu.attend(cache, cache, q, 0, scale=0.25, query_type=query_type, nth=2, **transforms)


def float64_copy(transform: Transform) -> Transform:
    """The same values in float64, which must be copied on the way and so belong to nobody but the callee."""
    tables = {name: table.astype(np.float64) for name, table in transform.tables().items()}
    return Transform(rotate=transform.rotate, **tables)


def test_layer_step_equals_plain_calls(level, rng):
    """Catches a LayerStep that drops a transform, or arrays that Python frees while C still points to them."""
    n_heads, n_kv_heads, head_dim, n_tokens = 6, 2, 64, 50
    shape = (head_dim, 32, n_heads, n_kv_heads, 0, n_tokens, 2)
    problem = Problem(rng, shape, "bfp12", "bfp12", "bfp16", RUN_TIME_STEPS, RUN_TIME_STEPS)
    expected = problem.attend()
    qkv = np.concatenate([problem.q, problem.raw_k, problem.raw_v], axis=1).reshape(n_tokens, -1)
    cos, sin = (FloatRows(problem.query_rope[part]) for part in ("cos", "sin"))
    k_cache, _ = new_cache("bfp12", head_dim, 32, n_kv_heads, n_tokens)
    v_cache, _ = new_cache("bfp12", head_dim, 16, n_kv_heads, n_tokens)
    out = np.empty((n_tokens, n_heads * head_dim), np.float32)
    with Pool(2) as pool:
        step = LayerStep(
            pool, k_cache, v_cache, n_heads=n_heads, scale=problem.scale, window=0, query_type="bfp16",
            rope=problem.query_rope["rope"],
            k_transform=float64_copy(problem.k_transform), v_transform=float64_copy(problem.v_transform),
        )  # fmt: skip
        step.run(FloatRows(qkv), 0, cos, sin, FloatRows(out))
    assert out.tobytes() == expected.tobytes()
    assert (k_cache.unpack(0, n_tokens) == problem.used[0]).all()
