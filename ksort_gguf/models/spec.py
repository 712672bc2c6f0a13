"""What an architecture is, as data: read by the interpreters run_native.py, run_torch.py and run_variance.py.

A spec names every tensor that a model uses. A tensor that it does not name is refused, and so is a metadata key that
it does not read and that would change what the model computes (keys.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """y = x W^T + b: rows start .. start+n_out-1 of the tensor `weight`, and of `bias`, both under their GGUF names.

    Where several projections are fused into one tensor, each has its part of the rows.
    """

    weight: str
    n_out: int
    n_in: int
    bias: str | None = None
    start: int = 0
    rows: int = 0  # of the whole tensor; 0: n_out


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv 1910.07467): gain * x / sqrt(mean(x^2) + epsilon). `gain`: the tensor's name, [n]."""

    gain: str
    n: int
    epsilon: float


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of the first n_rot channels of a head (RoFormer, arXiv 2104.09864).

    Pair f turns by position * base^(-2f / n_rot) / linear_factor, divided by entry f of the tensor `factors` [n_rot/2],
    or of `long_factors` in contexts of more than `original_context` tokens. cos and sin are multiplied by `magnitude`.
    """

    n_rot: int
    base: float
    linear_factor: float = 1.0
    factors: str | None = None
    long_factors: str | None = None
    original_context: int = 0
    magnitude: float = 1.0


@dataclass(frozen=True)
class Attention:
    """softmax(scale q k^T) v, causal. Query head g reads KV head g // (n_heads / n_kv_heads)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    q: Projection
    k: Projection
    v: Projection
    output: Projection
    rope: Rope | None  # None: this layer knows no positions
    window: int = 0  # a token sees this many tokens, itself included; 0: all before it
    q_norm: Norm | None = None  # of every query head, before RoPE, with one gain for all heads
    k_norm: Norm | None = None


@dataclass(frozen=True)
class GatedMlp:
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    gate: Projection
    up: Projection
    down: Projection


@dataclass(frozen=True)
class Block:
    """One layer: x += residual_scale * attention(norm(x)), then x += residual_scale * mlp(norm(x))."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: GatedMlp
    residual_scale: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. Tensors are named as in a stock GGUF file of this architecture."""

    architecture: str  # general.architecture of a stock file
    row_order: str  # of rotated channels in the rows of q and k projections: see rope.py
    n_vocab: int  # rows of the embedding
    n_embd: int
    context_length: int  # tokens that the model was trained for
    embedding: str  # [n_vocab, n_embd]
    output_norm: Norm
    output: str  # [n_vocab, n_embd]; the embedding's name where the two are tied
    blocks: tuple[Block, ...]
    embedding_scale: float = 1.0  # embeddings are multiplied by it, logits by the other
    logit_scale: float = 1.0

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def attentions(self) -> list[Attention]:
        """Of each layer."""
        return [block.attention for block in self.blocks]

    @property
    def min_head_dim(self) -> int:
        """The smallest head dimension of any layer."""
        return min(attention.head_dim for attention in self.attentions)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape (rows first) of every tensor that the model uses."""
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (self.n_vocab, self.n_embd)}
        shapes[self.output] = (self.n_vocab, self.n_embd)
        for norm in self._norms():
            shapes[norm.gain] = (norm.n,)
        for block in self.blocks:
            for projection in projections(block):
                rows = projection.rows or projection.n_out
                shapes[projection.weight] = (rows, projection.n_in)
                if projection.bias is not None:
                    shapes[projection.bias] = (rows,)
            if (rope := block.attention.rope) is not None:
                for name in (rope.factors, rope.long_factors):
                    if name is not None:
                        shapes[name] = (rope.n_rot // 2,)
        return shapes

    def _norms(self) -> Iterator[Norm]:
        yield self.output_norm
        for block in self.blocks:
            for norm in (block.attention_norm, block.attention.q_norm, block.attention.k_norm, block.mlp_norm):
                if norm is not None:
                    yield norm


def projections(block: Block) -> tuple[Projection, ...]:
    """All matrices of a block, in the order that they are applied."""
    a, m = block.attention, block.mlp
    return (a.q, a.k, a.v, a.output, m.gate, m.up, m.down)
