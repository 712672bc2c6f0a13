"""The tables of run-time steps: what they keep, and what they make smaller."""

from dataclasses import replace

import numpy as np
import pytest
from moments_support import moments_of, samples

from ksort_gguf.names import RUN_TIME_STEPS
from ksort_gguf.plan.balance import DAMPING, SCALE_POWER, feedback_of, key_transform, value_metric, value_transform
from ksort_gguf.reference import restore_values, transform_keys, transform_queries
from ksort_gguf.reference_blocks import decode_blocks, encode_transformed

HEAD_DIM, N_HEADS, N_KV_HEADS, N = 32, 4, 2, 200


@pytest.fixture
def k(rng):
    return samples(rng, N, N_KV_HEADS, HEAD_DIM)


@pytest.fixture
def q(rng):
    return samples(rng, N, N_HEADS, HEAD_DIM)


def orders(rng) -> np.ndarray:
    return np.stack([rng.permutation(HEAD_DIM) for _ in range(N_KV_HEADS)]).astype(np.int32)


def correlated(rng, heads: int = 3, d: int = 24) -> np.ndarray:
    """Symmetric positive matrices [heads, d, d] with a few dominant directions, as queries have them."""
    factors = rng.standard_normal((heads, d, 5))
    return factors @ factors.swapaxes(1, 2) + 0.1 * np.eye(d)


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("steps", [("shift",), ("scale",), ("rotate",), RUN_TIME_STEPS])
def test_scores_change_by_a_constant_alone(rng, q, k, sort: bool, steps):
    """Catches a scale that is not undone on queries, tables in stock order beside folded keys, and heads mixed up."""
    order = orders(rng) if sort else np.tile(np.arange(HEAD_DIM), (N_KV_HEADS, 1))
    transform = key_transform(moments_of(k, q), steps, order if sort else None)
    folded_k = np.take_along_axis(k, order[None], axis=2)
    folded_q = np.take_along_axis(q, np.repeat(order, N_HEADS // N_KV_HEADS, axis=0)[None], axis=2)
    new_k = np.repeat(transform_keys(folded_k, transform), 2, axis=1).astype(np.float64)
    new_q = transform_queries(folded_q, transform).astype(np.float64)
    change = np.einsum("ihc,jhc->hij", new_q, new_k)
    change -= np.einsum("ihc,jhc->hij", q.astype(np.float64), np.repeat(k, 2, axis=1))
    sizes = np.linalg.norm(q, axis=2).max() * np.linalg.norm(k, axis=2).max()
    assert np.ptp(change, axis=2).max() < 1e-6 * sizes
    if "shift" not in steps:
        assert np.abs(change).max() < 1e-6 * sizes


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("sort", [False, True])
def test_scales_follow_what_is_left_after_the_shift(rng, q, k, shift: bool, sort: bool):
    """Catches scales of E[k^2] where the mean is taken away (or the reverse), in stock order, or not of mean 1."""
    order = orders(rng) if sort else None
    transform = key_transform(moments_of(k, q), ("shift", "scale") if shift else ("scale",), order)
    folded = k if order is None else np.take_along_axis(k, order[None], axis=2)
    energies = (folded.astype(np.float64) ** 2).mean(axis=0)
    expected = (folded.var(axis=0, dtype=np.float64) if shift else energies) ** -SCALE_POWER
    expected /= np.exp(np.log(expected).mean(axis=1, keepdims=True))
    assert transform.scale == pytest.approx(expected, rel=1e-5)
    assert np.log(transform.scale).mean(axis=1) == pytest.approx(0, abs=1e-6)


def test_each_step_alone_makes_its_table_alone(q, k):
    """Catches a table that is written, and run, for a step that nobody asked for."""
    for step in RUN_TIME_STEPS:
        transform = key_transform(moments_of(k, q), (step,), None)
        made = {name for name in ("shift", "scale", "permutation", "feedback") if getattr(transform, name) is not None}
        expected = {"rotate": set(), "feedback": {"permutation", "feedback"}}.get(step, {step})
        assert made == expected and transform.rotate == (step == "rotate")


def test_feedback_is_elimination_a_channel_at_a_time(rng):
    """Catches a lower factor, a transpose, a wrong divisor or undamped metric: against Optimal Brain Quantization's
    update (arXiv 2208.11580, equation 2), which eliminates each rounded channel from the inverse."""
    metric = correlated(rng)
    found = feedback_of(metric)
    for head, h in enumerate(metric):
        mean = np.trace(h) / len(h)
        inverse = np.linalg.inv(h + DAMPING * mean * np.eye(len(h)))
        for c in range(len(h)):
            assert found[head, c, c + 1 :] == pytest.approx(inverse[c, c + 1 :] / inverse[c, c], rel=1e-4, abs=1e-6)
            inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    assert not np.tril(found).any() and found.dtype == np.float32


def test_feedback_lowers_the_weighted_error(rng):
    """Catches feedback of the wrong sign or direction, which makes errors larger."""
    metric = correlated(rng)
    y = rng.standard_normal((100, *metric.shape[:2])).astype(np.float32)
    costs = []
    for feedback in (None, feedback_of(metric)):
        error = decode_blocks(*encode_transformed(y, "bfp12", 16, feedback), "bfp12", 16) - y.astype(np.float64)
        costs.append(np.einsum("nhc,hcd,nhd->h", error, metric, error))
    assert (costs[1] < 0.5 * costs[0]).all()


def test_key_feedback_meets_queries_as_they_are_transformed(rng, q, k):
    """Catches feedback for queries in stock order, before their scale, or in the space that is not rotated."""
    order = orders(rng)
    transform = key_transform(moments_of(k, q), RUN_TIME_STEPS, order)
    folded_q = np.take_along_axis(q, np.repeat(order, 2, axis=0)[None], axis=2)
    seen = transform_queries(folded_q, transform).reshape(N, N_KV_HEADS, 2, HEAD_DIM).astype(np.float64)
    metric = np.einsum("nhgc,nhgd->hcd", seen, seen) / N
    assert transform.feedback == pytest.approx(feedback_of(metric), abs=2e-4)
    energies = np.einsum("hcc->hc", metric)
    assert (np.diff(energies) <= 1e-5 * energies[:, :1]).all()  # the dearest channels are rounded first


@pytest.mark.parametrize("n_heads", [N_KV_HEADS, N_HEADS])
@pytest.mark.parametrize("steps", [("feedback",), ("scale", "feedback"), RUN_TIME_STEPS])
def test_value_feedback_meets_the_output_projection(rng, q, k, n_heads: int, steps):
    """Catches columns of other heads, rows taken for columns, and errors measured before they are restored."""
    v = samples(rng, N, N_KV_HEADS, HEAD_DIM)
    output_weight = rng.standard_normal((48, n_heads * HEAD_DIM)).astype(np.float32)
    found = value_metric(output_weight, N_KV_HEADS, HEAD_DIM)
    transform = value_transform(moments_of(k, q[:, :n_heads], v), found, steps)
    assert transform.shift is None and (transform.scale is not None) == ("scale" in steps)
    errors = np.tile(np.eye(HEAD_DIM, dtype=np.float32)[:, None], (1, n_heads, 1))  # one a channel, in every head
    restored = restore_values(errors, transform).astype(np.float64)
    metric = np.zeros((N_KV_HEADS, HEAD_DIM, HEAD_DIM))
    for head in range(n_heads):
        outputs = restored[:, head] @ output_weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].T
        metric[head // (n_heads // N_KV_HEADS)] += outputs @ outputs.T
    assert transform.feedback == pytest.approx(feedback_of(metric), abs=2e-4)


def test_values_follow_their_own_size(rng, q, k):
    """Catches values scaled as keys are."""
    v = samples(rng, N, N_KV_HEADS, HEAD_DIM)
    transform = value_transform(moments_of(k, q, v), np.ones((N_KV_HEADS, HEAD_DIM, HEAD_DIM)), ("scale",))
    logs = np.log(transform.scale) + SCALE_POWER * np.log((v.astype(np.float64) ** 2).mean(axis=0))
    assert np.ptp(logs, axis=1) == pytest.approx(0, abs=1e-5)


def test_dead_channels_and_heads_that_nobody_reads(q, k):
    """Catches division by zero, and factors of a million for channels that hold nothing."""
    k[:, 0, 3] = 0
    k[:, 0, 5] = 7  # constant: nothing is left after the shift
    k[:, 1] = 0
    q[:, :2] = 0
    moments = moments_of(k, q)
    transform = key_transform(replace(moments, k_second=moments.k_second - 1e-12), RUN_TIME_STEPS, None)
    assert np.isfinite(transform.scale).all() and np.isfinite(transform.feedback).all()
    assert transform.scale.min() > 1e-3 and transform.scale.max() < 1e3
    assert transform.scale[1] == pytest.approx(1)
    assert not transform.feedback[0].any()
