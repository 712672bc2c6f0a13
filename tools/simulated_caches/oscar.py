"""OSCAR: heads rotated by what attention looks at, at 4 bits by token.

Source: arXiv 2605.17757 and the authors' code (FutureMLS-Lab/OSCAR, rotation/compute_kv_rotation.py, method qqt_sst,
composition r_h_pbr; rotation/eval_oscar_gpqa.sh): one rotation a layer and side, R H P. R holds the eigenvectors,
eigenvalues ascending, of a covariance, the mean over KV heads: for keys that of the queries which read the head; for
values that of the values, each token weighted with k^T E[q q^T] k. H is the orthonormal Hadamard matrix; P puts the
column of the i-th largest eigenvalue at the place of i's bits reversed, so that groups of channels share them evenly.
Then groups of 128 channels, or a head, get a uniform grid from the least to the largest value.

Where it differs: the source stores 2 bits, clips 4% of keys and 8% of values, and keeps 64 first and 256 recent tokens
in full precision. Here are 4 bits, at which clipping costs more than it gains, and exact tokens are left to the row's
~tail and ~sink. Scale and zero point take 16 bits each; the source's evaluation keeps them in float32. The calibration
text is this tool's. Rotations belong to the model and are not counted.
"""

import torch

from .scheme import LayerTensors, Scheme, Side, Stored, check_power_of_two, hadamard, uniform

_N_BITS = 4
_GROUP = 128  # channels
_SCALE_BITS = 32


class Oscar(Scheme):
    """OSCAR's rotation with 4 bits."""

    name = "oscar-4"
    needs_calibration = True

    def __init__(self, rotation: torch.Tensor | None = None):
        """[head_dim, head_dim], from `fit`."""
        self._rotation = rotation

    def check(self, head_dim: int) -> None:
        check_power_of_two(self.name, head_dim)

    def fit(self, sample: LayerTensors, side: Side) -> "Oscar":
        values, vectors = torch.linalg.eigh(_covariance(sample, side))
        order = values.argsort(descending=True)[bit_reversed(len(values))]  # bit reversal is its own inverse
        return Oscar((vectors @ hadamard(len(values)).double())[:, order].float())

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        assert self._rotation is not None
        turned = layer.side(side) @ self._rotation
        group = min(_GROUP, turned.shape[-1])
        decoded = uniform(turned.unflatten(-1, (-1, group)), _N_BITS, dim=-1).flatten(-2) @ self._rotation.T
        return Stored(decoded, _N_BITS + _SCALE_BITS / group)


def bit_reversed(n: int) -> torch.Tensor:
    """int64 [n]: each number below n, a power of two, with its bits in reverse order."""
    n_bits = n.bit_length() - 1
    return torch.tensor([int(f"{i:0{n_bits}b}"[::-1], 2) for i in range(n)])


def _covariance(sample: LayerTensors, side: Side) -> torch.Tensor:
    """float64 [head_dim, head_dim]: the second moment that the eigenvectors of one side are taken of."""
    q = sample.q.unflatten(0, (len(sample.k), -1)).flatten(1, 2).double()  # [n_kv_heads, group * n, head_dim]
    q_second = q.mT @ q / q.shape[1]  # [n_kv_heads, head_dim, head_dim]
    if side == "k":
        return q_second.mean(0)
    k, v = sample.k.double(), sample.v.double()
    weights = ((k @ q_second) * k).sum(-1, keepdim=True)  # [n_kv_heads, n, 1]
    weights = weights / weights.sum(1, keepdim=True)
    return ((v * weights).mT @ v).mean(0)
