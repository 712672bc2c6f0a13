"""What a simulated cache is: a scheme that says how one side (keys or values) of one attention layer is stored.

A scheme computes what a reader of the cache would decode, in float32 and without packing, and counts the bits that the
packed cache would take. Shapes: n tokens, head_dim channels, heads first, so that a token's head is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ksort_gguf.errors import KsortError

Side = Literal["k", "v"]
EXACT_BITS = 16  # what sources call full precision: f16


@dataclass(frozen=True)
class LayerTensors:
    """Queries, keys and values of one attention layer for a whole text from position 0, float32."""

    q: torch.Tensor  # [n_heads, n, head_dim], after RoPE
    k: torch.Tensor  # [n_kv_heads, n, head_dim], after RoPE
    k_before_rope: torch.Tensor  # [n_kv_heads, n, head_dim]
    v: torch.Tensor  # [n_kv_heads, n, head_dim]
    apply_rope: Callable[[torch.Tensor], torch.Tensor]  # [n_kv_heads, n, head_dim] before RoPE -> after
    score_scale: float  # scores are score_scale * q . k

    def side(self, side: Side) -> torch.Tensor:
        """Keys after RoPE, or values."""
        return self.k if side == "k" else self.v

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """q, k, k_before_rope, v."""
        return self.q, self.k, self.k_before_rope, self.v


@dataclass(frozen=True)
class Stored:
    """One side of a layer's cache, as queries find it.

    Causality: the query at position t finds tokens 0 .. n_decoded[t] - 1 as `decoded`, the later ones, up to its own,
    as they are in f16. What `decoded` holds of those tokens may depend on any token up to t, and on nothing later.
    `n_decoded` None stands for t + 1: each token's storage depends on that token (and on a calibration text) alone.
    """

    decoded: torch.Tensor  # [n_kv_heads, n, head_dim] float32
    bits: float  # mean bits per value: scales, indices and exact tokens included, as the later half of queries find it
    n_decoded: torch.Tensor | None = None  # int64 [n]


class Scheme:
    """How one side of a layer's cache is stored."""

    name: str
    needs_calibration = False  # whether `fit` must be called, with tensors of another text

    def check(self, head_dim: int) -> None:
        """Raise KsortError for a head dimension that the source cannot store."""

    def fit(self, sample: LayerTensors, side: Side) -> "Scheme":
        """This scheme with the constants of one layer and side, learnt from `sample`."""
        return self

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        """That side of the layer as stored."""
        raise NotImplementedError

    def round_queries(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [n_heads, n, head_dim] as the source multiplies them with stored keys."""
        return q


class Exact(Scheme):
    """A float type, every value rounded by itself."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.name, self._dtype = name, dtype

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        return Stored(layer.side(side).to(self._dtype).float(), torch.finfo(self._dtype).bits)


class BlockFormat(Scheme):
    """A format whose blocks of neighbouring channels of one token are stored by themselves."""

    block_size: int

    def check(self, head_dim: int) -> None:
        check_blocks(self.name, self.block_size, head_dim)

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        return Stored(self.decode(x.unflatten(-1, (-1, self.block_size))).flatten(-2), self.bits())

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """What is read back of float32 blocks [..., block_size]."""
        raise NotImplementedError

    def bits(self) -> float:
        """Bits per value, scales included."""
        raise NotImplementedError


def check_blocks(name: str, size: int, head_dim: int) -> None:
    """Raise KsortError naming the type unless blocks of `size` channels divide a head."""
    if head_dim % size:
        raise KsortError(f"--types {name}: blocks of {size} do not divide the head dimension {head_dim}: leave it out")


def hadamard(n: int) -> torch.Tensor:
    """The orthonormal, symmetric Walsh-Hadamard matrix [n, n] in Sylvester's order. `n` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """`x` [..., head_dim], every run of len(rotation) channels multiplied by `rotation` [m, m]."""
    return (x.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)


def round_half_away(x: torch.Tensor) -> torch.Tensor:
    """C's roundf."""
    floor = x.abs().floor()
    return torch.sign(x) * (floor + (x.abs() - floor >= 0.5))


def with_recent(decoded: torch.Tensor, exact: torch.Tensor, n_decoded: torch.Tensor, bits: float) -> Stored:
    """Storage of which the last tokens are still exact.

    decoded: [n_kv_heads, n_stored, head_dim], at `bits` a value. exact: all n tokens. n_decoded: as in Stored.
    Bits are the mean over the queries of the text's second half, those that perplexity scores: a window that happens
    to be empty after the last token was not empty for them.
    """
    n = exact.shape[1]
    tokens = torch.arange(n)[n // 2 :] + 1
    stored_share = float((n_decoded[n // 2 :] / tokens).mean())
    mean_bits = stored_share * bits + (1 - stored_share) * EXACT_BITS
    return Stored(torch.cat([decoded, exact[:, decoded.shape[1] :].half().float()], 1), mean_bits, n_decoded)


def outlier_mask(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """bool like `vectors` [..., m]: the `count` largest and the `count` smallest values of each vector."""
    mask = torch.zeros_like(vectors, dtype=torch.bool)
    for largest in (True, False):
        mask.scatter_(-1, vectors.topk(count, dim=-1, largest=largest).indices, True)
    return mask


def uniform(x: torch.Tensor, n_bits: int, dim: int) -> torch.Tensor:
    """`x` on a grid of 2^n_bits points from its least to its largest value along `dim`; scale and zero point in f16."""
    if x.numel() == 0:
        return x  # amin of nothing is an error
    return on_grid(x, 2**n_bits, x.amin(dim, keepdim=True), x.amax(dim, keepdim=True))


def on_grid(x: torch.Tensor, n_points: float | torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """`x` on grids of n_points (a number or a tensor) from `low` to `high`, which broadcast against x.

    q * scale + zero, q = round((x - zero) / scale) clamped to the grid; scale and zero point in f16.
    """
    low = low.half().float()
    scale = ((high - low) / (n_points - 1)).half().float()
    steps = torch.where(scale > 0, (x - low) / scale, 0.0)
    return torch.minimum(steps.round().clamp(min=0), torch.as_tensor(n_points - 1.0)) * scale + low
