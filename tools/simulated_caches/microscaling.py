"""Block formats of accelerators: MXINT8 and MXFP4, NVFP4 and NVINT4.

MXINT8, MXFP4: OCP Microscaling Formats (MX) Specification v1.0, sections 5 and 6.3: 32 values share one power of two,
2^(floor(log2 max|x|) - emax), emax being the exponent of the element type's largest value; elements round to nearest,
ties to even, and saturate. 8.25 and 4.25 bits.
NVFP4: NVIDIA's two-level scaling: 16 E2M1 values share an E4M3 scale, max|x| / 6 in units of a float32 scale of the
whole tensor that brings the largest of them to E4M3's 448. 4.5 bits.
NVINT4: arXiv 2510.25602 ("INT v.s. FP"), section 2: as NVFP4, elements are integers -7 .. 7 (symmetric clipping), so
the scale is max|x| / 7. With Hadamard: the paper's random rotation of 32 x 32 (its code's --rotate_dim 32), a Hadamard
matrix with random row signs, before rounding.

A cache cannot know the largest value of tokens to come, so the tensor scale is learnt from a calibration text, as
servers with NVFP4 caches do; a block scale beyond 448 saturates.
"""

from collections.abc import Callable

import torch

from .scheme import BlockFormat, LayerTensors, Side, Stored, check_blocks, random_hadamard, rotated

Rounding = Callable[[torch.Tensor], torch.Tensor]

_E2M1_LARGEST = 6.0
_E4M3_LARGEST = 448.0


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign; ties to the even code, beyond 6 to 6."""
    magnitude = x.abs().clamp(max=_E2M1_LARGEST)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x)


def round_to_int4(x: torch.Tensor) -> torch.Tensor:
    """To the nearest of -7 .. 7, ties to even."""
    return x.round().clamp(-7, 7)


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """8-bit two's complement with six fraction bits: -2 .. 1 + 63/64. The specification allows to leave -2 unused."""
    return (x * 64).round().clamp(-127, 127) / 64


class Mx(BlockFormat):
    """An MX format: blocks of 32 and a shared power of two."""

    block_size = 32

    def __init__(self, name: str, n_bits: int, emax: int, round_element: Rounding):
        """n_bits: of an element. emax: the exponent of the largest one."""
        self.name, self._n_bits, self._emax, self._round = name, n_bits, emax, round_element

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        largest = blocks.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(largest).exponent - 1 - self._emax
        scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-127, 127))
        return torch.where(largest > 0, self._round(blocks / scale) * scale, 0.0)

    def bits(self) -> float:
        return self._n_bits + 8 / self.block_size


class Nv(BlockFormat):
    """4-bit elements in blocks of 16, an E4M3 scale a block, a float32 scale a tensor."""

    block_size = 16
    needs_calibration = True

    def __init__(
        self, name: str, round_element: Rounding, largest_element: float, rotation: torch.Tensor | None = None
    ):
        self.name, self._round, self._largest_element = name, round_element, largest_element
        self._rotation = rotation  # [32, 32] orthonormal
        self._tensor_scale = 1.0

    def check(self, head_dim: int) -> None:
        check_blocks(self.name, self.block_size if self._rotation is None else len(self._rotation), head_dim)

    def fit(self, sample: LayerTensors, side: Side) -> "Nv":
        fitted = Nv(self.name, self._round, self._largest_element, self._rotation)
        largest = float(self._turned(sample.side(side)).abs().max())
        fitted._tensor_scale = largest / (self._largest_element * _E4M3_LARGEST) or 1.0
        return fitted

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = self._turned(layer.side(side))
        decoded = self.decode(x.unflatten(-1, (-1, self.block_size))).flatten(-2)
        return Stored(decoded if self._rotation is None else rotated(decoded, self._rotation.T), self.bits())

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        scale = blocks.abs().amax(-1, keepdim=True) / self._largest_element / self._tensor_scale
        scale = scale.clamp(max=_E4M3_LARGEST).to(torch.float8_e4m3fn).float() * self._tensor_scale
        return torch.where(scale > 0, self._round(blocks / scale) * scale, 0.0)

    def bits(self) -> float:
        return 4 + 8 / self.block_size

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._rotation is None else rotated(x, self._rotation)


def mxint8() -> Mx:
    return Mx("mxint8", 8, 0, round_to_int8)


def mxfp4() -> Mx:
    return Mx("mxfp4", 4, 2, round_to_e2m1)


def nvfp4() -> Nv:
    return Nv("nvfp4", round_to_e2m1, _E2M1_LARGEST)


def nvint4(with_hadamard: bool = False) -> Nv:
    if with_hadamard:
        return Nv("nvint4+hadamard", round_to_int4, 7.0, random_hadamard(32))
    return Nv("nvint4", round_to_int4, 7.0)
