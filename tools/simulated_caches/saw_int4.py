"""SAW-INT4: 4 bits by token behind a block-diagonal Hadamard rotation of keys.

Source: arXiv 2604.19157 and the authors' code (togethercomputer/saw-int4, README.md and docs/02-bdr-inference.md;
SGLang, srt/mem_cache/kv_quant_kernels.py): each head of a token has a grid of 16 points from its least to its largest
value, with a scale and a zero point; keys after RoPE and queries are rotated by Hadamard matrices, HADAMARD_ORDER
channels at a time (16, 64 or 128 by model); values are not rotated (ROTATE_V=0, the recommended recipe). Here the order
is the largest that divides the head, up to 128. Scale and zero point take 16 bits each, which makes the paper's 4.25
bits at a head dimension of 128, and 4.5 at 64; the zero point is the least value itself, rounded to f16.
"""

from .scheme import LayerTensors, Scheme, Side, Stored, hadamard, rotated, uniform

_N_BITS = 4
_SCALE_BITS = 32
_LARGEST_ORDER = 128


class SawInt4(Scheme):
    """SAW-INT4 on keys or values."""

    name = "saw-int4"

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        head_dim = x.shape[-1]
        if side == "v":
            decoded = uniform(x, _N_BITS, dim=-1)
        else:
            rotation = hadamard(min(head_dim & -head_dim, _LARGEST_ORDER))
            decoded = rotated(uniform(rotated(x, rotation), _N_BITS, dim=-1), rotation)
        return Stored(decoded, _N_BITS + _SCALE_BITS / head_dim)
