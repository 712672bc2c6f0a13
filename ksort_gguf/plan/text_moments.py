"""Moments of the queries, keys and values that a model has on text."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ksort_gguf.models.source import Source
from ksort_gguf.plan.calibrate import observe_layers
from ksort_gguf.plan.moments import N_SAMPLES, LayerMoments, OnLayer


def position_weights(positions: np.ndarray) -> np.ndarray:
    """How much a token at each position counts: (position + 64)^-1/2, not normalized.

    A plan serves short and long contexts. Equal weights over a window of 4096 serve its end: at a context of 512 they
    cost a fifth more KL divergence than weights 1 / position, which serve the beginning.
    """
    return (positions + 64.0) ** -0.5


def moments_of_text(
    source: Source, windows: Sequence[Sequence[int]], on_layer: OnLayer, progress: Callable[[], object]
) -> None:
    """Run windows of token ids through the stock model and call on_layer(layer, moments) for each layer in turn.

    Calls `progress` after each layer and window. Raises as observe_layers.
    """
    sums: list[torch.Tensor] = []
    samples: list[list[np.ndarray]] = [[], []]  # of keys and of values
    starts = np.cumsum([0, *map(len, windows)])
    stride = -(-starts[-1] // N_SAMPLES)
    total = sum(position_weights(np.arange(len(window))).sum() for window in windows)

    def observe(layer: int, window: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if window == 0:
            sums.clear()
            samples[:] = [], []
        weights = torch.from_numpy(position_weights(np.arange(len(k))))
        grouped = q.reshape(len(q), k.shape[1], -1, k.shape[2])
        parts = [_mean(k, weights), _second(k, weights), _second_of_group(grouped, weights)]
        parts += [_mean(v, weights), _second(v, weights)]
        sums[:] = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        first = (stride // 2 - starts[window]) % stride  # in the middle of strides: not always a window's first key
        for found, x in zip(samples, (k, v), strict=True):
            found.append(x[first::stride].numpy().copy())
        if window + 1 == len(windows):
            means = (part.numpy() / total for part in sums)
            on_layer(layer, LayerMoments(*means, *map(np.concatenate, samples)))

    observe_layers(source, windows, observe, progress)


def _mean(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("n,nhc->hc", weights, x.double())


def _second(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    heads = x.transpose(0, 1).double()  # [heads, n, d]; giant biases would drown small variances in float32
    return (heads * weights[:, None]).transpose(1, 2) @ heads


def _second_of_group(q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q [n, n_kv_heads, group, d] -> [n_kv_heads, d, d]."""
    heads = q.permute(1, 2, 0, 3).double()  # [n_kv_heads, group, n, d]
    return ((heads * weights[:, None]).transpose(2, 3) @ heads).sum(1)
