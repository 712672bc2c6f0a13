"""The run-time steps of a plan from a layer's moments: shift, scale, and feedback in the rotated space.

Keys k and queries q meet only as q.k, so any invertible T serves: q.k = (T^-T q).(T k), and softmax does not see a
constant that is taken from every key. T makes the channels of a block alike, so that one exponent fits them all;
feedback then rounds to where queries look least. Moments are in stock row order, results in folded order.
"""

import numpy as np

from ksort_gguf.kvplan import Transform
from ksort_gguf.names import VALUE_STEPS
from ksort_gguf.plan.moments import LayerMoments
from ksort_gguf.reference import rotate

# Scales are variance^-SCALE_POWER. 1/2 would make all variances equal; 1/4 is best for plain rounding, where small
# channels must not carry the error of large ones; with feedback everything from 1/4 to 3/8 is as good.
SCALE_POWER = 0.375
DAMPING = 0.003  # of the mean diagonal, added to the covariance, as GPTQ does (arXiv 2210.17323, section 3.3)
_SMALLEST = 1e-6  # of the mean variance: dead channels


def key_transform(moments: LayerMoments, steps: tuple[str, ...], order: np.ndarray | None) -> Transform:
    """The transform of a layer's keys. order: int [n_kv_heads, d] of the layer, or None."""
    second, mean, queries = moments.k_second, moments.k_mean, moments.q_second
    if order is not None:
        second, queries = _reorder(second, order), _reorder(queries, order)
        mean = np.take_along_axis(mean, order, axis=1)
    shift = mean if "shift" in steps else np.zeros_like(mean)
    variance = np.einsum("hcc->hc", second) - 2 * shift * mean + shift**2
    return _transform(steps, shift, variance, queries)


def value_metric(output_weight: np.ndarray, n_kv_heads: int, head_dim: int) -> np.ndarray:
    """What errors of values cost, float64 [n_kv_heads, d, d]. output_weight: Wo, float32 [n_embd, n_heads * d].

    An error e of a value changes the layer's output by p Wo_g e for each query head g, p being its attention weight:
    the metric is the sum of Wo_g^T Wo_g.
    """
    columns = output_weight.reshape(len(output_weight), n_kv_heads, -1, head_dim).transpose(1, 2, 3, 0)
    return (columns @ columns.swapaxes(2, 3)).sum(axis=1, dtype=np.float64)


def value_transform(moments: LayerMoments, metric: np.ndarray, steps: tuple[str, ...]) -> Transform:
    """The transform of a layer's values for value_metric's `metric`: of `steps`, those that values take."""
    used = tuple(step for step in steps if step in VALUE_STEPS)
    return _transform(used, np.zeros_like(moments.v_mean), np.einsum("hcc->hc", moments.v_second), metric)


def _reorder(matrices: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows and columns of [heads, d, d] in the order [heads, d]."""
    return np.take_along_axis(np.take_along_axis(matrices, order[:, :, None], 1), order[:, None, :], 2)


def _transform(steps: tuple[str, ...], shift: np.ndarray, variance: np.ndarray, metric: np.ndarray) -> Transform:
    """shift, variance: [heads, d]; metric: [heads, d, d], the cost e^T metric e of an error e."""
    scale = _scales(variance) if "scale" in steps else np.ones_like(variance)
    permutation = feedback = None
    if "feedback" in steps:
        metric = metric / scale[:, :, None] / scale[:, None, :]
        if "rotate" in steps:
            metric = _rotated(metric)
        # The costliest channels first, while there are many left to take their error (GPTQ's "act-order").
        permutation = np.argsort(-np.einsum("hcc->hc", metric), axis=1, kind="stable").astype(np.int32)
        feedback = feedback_of(_reorder(metric, permutation))
    return Transform(
        shift=shift.astype(np.float32) if "shift" in steps else None,
        scale=scale.astype(np.float32) if "scale" in steps else None,
        rotate="rotate" in steps,
        permutation=permutation,
        feedback=feedback,
    )


def _scales(variance: np.ndarray) -> np.ndarray:
    """Scales [heads, d] of geometric mean 1 in each head."""
    mean = variance.mean(axis=1, keepdims=True)
    floored = np.maximum(variance, _SMALLEST * np.where(mean > 0, mean, 1.0))
    logs = -SCALE_POWER * np.log(floored)
    return np.exp(logs - logs.mean(axis=1, keepdims=True))


def _rotated(metric: np.ndarray) -> np.ndarray:
    """W metric W for [heads, d, d]."""
    matrix = rotate(np.eye(metric.shape[-1], dtype=np.float32)).astype(np.float64)
    return matrix @ metric @ matrix


def feedback_of(metric: np.ndarray) -> np.ndarray:
    """float32 [heads, d, d], strictly upper triangular, for metric [heads, d, d] symmetric, not negative definite.

    With U the upper Cholesky factor of the damped metric's inverse: U[c, j] / U[c, c] (GPTQ, arXiv 2210.17323, section
    3.3). Rounding in that way is Babai's nearest plane in the metric.
    """
    identity = np.eye(metric.shape[-1])
    mean = np.einsum("hcc->h", metric)[:, None, None] / metric.shape[-1]
    damped = np.where(mean > 0, metric / np.where(mean > 0, mean, 1.0), identity) + DAMPING * identity
    upper = np.linalg.cholesky(np.linalg.inv(damped)).swapaxes(1, 2)
    return np.triu(upper / np.einsum("hcc->hc", upper)[:, :, None], 1).astype(np.float32)
