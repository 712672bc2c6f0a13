"""KVQuant: keys before RoPE by channel, values by token, a non-uniform grid, 1% of outliers kept.

Source: arXiv 2401.18079, section 3, its nuq4-1% (and nuq3, nuq2) with the first token in f16 (section 3.5). Keys: each
channel has thresholds, the 0.5% and 99.5% quantiles of a calibration text; between them values are scaled to -1 .. 1
and take the nearest of 2^bits points of their layer; beyond them they are outliers, kept in f16. Keys are rotated when
they are read. Values: a token's vector of all heads has its own thresholds, its 0.5% largest and smallest values, and
its own f16 scale and offset. Points are found by k-means on the scaled calibration values.

Where it differs: the paper weights k-means with the Fisher information of a backward pass, which this tool does not
make; here every value weighs the same. Bits: an outlier takes 16 and an index of 16, as in the paper; constants of a
layer (thresholds, points) belong to the model and are not counted.
"""

import torch

from .scheme import LayerTensors, Scheme, Side, Stored, outlier_mask

_OUTLIER_SHARE = 0.01
_OUTLIER_BITS = 16 + 16
_SCALE_BITS = 32
_EXACT_TOKENS = 1  # at the beginning of a text
_FIT_VALUES = 1 << 16  # of the calibration text that k-means sees
_FIT_ROUNDS = 50  # the authors' max_iter


class KvQuant(Scheme):
    """KVQuant with 2^n_bits points."""

    needs_calibration = True

    def __init__(self, n_bits: int):
        self.name, self._n_bits = f"kvquant-{n_bits}", n_bits
        self._points = torch.empty(0)  # by `fit`, like the ends of keys' channels, [n_kv_heads, 1, head_dim] each
        self._low = self._high = torch.empty(0)

    def fit(self, sample: LayerTensors, side: Side) -> "KvQuant":
        fitted = KvQuant(self._n_bits)
        if side == "k":
            x = sample.k_before_rope
            ends = torch.tensor([_OUTLIER_SHARE / 2, 1 - _OUTLIER_SHARE / 2])
            by_head = [torch.quantile(head, ends, dim=0) for head in x]  # torch takes 16 million values at a time
            fitted._low, fitted._high = torch.stack(by_head, 1)[:, :, None]  # [n_kv_heads, 1, head_dim] each
            scaled = _scaled(x, fitted._low, fitted._high)
            scaled = scaled[scaled.abs() <= 1]
        else:
            x = _token_vectors(sample.v)
            mask = outlier_mask(x, _n_outliers(x))
            scaled = _scaled(x, *_ends(x, mask))[~mask]
        fitted._points = _k_means(scaled, 2**self._n_bits)
        return fitted

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        if side == "k":
            x, low, high = layer.k_before_rope, self._low, self._high
            mask = (x < low) | (x > high)
            bits = self._n_bits + float(mask.float().mean()) * _OUTLIER_BITS
        else:
            x = _token_vectors(layer.v)
            mask = outlier_mask(x, _n_outliers(x))
            low, high = _ends(x, mask)
            bits = self._n_bits + float(mask.float().mean()) * _OUTLIER_BITS + _SCALE_BITS / x.shape[1]
        decoded = torch.where(mask, x.half().float(), self._rounded(x, low, high))
        by_head = layer.apply_rope(decoded) if side == "k" else decoded.unflatten(1, layer.v.shape[::2]).transpose(0, 1)
        return Stored(by_head, bits, n_sinks=_EXACT_TOKENS)

    def _rounded(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The nearest points, at the place of x between `low` and `high`."""
        middles = (self._points[1:] + self._points[:-1]) / 2
        nearest = self._points[torch.bucketize(_scaled(x, low, high), middles)]
        return nearest * (high - low) / 2 + (high + low) / 2


def _scaled(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """`x` with low .. high brought to -1 .. 1."""
    half_range = (high - low) / 2
    return torch.where(half_range > 0, (x - (high + low) / 2) / half_range, 0.0)


def _token_vectors(v: torch.Tensor) -> torch.Tensor:
    """[n_kv_heads, n, head_dim] -> [n, n_kv_heads * head_dim]."""
    return v.transpose(0, 1).flatten(1)


def _n_outliers(vectors: torch.Tensor) -> int:
    """Outliers at either end of a token's vector: at least one."""
    return max(1, round(_OUTLIER_SHARE / 2 * vectors.shape[1]))


def _ends(vectors: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and largest value of each vector outside of `mask`, in f16: [n, 1] each."""
    low = vectors.masked_fill(mask, torch.inf).amin(1, keepdim=True)
    high = vectors.masked_fill(mask, -torch.inf).amax(1, keepdim=True)
    return low.half().float(), high.half().float()


def _k_means(values: torch.Tensor, n_points: int) -> torch.Tensor:
    """Ascending centres [n_points] of one-dimensional k-means, begun at the values' quantiles."""
    ordered = values.flatten().sort().values
    ordered = ordered[:: max(1, len(ordered) // _FIT_VALUES)].double()
    points = ordered[((torch.arange(n_points) + 0.5) / n_points * len(ordered)).long()]
    sums = torch.cat([torch.zeros(1, dtype=torch.double), ordered.cumsum(0)])
    for _ in range(_FIT_ROUNDS):
        cuts = torch.searchsorted(ordered, (points[1:] + points[:-1]) / 2)
        cuts = torch.cat([torch.tensor([0]), cuts, torch.tensor([len(ordered)])])
        counts = cuts.diff()
        points = torch.where(counts > 0, sums[cuts].diff() / counts.clamp(min=1), points)
    return points.float()
