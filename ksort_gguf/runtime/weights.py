"""Model weights as torch tensors, read from a GGUF one tensor at a time, folded on load where a plan file asks for it.

Dense types stay as stored; quantized types are expanded once, to f16 (their block scales are f16 numbers).
"""

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from tqdm import tqdm

from ksort_gguf.errors import KsortError
from ksort_gguf.plan.fold import fold_rows
from ksort_gguf.plan.kplan import KPlan
from ksort_gguf.sources.base import Source, Tensor, is_finite

_DENSE = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_ROWS_AT_ONCE = 4096  # rows expanded at a time, so that the f32 copy stays small


@dataclass(frozen=True)
class LayerWeights:
    """One block. Shapes: d = head_dim, H and KH = query and KV heads, all matrices [outputs, inputs]."""

    attn_norm: torch.Tensor  # f32 [n_embd]
    qkv: torch.Tensor  # [(H + 2 KH) d, n_embd]: q, k, v rows
    qkv_bias: torch.Tensor | None  # f32 [(H + 2 KH) d]
    attn_output: torch.Tensor  # [n_embd, H d]
    attn_output_bias: torch.Tensor | None  # f32 [n_embd]
    ffn_norm: torch.Tensor  # f32 [n_embd]
    gate_up: torch.Tensor  # [2 n_ff, n_embd]: gate, up rows
    down: torch.Tensor  # [n_embd, n_ff]


@dataclass(frozen=True)
class ModelWeights:
    """A whole model."""

    embedding: torch.Tensor  # [n_vocab, n_embd]
    layers: list[LayerWeights]
    output_norm: torch.Tensor  # f32 [n_embd]
    output: torch.Tensor  # [n_vocab, n_embd]; the embedding itself where the two are tied
    rope_factors: torch.Tensor | None  # f32 [n_rot / 2], each frequency is divided by its factor


class _Reader:
    """Reads tensors of a source by name, folding q and k rows with `plan`."""

    def __init__(self, source: Source, plan: KPlan | None, bar: tqdm):
        self._source, self._plan, self._bar = source, plan, bar

    def has(self, name: str) -> bool:
        return name in self._source.tensors

    def tensor(self, name: str, shape: tuple[int, ...], layer: int | None = None) -> torch.Tensor:
        """The tensor in the type it runs in. With `layer`, its rows are q or k rows, folded with that layer's order.

        Raises KsortError if it is missing, of another shape, or holds NaN or infinity.
        """
        entry = self._source.tensor(name)
        if entry.shape != shape:
            raise KsortError(
                f"{self._source.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}"
            )
        raw = entry.read()
        if layer is not None and self._plan is not None and self._plan.order is not None:
            raw = fold_rows(raw, shape, self._plan.order[layer], shape[0] // self._source.geometry.head_dim)
        self._bar.update(entry.n_bytes)
        return _as_torch(raw, entry)

    def vector(self, name: str, n: int, layer: int | None = None) -> torch.Tensor:
        return self.tensor(name, (n,), layer).float()

    def optional_vector(self, name: str, n: int, layer: int | None = None) -> torch.Tensor | None:
        return self.vector(name, n, layer) if self.has(name) else None


def _as_torch(raw: np.ndarray, entry: Tensor) -> torch.Tensor:
    """`raw`, all bytes of `entry`, in the type it runs in. Raises KsortError for NaN and infinity."""
    if entry.type in _DENSE:
        if not is_finite(raw, entry.type):
            raise entry.non_finite()
        return torch.from_numpy(raw).view(_DENSE[entry.type]).reshape(entry.shape)
    rows = raw.reshape(entry.shape[0], -1)
    out = torch.empty(entry.shape, dtype=torch.float16)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = entry.decode(rows[start : start + _ROWS_AT_ONCE].reshape(-1))
        if not np.isfinite(part).all():
            raise entry.non_finite()
        out[start : start + _ROWS_AT_ONCE] = torch.from_numpy(part)
    return out


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of several matrices below each other, in the narrowest type that holds all of them."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return torch.cat([part.to(dtype) for part in parts])


def load_weights(source: Source, plan: KPlan | None, progress: bool = True) -> ModelWeights:
    """Read all weights of `source`. `plan` folds a stock source on load; None where it is folded already, or stays so.

    Raises KsortError naming the file and the tensor that is missing or has another shape than the metadata say.
    """
    geometry = source.geometry
    total = sum(t.n_bytes for t in source.tensors.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", disable=None if progress else True, leave=False
    ) as bar:
        reader = _Reader(source, plan, bar)
        n_vocab = source.tensor("token_embd.weight").shape[0]
        embedding = reader.tensor("token_embd.weight", (n_vocab, geometry.n_embd))
        tied = not reader.has("output.weight")
        return ModelWeights(
            embedding=embedding,
            layers=[_load_layer(reader, source, layer) for layer in range(geometry.n_layers)],
            output_norm=reader.vector("output_norm.weight", geometry.n_embd),
            output=embedding if tied else reader.tensor("output.weight", (n_vocab, geometry.n_embd)),
            rope_factors=reader.optional_vector("rope_freqs.weight", geometry.n_rot // 2),
        )


def _load_layer(reader: _Reader, source: Source, layer: int) -> LayerWeights:
    g, block = source.geometry, f"blk.{layer}"
    q_weight, q_bias = source.family.q_tensors(layer)
    k_weight, k_bias = source.family.k_tensors(layer)
    n_q, n_kv = g.n_heads * g.head_dim, g.n_kv_heads * g.head_dim
    n_ff = source.tensor(f"{block}.ffn_gate.weight").shape[0]
    qkv = [
        reader.tensor(q_weight, (n_q, g.n_embd), layer),
        reader.tensor(k_weight, (n_kv, g.n_embd), layer),
        reader.tensor(f"{block}.attn_v.weight", (n_kv, g.n_embd)),
    ]
    biases = [
        reader.optional_vector(q_bias, n_q, layer),
        reader.optional_vector(k_bias, n_kv, layer),
        reader.optional_vector(f"{block}.attn_v.bias", n_kv),
    ]
    qkv_bias = None
    if any(b is not None for b in biases):
        qkv_bias = torch.cat(
            [b if b is not None else torch.zeros(n) for b, n in zip(biases, (n_q, n_kv, n_kv), strict=True)]
        )
    return LayerWeights(
        attn_norm=reader.vector(f"{block}.attn_norm.weight", g.n_embd),
        qkv=_stack(qkv),
        qkv_bias=qkv_bias,
        attn_output=reader.tensor(f"{block}.attn_output.weight", (g.n_embd, n_q)),
        attn_output_bias=reader.optional_vector(f"{block}.attn_output.bias", g.n_embd),
        ffn_norm=reader.vector(f"{block}.ffn_norm.weight", g.n_embd),
        gate_up=_stack([reader.tensor(f"{block}.ffn_{part}.weight", (n_ff, g.n_embd)) for part in ("gate", "up")]),
        down=reader.tensor(f"{block}.ffn_down.weight", (g.n_embd, n_ff)),
    )
