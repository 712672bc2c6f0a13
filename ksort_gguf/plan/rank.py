"""K-sort's ranking: which channels of a key head go together (arXiv 2403.20137, section 4)."""

import hashlib

import numpy as np

from ksort_gguf.container.tensors import Tensor
from ksort_gguf.models.rope import stock_tables
from ksort_gguf.models.source import Source
from ksort_gguf.models.spec import Attention
from ksort_gguf.plan.moments import LayerMoments


class ProjectionHash:
    """SHA-256 over a model's q and k projections, fed layer after layer: q weight, q bias, k weight, k bias.

    Each tensor that exists adds the ASCII line "name type d0xd1\\n" (numpy order) and then its encoded bytes.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, tensor: Tensor, raw: np.ndarray) -> None:
        """Add one tensor with its encoded bytes."""
        shape = "x".join(map(str, tensor.shape))
        self._sha.update(f"{tensor.name} {tensor.type.name} {shape}\n".encode())
        self._sha.update(raw.data)

    def text(self) -> str:
        """The hash of what was added so far, as "sha256:<hex>"."""
        return "sha256:" + self._sha.hexdigest()


def weights_hash(source: Source) -> str:
    """The hash of a stock model's projections, reading one tensor at a time. Raises KsortError."""
    digest = ProjectionHash()
    for attention in source.spec.attentions:
        for tensor in projections(source, attention):
            digest.add(tensor, tensor.read())
    return digest.text()


def projections(source: Source, attention: Attention) -> list[Tensor]:
    """The tensors that hold a layer's q and k rows: q weight, q bias, k weight, k bias, each once, where they exist."""
    names = (attention.q.weight, attention.q.bias, attention.k.weight, attention.k.bias)
    return [source.tensor(name) for name in dict.fromkeys(names) if name is not None]


def key_projection(source: Source, attention: Attention) -> tuple[np.ndarray, np.ndarray | None]:
    """Wk, float32 [n_kv_heads * head_dim, n_embd], and its bias or None, as the file has them. Raises KsortError."""
    k = attention.k
    tensor = source.tensor(k.weight)
    weight = tensor.read_finite_f32(tensor.read_rows(k.start, k.start + k.n_out))
    bias = None if k.bias is None else source.tensor(k.bias).read_finite_f32()[k.start : k.start + k.n_out]
    return weight, bias


def layer_order(source: Source, layer: int, rank: str, moments: LayerMoments) -> np.ndarray:
    """int32 [n_kv_heads, head_dim]: the channels of each key head by falling rank, ties by channel.

    moments: the layer's, for the rank "key-rms". Raises KsortError for non-finite tensors.
    """
    if rank == "key-rms":
        energies = np.einsum("hcc->hc", moments.k_second)
    else:
        energies = key_energies(source, layer, rank, *key_projection(source, source.spec.attentions[layer]))
    return np.argsort(-energies, axis=1, kind="stable").astype(np.int32)


def key_energies(source: Source, layer: int, rank: str, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """The squared rank of each key channel, float64 [n_kv_heads, head_dim], for rows in stock order.

    weight: Wk, float32 [n_kv_heads * head_dim, n_embd]; bias: float32 [n_kv_heads * head_dim] or None.
    """
    block = source.spec.blocks[layer]
    if rank == "weight-norm":
        return weight_energies(weight, block.attention)
    gain = source.tensor(block.attention_norm.gain).read_finite_f32()
    return effective_energies(weight, bias, gain, block.attention, source.spec.row_order)


def weight_energies(weight: np.ndarray, attention: Attention) -> np.ndarray:
    """Squared L2 norms of Wk's rows, as in the paper. weight: [n_kv_heads * head_dim, n_embd]. Returns float64."""
    return _row_energies(weight.astype(np.float64)).reshape(attention.n_kv_heads, attention.head_dim)


def effective_energies(
    weight: np.ndarray, bias: np.ndarray | None, gain: np.ndarray, attention: Attention, row_order: str
) -> np.ndarray:
    """Expected squared keys after RoPE, averaged over positions. Returns float64 [n_kv_heads, head_dim].

    The projection's input is gain * x with x of unit mean square (RMSNorm); for uncorrelated x of mean 0, channel c
    before RoPE has E[k_c^2] = sum_j (w_cj gain_j)^2 + bias_c^2. RoPE turns a pair (a, b) by an angle that runs through
    the circle as positions go by: k_a cos - k_b sin. Over a full turn cos^2 and sin^2 average to 1/2 and cos sin to 0,
    so both channels of the pair come to (E[k_a^2] + E[k_b^2]) / 2. Channels that are not rotated keep theirs.
    """
    energies = _row_energies(weight.astype(np.float64) * gain.astype(np.float64))
    if bias is not None:
        energies += bias.astype(np.float64) ** 2
    energies = energies.reshape(attention.n_kv_heads, attention.head_dim)
    n_rot = 0 if attention.rope is None else attention.rope.n_rot
    partner = stock_tables(attention.head_dim, n_rot, row_order).partner
    return (energies + energies[:, partner]) / 2


def _row_energies(weight: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", weight, weight)
