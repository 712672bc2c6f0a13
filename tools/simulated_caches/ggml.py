"""llama.cpp's cache types q4_0, q5_0 and q8_0, alone and with its automatic Hadamard rotation, and ik_llama.cpp's q4_0.

Source: llama.cpp (the copy in llama-cpp-python 0.3.36). Rounding: quantize_row_q4_0_ref, quantize_row_q5_0_ref and
quantize_row_q8_0_ref in ggml/src/ggml-quants.c: blocks of 32 channels, one f16 scale a block; 4.5, 5.5 and 8.5 bits.
Rotation: pull request 21038, src/llama-kv-cache.cpp (attn_rot_k, build_input_k_rot, build_input_v_rot) and build_attn
in src/llama-graph.cpp: on by default for every quantized K or V type whose head dimension is a multiple of 64. Queries
and keys after RoPE are multiplied by the orthonormal Walsh-Hadamard matrix of the largest power of two, from 64 on,
that divides the head dimension; values by the one of 64, and the attention output by it again.
Queries: attention on the CPU rounds them to q8_0 beside all three types (the types' vec_dot_type), after the rotation.

ik_q4_0+hadamard: ik_llama.cpp, pull requests 1547 and 1556 (ggml/src/ggml-cuda/cpy-utils.cuh, quantize_f32_q4_0_block):
q4_0's integers q, but then the scale d that is best for them by least squares weighted with x^2, sum x^2 q x / sum
x^2 q^2; with -khad and -vhad (pull requests 1033, 1034, 1527), the Hadamard matrix of a head for keys and for values.
Queries are taken to be rounded as llama.cpp's.
"""

import torch

from ksort_gguf.errors import KsortError

from .scheme import BlockFormat, LayerTensors, Side, Stored, hadamard, rotated, round_half_away

_BLOCK = 32
_SMALLEST_ROTATION = 64


class SignedScale(BlockFormat):
    """q4_0 and q5_0: d = (the value of largest magnitude, with its sign) / -2^(n_bits-1), so that it is on the grid."""

    block_size = _BLOCK

    def __init__(self, name: str, n_bits: int):
        self.name, self._n_bits = name, n_bits

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        d, q = self._scale_and_integers(blocks)
        return d.half().float() * q

    def _scale_and_integers(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """d [..., 1] and q [..., 32], so that blocks are about d q."""
        half = 2 ** (self._n_bits - 1)
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))  # the first of equal ones, as in C
        d = largest / -half
        inverse = torch.where(d == 0, 0.0, 1 / d)
        return d, (blocks * inverse + (half + 0.5)).trunc().clamp_(max=2 * half - 1) - half

    def bits(self) -> float:
        return self._n_bits + 16 / _BLOCK

    def round_queries(self, q: torch.Tensor) -> torch.Tensor:
        return round_to_q8_0(q)


class Refitted(SignedScale):
    """SignedScale with the scale that is best for its integers, errors weighted with x^2."""

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        d, q = self._scale_and_integers(blocks)
        weights = blocks**2
        of_q = (weights * q * q).sum(-1, keepdim=True)
        d = torch.where(of_q > 0, (weights * q * blocks).sum(-1, keepdim=True) / of_q, d)
        return d.half().float() * q


class Q8(BlockFormat):
    """q8_0: d = largest magnitude / 127."""

    name = "q8_0"
    block_size = _BLOCK

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        d = blocks.abs().amax(-1, keepdim=True) / 127
        inverse = torch.where(d == 0, 0.0, 1 / d)
        return d.half().float() * round_half_away(blocks * inverse)

    def bits(self) -> float:
        return 8 + 16 / _BLOCK

    def round_queries(self, q: torch.Tensor) -> torch.Tensor:
        return round_to_q8_0(q)


def round_to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """float32 [..., a multiple of 32], rounded to q8_0."""
    return Q8().decode(x.unflatten(-1, (-1, _BLOCK))).flatten(-2)


class Rotated(BlockFormat):
    """Another ggml type behind llama.cpp's rotation."""

    block_size = _SMALLEST_ROTATION

    def __init__(self, inner: BlockFormat, whole_values: bool = False):
        """whole_values: values are turned like keys."""
        self.name, self._inner, self._whole_values = f"{inner.name}+hadamard", inner, whole_values

    def check(self, head_dim: int) -> None:
        if head_dim % _SMALLEST_ROTATION:
            raise KsortError(
                f"--types {self.name}: llama.cpp rotates heads of a multiple of {_SMALLEST_ROTATION} channels, not "
                f"{head_dim}: use {self._inner.name}"
            )

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        is_whole = side == "k" or self._whole_values
        rotation = hadamard(key_rotation_size(x.shape[-1]) if is_whole else _SMALLEST_ROTATION)
        turned = rotated(x, rotation).unflatten(-1, (-1, _BLOCK))
        return Stored(rotated(self._inner.decode(turned).flatten(-2), rotation), self._inner.bits())

    def round_queries(self, q: torch.Tensor) -> torch.Tensor:
        rotation = hadamard(key_rotation_size(q.shape[-1]))
        return rotated(self._inner.round_queries(rotated(q, rotation)), rotation)


def key_rotation_size(head_dim: int) -> int:
    """Size of the matrix that turns keys and queries of `head_dim` channels, a multiple of 64."""
    return head_dim & -head_dim  # the largest power of two that divides it
