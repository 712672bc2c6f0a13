"""y = W x + b for weights kept as stored (f16, bf16, f32) and activations in float32.

A few rows, as in generation, go to libksort, which reads the weights once and computes in float32 whatever their type.
Many rows go to torch: f32 and bf16 as they are. Its f16 product of many rows is several times slower than f32's, so f16
weights are expanded to float32, a slice at a time in one small buffer.
"""

import torch
import torch.nn.functional as F

from ksort_gguf import native

_FEW_ROWS = 4  # the library's own blocking: more rows would read the weights again
_SLICE_VALUES = 1 << 21  # 8 MiB of float32
_TYPE_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Linear:
    """A matrix [n_out, n_in] with an optional float32 bias [n_out], run on the threads of `pool`."""

    _slice = torch.empty(0)  # shared by all matrices of the process: overwritten by every call

    def __init__(self, pool: native.Pool, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self.weight, self.bias = weight.contiguous(), bias
        self._pool = pool
        bias_address = None if bias is None else bias.data_ptr()
        self._native = native.Weights(_TYPE_NAMES[weight.dtype], *weight.shape, self.weight.data_ptr(), bias_address)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [n, n_in], contiguous -> float32 [n, n_out]."""
        if x.shape[0] <= _FEW_ROWS:
            y = torch.empty((x.shape[0], self.weight.shape[0]))
            self._pool.linear(self._native, x.data_ptr(), y.data_ptr(), x.shape[0])
            return y
        if self.weight.dtype == torch.float32:
            return F.linear(x, self.weight, self.bias)
        y = self._expanded(x) if self.weight.dtype == torch.float16 else F.linear(x.bfloat16(), self.weight).float()
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
