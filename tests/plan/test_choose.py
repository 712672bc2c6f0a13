"""Whether a plan helps: the expected error of scores, and which steps it keeps."""

from dataclasses import replace

import numpy as np
import pytest
from moments_support import moments_of, samples

from ksort_gguf.kvplan import Transform
from ksort_gguf.names import RUN_TIME_STEPS
from ksort_gguf.plan.balance import key_transform
from ksort_gguf.plan.choose import Trial, best_transform, checked_order
from ksort_gguf.plan.moments import LayerMoments
from ksort_gguf.reference import transform_keys, transform_queries
from ksort_gguf.reference_blocks import decode_blocks, encode_blocks, encode_transformed

HEAD_DIM, N_HEADS, N_KV_HEADS, BLOCK = 32, 4, 2, 16
TRIAL_TYPE = "bfp12"


@pytest.fixture
def q(rng):
    return samples(rng, 60, N_HEADS, HEAD_DIM)


@pytest.fixture
def k(rng):
    return samples(rng, 60, N_KV_HEADS, HEAD_DIM)


def trial_of(moments: LayerMoments) -> Trial:
    return Trial(moments.keys, moments.q_second, TRIAL_TYPE, BLOCK)


def best_key_transform(moments: LayerMoments, steps: tuple[str, ...]) -> tuple[Transform, list[str]]:
    return best_transform(trial_of(moments), None, steps, lambda some: key_transform(moments, some, None))


def orders(rng) -> np.ndarray:
    return np.stack([rng.permutation(HEAD_DIM) for _ in range(N_KV_HEADS)]).astype(np.int32)


def folded(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, np.repeat(order, x.shape[1] // len(order), axis=0)[None], axis=2)


def brute_force(q: np.ndarray, k_exact: np.ndarray, k_rounded: np.ndarray) -> np.ndarray:
    """By KV head, the mean over keys and tokens of the squared error of scores, summed over a token's queries."""
    error = np.repeat(k_rounded.astype(np.float64) - k_exact, N_HEADS // N_KV_HEADS, axis=1)
    by_query_head = (np.einsum("ihc,jhc->hij", q.astype(np.float64), error) ** 2).mean(axis=(1, 2))
    return by_query_head.reshape(N_KV_HEADS, -1).sum(axis=1)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("steps", [(), ("scale",), RUN_TIME_STEPS])
def test_expected_error_is_that_of_scores(rng, q, k, sort: bool, steps):
    """Catches errors weighted in the wrong order or space: against scores of transformed queries with stored keys."""
    order = orders(rng) if sort else None
    moments = moments_of(k, q)
    new_q, new_k = (q, k) if order is None else (folded(q, order), folded(k, order))
    if not steps:
        transform = None
        stored = decode_blocks(*encode_blocks(new_k, TRIAL_TYPE, BLOCK), TRIAL_TYPE, BLOCK)
    else:
        transform = key_transform(moments, steps, order)
        new_q, new_k = transform_queries(new_q, transform), transform_keys(new_k, transform)
        encoded = encode_transformed(new_k, TRIAL_TYPE, BLOCK, transform.feedback)
        stored = decode_blocks(*encoded, TRIAL_TYPE, BLOCK)
    expected = brute_force(new_q, new_k, stored)
    assert (expected > 0).all()
    assert trial_of(moments).errors(order, transform) == pytest.approx(expected, rel=1e-3)


def test_heads_count_alike(rng, q, k):
    """Catches a head of large scores that hides what a plan does to the others, and division by a head of no error."""
    moments = moments_of(k, q)
    order = orders(rng)
    ratios = trial_of(moments).errors(order, None) / trial_of(moments).errors(None, None)
    assert trial_of(moments).relative_error(order, None) == pytest.approx(ratios.mean())
    loud = replace(moments, q_second=moments.q_second * np.array([1e6, 1])[:, None, None])
    assert trial_of(loud).relative_error(order, None) == pytest.approx(ratios.mean())
    silent = replace(moments, q_second=moments.q_second * np.array([0, 1])[:, None, None])
    assert trial_of(silent).relative_error(order, None) == pytest.approx((1 + ratios[1]) / 2)


def test_heads_that_an_order_harms_stay_unsorted(rng, q):
    """Catches an order taken from, or left to, all heads of a layer for what it does to one."""
    halves = np.where(np.arange(HEAD_DIM) < BLOCK, 1.0, 0.02)  # each block of the stock order is even
    sizes = np.stack([halves, np.resize([1.0, 0.02], HEAD_DIM)])  # in head 1, every other channel is small
    k = (sizes * rng.standard_normal((60, N_KV_HEADS, HEAD_DIM))).astype(np.float32)
    q = rng.standard_normal(q.shape) / np.repeat(sizes, N_HEADS // N_KV_HEADS, axis=0)
    mixed = np.tile(np.argsort(np.arange(HEAD_DIM) % 2, kind="stable"), (N_KV_HEADS, 1)).astype(np.int32)
    trial = trial_of(moments_of(k, q))
    ratios = trial.errors(mixed, None) / trial.errors(None, None)
    assert ratios[0] > 1 > ratios[1]
    order, harmed = checked_order(trial, mixed, 1.0)
    assert harmed == [0] and order.dtype == np.int32
    assert np.array_equal(order, [np.arange(HEAD_DIM), mixed[1]])
    assert checked_order(trial, mixed, 1.01 * ratios[0])[1] == []


def test_what_helps_stays_whole(q, k):
    """Catches steps left out of layers that they serve."""
    moments = moments_of(k, q)
    transform, left_out = best_key_transform(moments, RUN_TIME_STEPS)
    assert left_out == [] and transform.rotate
    assert all(getattr(transform, name) is not None for name in ("shift", "scale", "feedback"))
    assert trial_of(moments).relative_error(None, transform) < 1


def even_moments(rng, q) -> LayerMoments:
    """Moments of keys of even size around 0, which shift and scale hardly improve."""
    return moments_of(rng.standard_normal((60, N_KV_HEADS, HEAD_DIM)).astype(np.float32), q)


def test_a_shift_that_hurts_is_left_out(rng, q):
    """Catches a check that never fires: text whose keys lie elsewhere than the keys that are tried."""
    moments = even_moments(rng, q)
    moments = replace(moments, k_mean=moments.k_mean + 40 * rng.standard_normal(moments.k_mean.shape))
    transform, left_out = best_key_transform(moments, ("shift", "rotate", "feedback"))
    assert left_out == ["shift"] and transform.shift is None and transform.feedback is not None
    assert trial_of(moments).relative_error(None, transform) < 1


def test_what_is_left_is_made_for_what_is_left(rng, q):
    """Catches feedback that stays in the scaled space after the scale is gone."""
    moments = even_moments(rng, q)
    second = moments.k_second.copy()
    second[:, range(0, HEAD_DIM, 2), range(0, HEAD_DIM, 2)] *= 1e-5
    moments = replace(moments, k_second=second)
    transform, left_out = best_key_transform(moments, ("scale", "feedback"))
    assert left_out == ["scale"]
    assert np.array_equal(transform.feedback, key_transform(moments, ("feedback",), None).feedback)


def test_all_that_hurts_together_goes_together(rng, q):
    """Catches a choice of one step where two are wrong. Near powers of two little is lost; any table changes that."""
    k = np.tile(2.0 ** rng.integers(0, 2, (60, 1, 1)), (1, N_KV_HEADS, HEAD_DIM)).astype(np.float32)
    k *= 1 + rng.uniform(-1e-3, 1e-3, k.shape).astype(np.float32)
    moments = moments_of(k, q)
    second = moments.k_second * rng.uniform(0.001, 1, moments.k_second.shape)
    moments = replace(moments, k_mean=moments.k_mean * rng.uniform(2, 9, moments.k_mean.shape), k_second=second)
    transform, left_out = best_key_transform(moments, ("shift", "scale"))
    assert left_out == ["shift", "scale"]
    assert transform.shift is transform.scale is transform.feedback is None
    assert trial_of(moments).relative_error(None, transform) == pytest.approx(1)
