"""SQuat: KIVI's grid for keys, errors of the first channels carried to the others so that queries do not see them.

Source: arXiv 2503.24358 and the authors' code (Red-Hat-AI-Innovation-Team/SQuat, models/llama_squat.py, the class that
stores keys after RoPE, and quant/new_pack.py; settings of the README's evaluations): group size and residual length
32, subspace dimension 60, lambda 0.001, groups of 64 channels. The 60 leading singular values and vectors of a
prompt's queries make M = I + lambda Q^T Q. Keys are quantized 32 tokens at a time, 32 consecutive tokens of a channel a
group as in KIVI, one group of channels after the other; the error d of group i moves the channels after it by
-M_rr^-1 M_ri d, r the channels that are left: the least d^T M d, GPTQ's step. Values are rotated by the Hadamard matrix
of a head, which the code folds into weights, and leave the window of 32 one token at a time, 32 channels a group.

Where it differs: the subspace comes from the calibration text, not from the prompt, because every token is taken as
generated (see kivi.py). Heads of 64 channels are cut into two groups: in one of 64 there would be nothing to carry.
"""

import torch

from .scheme import LayerTensors, Scheme, Side, Stored, check_blocks, check_power_of_two, hadamard, uniform, with_recent

_N_BITS = 4
_GROUP = 32  # tokens of a channel of keys, channels of a token of values; also the window
_SCALE_BITS = 32
_RANK = 60
_LAMBDA = 0.001
_CHANNELS = 64  # rounded together


class Squat(Scheme):
    """SQuat with 4 bits."""

    name = "squat-4"
    needs_calibration = True

    def __init__(self, metric: torch.Tensor | None = None):
        """M, float32 [n_kv_heads, head_dim, head_dim], from `fit`."""
        self._metric = metric

    def check(self, head_dim: int) -> None:
        check_blocks(self.name, _GROUP, head_dim)
        check_power_of_two(self.name, head_dim)

    def fit(self, sample: LayerTensors, side: Side) -> "Squat":
        q = sample.q.unflatten(0, (len(sample.k), -1)).flatten(1, 2).double()  # [n_kv_heads, group * n, head_dim]
        values, vectors = torch.linalg.eigh(q.mT @ q)  # eigenvalues ascending: squares of singular values
        leading = vectors[..., -_RANK:]
        metric = torch.eye(q.shape[-1]) + _LAMBDA * (leading * values[:, None, -_RANK:]) @ leading.mT
        return Squat(metric.float())

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        n, head_dim = x.shape[1:]
        position = torch.arange(n)
        token_bits = _N_BITS + _SCALE_BITS / _GROUP
        if side == "k":
            assert self._metric is not None
            decoded = _carried(x[:, : n // _GROUP * _GROUP], self._metric, min(_CHANNELS, head_dim // 2))
            return with_recent(decoded, x, position // _GROUP * _GROUP, token_bits)
        turned = (x[:, : max(n - _GROUP, 0)] @ hadamard(head_dim)).unflatten(2, (-1, _GROUP))
        decoded = uniform(turned, _N_BITS, dim=3).flatten(2) @ hadamard(head_dim)
        return with_recent(decoded, x, (position - _GROUP).clamp(min=0), token_bits)


def _carried(x: torch.Tensor, metric: torch.Tensor, n_channels: int) -> torch.Tensor:
    """What is read back of keys [n_kv_heads, n, head_dim], n a multiple of 32, n_channels rounded at a time."""
    left, decoded = x, []
    for start in range(0, x.shape[2], n_channels):
        now, left = left[..., :n_channels], left[..., n_channels:]
        decoded.append(uniform(now.unflatten(1, (-1, _GROUP)), _N_BITS, dim=2).flatten(1, 2))
        rest = metric[:, start + n_channels :, start:]  # [n_kv_heads, channels left, n_channels and those]
        if left.shape[2]:
            moves = torch.linalg.solve(rest[..., n_channels:], rest[..., :n_channels])
            left = left - (decoded[-1] - now) @ moves.mT
    return torch.cat(decoded, 2)
