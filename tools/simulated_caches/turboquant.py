"""TurboQuant: heads rotated, normalized, and rounded to the centroids of the law that rotated unit vectors follow.

Source: arXiv 2504.19874 as it is deployed, without its second stage (QJL), which every deployment leaves out because it
hurts attention: the random-sign Walsh-Hadamard matrix of a head; Lloyd-Max centroids of the law of one coordinate of a
random unit vector, density (1 - x^2)^((d - 3) / 2); one f16 norm a head of a token; "norm correction": the norm is
divided by that of the centroids. turboquant-N stores keys and values so, in every layer.

turboquant-vllm-N is vLLM's variant (model_executor/layers/quantization/turboquant/config.py, presets turboquant_4bit_nc
and turboquant_3bit_nc; v1/attention/backends/turboquant_attn.py; v1/attention/ops/triton_turboquant_store.py): keys as
above, but without random signs; values not rotated, on a uniform grid from the head's least to its largest value, scale
and zero point in f16; the first two and the last two layers in full precision, which the bits count as f16.

Where it differs: the corrected norm is stored, vLLM corrects when it reads; vLLM takes the centroids of the normal law
of variance 1/d, which the sphere's law nears (the squared error grows by less than 0.5% at d = 64); vLLM attends to a
prompt before it stores it, here every token is taken as generated (see kivi.py).
"""

from functools import cache

import numpy as np
import torch

from .scheme import Exact, LayerTensors, Scheme, Side, Stored, check_power_of_two, hadamard, random_hadamard, uniform

_NORM_BITS = 16
_SCALE_BITS = 32  # an f16 scale and an f16 zero point
_EXACT_LAYERS = 2  # at either end, at most half of all
_GRID_STEPS = 1 << 14
_ROUNDS = 2000
_TOLERANCE = 1e-12


class TurboQuant(Scheme):
    """TurboQuant with 2^n_bits centroids, on keys and values."""

    def __init__(self, n_bits: int):
        self.name, self._n_bits = f"turboquant-{n_bits}", n_bits

    def check(self, head_dim: int) -> None:
        check_power_of_two(self.name, head_dim)

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        decoded = nearest_on_sphere(x, random_hadamard(x.shape[-1]), self._n_bits)
        return Stored(decoded, self._n_bits + _NORM_BITS / x.shape[-1])


class TurboQuantVllm(Scheme):
    """vLLM's turboquant_{n_bits}bit_nc."""

    def __init__(self, n_bits: int):
        self.name, self._n_bits = f"turboquant-vllm-{n_bits}", n_bits

    def check(self, head_dim: int) -> None:
        check_power_of_two(self.name, head_dim)

    def in_layer(self, layer: int, n_layers: int) -> Scheme:
        n_exact = min(_EXACT_LAYERS, n_layers // 2)
        return self if n_exact <= layer < n_layers - n_exact else Exact("f16", torch.float16)

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        head_dim = x.shape[-1]
        if side == "k":
            return Stored(nearest_on_sphere(x, hadamard(head_dim), self._n_bits), self._n_bits + _NORM_BITS / head_dim)
        return Stored(uniform(x, self._n_bits, dim=-1), self._n_bits + _SCALE_BITS / head_dim)


def nearest_on_sphere(x: torch.Tensor, rotation: torch.Tensor, n_bits: int) -> torch.Tensor:
    """What is read back of `x` [..., d], its direction rounded behind `rotation` [d, d] and its norm kept in f16."""
    norm = x.norm(dim=-1, keepdim=True)
    turned = torch.where(norm > 0, x / norm, 0.0) @ rotation
    points = torch.from_numpy(centroids(x.shape[-1], n_bits)).float()
    nearest = points[torch.bucketize(turned, (points[1:] + points[:-1]) / 2)]
    return nearest * (norm / nearest.norm(dim=-1, keepdim=True)).half().float() @ rotation.T


@cache
def centroids(d: int, n_bits: int) -> np.ndarray:
    """Ascending Lloyd-Max centroids, float64 [2^n_bits], of a coordinate of a random unit vector in d >= 3 dimensions.

    Its density is (1 - x^2)^((d - 3) / 2) but for a constant, the integral of x times that, up to x, is
    -(1 - x^2)^((d - 1) / 2) / (d - 1); the integral of the density is summed on a grid by the trapezoidal rule.
    """
    end = min(1.0, 10 / d**0.5)  # beyond ten deviations there is nothing
    grid = np.linspace(-end, end, _GRID_STEPS + 1)
    density = (1 - grid**2) ** ((d - 3) / 2)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2) * (grid[1] - grid[0])])
    points = np.interp((np.arange(2**n_bits) + 0.5) / 2**n_bits * mass[-1], mass, grid)
    for _ in range(_ROUNDS):
        edges = np.concatenate([[-end], (points[1:] + points[:-1]) / 2, [end]])
        moments = np.diff(-((1 - edges**2) ** ((d - 1) / 2)) / (d - 1))
        better = moments / np.diff(np.interp(edges, grid, mass))
        if np.abs(better - points).max() < _TOLERANCE:
            break
        points = better
    return points
