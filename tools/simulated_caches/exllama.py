"""exllamav3's 4-bit cache: 32 channels rotated, 16 midpoints between the largest magnitude and its negative.

Source: exllamav3 (turboderp-org/exllamav3, exllamav3_ext/cache/q_cache_kernels.cuh, quant_block_x4 and
dequant_block_x4, the linear grid, which is the default): groups of 32 channels are multiplied by the orthonormal
Hadamard matrix and divided by their largest magnitude s; floor(8 x / s + 8), clamped to 0 .. 15, is stored, s in f16;
(q - 7.5) / 8 s is read. 4.5 bits, keys and values alike.
"""

import torch

from .scheme import BlockFormat, hadamard

_SMALLEST = 1e-10  # added to the scale


class Exl3(BlockFormat):
    """exllamav3's cache with 4 bits."""

    name = "exl3-4"
    block_size = 32

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        rotation = hadamard(self.block_size)
        turned = blocks @ rotation
        scale = turned.abs().amax(-1, keepdim=True) + _SMALLEST
        q = (turned / scale * 8 + 8).floor().clamp(0, 15)
        return (q - 7.5) / 8 * scale.half().float() @ rotation

    def bits(self) -> float:
        return 4 + 16 / self.block_size
