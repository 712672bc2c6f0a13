"""y = W x + b for weights kept as stored (f16, bf16, f32) and activations in float32.

torch's CPU matrix products: f16 runs at memory speed for one row but its many-row product is several times slower than
f32's, so many rows go through float32 copies of a slice of the weights, a slice at a time in one small buffer.
bf16 is fast for many rows and f32 for both.
"""

import torch
import torch.nn.functional as F

_F16_ROWS = 8  # from this many rows on, expanding a slice of f16 weights pays
_SLICE_VALUES = 1 << 21  # 8 MiB of float32


class Linear:
    """A matrix [n_out, n_in] with an optional float32 bias [n_out]."""

    _slice = torch.empty(0)  # shared by all matrices of the process: overwritten by every call

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [n, n_in] -> float32 [n, n_out]."""
        weight = self.weight
        if weight.dtype == torch.float32:
            return F.linear(x, weight, self.bias)
        if weight.dtype == torch.float16 and x.shape[0] >= _F16_ROWS:
            y = self._expanded(x)
        else:
            y = F.linear(x.to(weight.dtype), weight).float()
        return y if self.bias is None else y.add_(self.bias)

    def _expanded(self, x: torch.Tensor) -> torch.Tensor:
        n_out, n_in = self.weight.shape
        rows = max(1, min(n_out, _SLICE_VALUES // n_in))
        if Linear._slice.numel() < rows * n_in:
            Linear._slice = torch.empty(max(rows * n_in, _SLICE_VALUES))
        y = torch.empty((x.shape[0], n_out))
        for start in range(0, n_out, rows):
            part = self.weight[start : start + rows]
            expanded = Linear._slice[: part.numel()].view(part.shape)
            expanded.copy_(part)
            torch.mm(x, expanded.T, out=y[:, start : start + rows])
        return y
