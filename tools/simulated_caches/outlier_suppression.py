"""Outlier Suppression+: channels shifted and scaled by constants, then 4 bits by token.

Source: arXiv 2304.09145, section 4: the shift of a channel is the middle of its range (equation 2); its scale is
max(1, range after the shift / t) (section 4.2), with one threshold t, found on a grid of 100 for the least output
error on a calibration text; then a token's values share a scale. Asymmetric, an f16 scale and zero point for each head
of a token, which is finer than the paper's one for all heads.

The paper treats the inputs of matrix products and moves shift and scale into weights. Here they treat keys after RoPE:
softmax does not see the shift, and queries take the scale; and values, whose shift and scale the output projection
takes. The output error is that of scores for keys (with the calibration text's queries), of values themselves for
values. Constants of a layer belong to the model and are not counted.
"""

import math

import torch

from .scheme import LayerTensors, Scheme, Side, Stored, uniform

_N_BITS = 4
_SCALE_BITS = 32
_N_THRESHOLDS = 100


class OutlierSuppression(Scheme):
    """OS+ on keys or values."""

    name = "os+-4"
    needs_calibration = True

    def __init__(self, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None):
        """[n_kv_heads, 1, head_dim] each, from `fit`."""
        self._shift, self._scale = shift, scale

    def fit(self, sample: LayerTensors, side: Side) -> "OutlierSuppression":
        x = sample.side(side)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)  # [n_kv_heads, 1, head_dim]
        shift, half_range = (low + high) / 2, (high - low) / 2
        weight = _query_weight(sample) if side == "k" else torch.eye(x.shape[2])
        best_loss, best_scale = math.inf, torch.ones(())
        for threshold in torch.linspace(1, 0, _N_THRESHOLDS + 1)[:-1] * half_range.max():
            scale = (half_range / threshold).clamp(min=1)
            error = x - _decoded(x, shift, scale)
            loss = float(((error @ weight) * error).sum())
            if loss < best_loss:
                best_loss, best_scale = loss, scale
        return OutlierSuppression(shift, best_scale)

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        assert self._shift is not None and self._scale is not None
        return Stored(_decoded(x, self._shift, self._scale), _N_BITS + _SCALE_BITS / x.shape[2])


def _decoded(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return uniform((x - shift) / scale, _N_BITS, dim=2) * scale + shift


def _query_weight(sample: LayerTensors) -> torch.Tensor:
    """[n_kv_heads, head_dim, head_dim]: sum of q q^T over the queries that read each KV head."""
    n_kv_heads = len(sample.k)
    q = sample.q.unflatten(0, (n_kv_heads, -1)).flatten(1, 2)
    return q.transpose(1, 2) @ q
