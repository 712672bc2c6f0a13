"""What a simulated cache is: a scheme that says how one side (keys or values) of one attention layer is stored.

A scheme computes what a reader of the cache would decode, in float32 and without packing, and counts the bits that the
packed cache would take. Shapes: n tokens, head_dim channels, heads first, so that a token's head is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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

    Causality: the query at position t finds tokens n_sinks .. n_decoded[t] - 1 as `decoded`, the first n_sinks and the
    later ones, up to its own, as they are in f16. What `decoded` holds of those tokens may depend on any token up to t,
    and on nothing later. `n_decoded` None stands for t + 1: each token's storage depends on that token (and on a
    calibration text) alone.
    """

    decoded: torch.Tensor  # [n_kv_heads, n, head_dim] float32
    token_bits: float  # mean bits per value of a token that is not in f16: scales, indices and outliers included
    n_decoded: torch.Tensor | None = None  # int64 [n]
    n_sinks: int = 0

    @property
    def bits(self) -> float:
        """Mean bits per value, exact tokens included, over the queries of the text's second half.

        Those are the queries that perplexity scores: a window that happens to be empty after the last token was not
        empty for them.
        """
        n = self.decoded.shape[1]
        found = torch.arange(n // 2, n) + 1
        n_decoded = found if self.n_decoded is None else self.n_decoded[n // 2 :]
        stored_share = float(((n_decoded - self.n_sinks).clamp(min=0) / found).mean())
        return stored_share * self.token_bits + (1 - stored_share) * EXACT_BITS

    def with_exact(self, tail: int, n_sinks: int) -> "Stored":
        """The same, but each query finds the newest `tail` tokens, its own included, and the first n_sinks in f16."""
        n_decoded = self.n_decoded
        if tail:
            before_tail = (torch.arange(self.decoded.shape[1]) + 1 - tail).clamp(min=0)
            n_decoded = before_tail if n_decoded is None else torch.minimum(n_decoded, before_tail)
        return replace(self, n_decoded=n_decoded, n_sinks=max(n_sinks, self.n_sinks))


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

    def in_layer(self, layer: int, n_layers: int) -> "Scheme":
        """What the source does in one layer of a model."""
        return self

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


def check_power_of_two(name: str, head_dim: int) -> None:
    """Raise KsortError naming the type unless one Hadamard matrix turns a whole head."""
    if head_dim & (head_dim - 1):
        raise KsortError(f"--types {name}: the head dimension {head_dim} is not a power of two: leave it out")


def hadamard(n: int) -> torch.Tensor:
    """The orthonormal, symmetric Walsh-Hadamard matrix [n, n] in Sylvester's order. `n` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


def random_hadamard(n: int) -> torch.Tensor:
    """A Walsh-Hadamard matrix [n, n] whose rows have random signs, the same in every run; orthonormal."""
    signs = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * hadamard(n)


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """`x` [..., head_dim], every run of len(rotation) channels multiplied by `rotation` [m, m]."""
    return (x.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)


def round_half_away(x: torch.Tensor) -> torch.Tensor:
    """C's roundf."""
    floor = x.abs().floor()
    return torch.sign(x) * (floor + (x.abs() - floor >= 0.5))


def with_recent(decoded: torch.Tensor, exact: torch.Tensor, n_decoded: torch.Tensor, token_bits: float) -> Stored:
    """Storage of which the last tokens are still exact.

    decoded: [n_kv_heads, n_stored, head_dim]. exact: all n tokens. n_decoded, token_bits: as in Stored.
    """
    return Stored(torch.cat([decoded, exact[:, decoded.shape[1] :]], 1), token_bits, n_decoded)


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
