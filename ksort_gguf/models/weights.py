"""Model weights as torch tensors, read one tensor at a time: in the type they have, or in float32 for calibration.

Dense types stay as stored; quantized types are expanded once, to f16 (their block scales are f16 numbers).
"""

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from tqdm import tqdm

from ksort_gguf.container.tensors import Tensor, is_finite
from ksort_gguf.models.source import Source
from ksort_gguf.models.spec import Block, Norm, Projection

_DENSE = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
_ROWS_AT_ONCE = 4096  # rows expanded at a time, so that the f32 copy stays small


@dataclass(frozen=True)
class BlockWeights:
    """One block. Shapes: d = head_dim, H and KH = query and KV heads, all matrices [outputs, inputs]."""

    attention_norm: torch.Tensor  # f32 [n_embd]
    qkv: torch.Tensor  # [(H + 2 KH) d, n_embd]: q, k, v rows
    qkv_bias: torch.Tensor | None  # f32 [(H + 2 KH) d]
    q_norm: torch.Tensor | None  # f32 [d]
    k_norm: torch.Tensor | None  # f32 [d]
    output: torch.Tensor  # [n_embd, H d]
    output_bias: torch.Tensor | None  # f32 [n_embd]
    mlp_norm: torch.Tensor  # f32 [n_embd]
    gate_up: torch.Tensor  # [2 n_ff, n_embd]: gate, up rows
    down: torch.Tensor  # [n_embd, n_ff]


@dataclass(frozen=True)
class ModelWeights:
    """A whole model."""

    embedding: torch.Tensor  # [n_vocab, n_embd]
    blocks: list[BlockWeights]
    output_norm: torch.Tensor  # f32 [n_embd]
    output: torch.Tensor  # [n_vocab, n_embd]; the embedding itself where the two are tied


class WeightReader:
    """Reads tensors of a source, each in the type it runs in, or in float32. Raises KsortError for NaN and infinity."""

    def __init__(self, source: Source, float32: bool = False, bar: tqdm | None = None):
        self._source, self._float32, self._bar = source, float32, bar

    def block(self, block: Block) -> BlockWeights:
        """All weights of a block."""
        a = block.attention
        return BlockWeights(
            attention_norm=self.gain(block.attention_norm),
            qkv=self._stacked(a.q, a.k, a.v),
            qkv_bias=self._stacked_bias(a.q, a.k, a.v),
            q_norm=None if a.q_norm is None else self.gain(a.q_norm),
            k_norm=None if a.k_norm is None else self.gain(a.k_norm),
            output=self._stacked(a.output),
            output_bias=self._stacked_bias(a.output),
            mlp_norm=self.gain(block.mlp_norm),
            gate_up=self._stacked(block.mlp.gate, block.mlp.up),
            down=self._stacked(block.mlp.down),
        )

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in the type it runs in."""
        entry = self._source.tensor(name)
        tensor = _float32(entry) if self._float32 else _as_torch(entry.read(), entry)
        if self._bar is not None:
            self._bar.update(entry.n_bytes)
        return tensor

    def gain(self, norm: Norm) -> torch.Tensor:
        """A norm's gain, float32."""
        return self.tensor(norm.gain).float()

    def _stacked(self, *projections: Projection) -> torch.Tensor:
        """Rows of several projections below each other, in the narrowest type that holds all of them."""
        names = dict.fromkeys(projection.weight for projection in projections)
        read = {name: self.tensor(name) for name in names}
        parts = [read[p.weight][p.start : p.start + p.n_out] for p in projections]
        if len(read) == 1 and sum(map(len, parts)) == len(next(iter(read.values()))):
            return next(iter(read.values()))  # fused in the file too
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return torch.cat([part.to(dtype) for part in parts])

    def _stacked_bias(self, *projections: Projection) -> torch.Tensor | None:
        """Their biases, float32; zeros where only some have one."""
        if all(projection.bias is None for projection in projections):
            return None
        return torch.cat(
            [
                torch.zeros(p.n_out) if p.bias is None else self.tensor(p.bias).float()[p.start : p.start + p.n_out]
                for p in projections
            ]
        )


def load_weights(source: Source) -> ModelWeights:
    """Read all weights of `source`, which shows progress where stderr is a terminal.

    Raises KsortError naming the file and the tensor.
    """
    spec = source.spec
    total = sum(t.n_bytes for t in source.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=None, leave=False) as bar:
        reader = WeightReader(source, bar=bar)
        embedding = reader.tensor(spec.embedding)
        return ModelWeights(
            embedding=embedding,
            blocks=[reader.block(block) for block in spec.blocks],
            output_norm=reader.gain(spec.output_norm),
            output=embedding if spec.output == spec.embedding else reader.tensor(spec.output),
        )


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


def _float32(entry: Tensor) -> torch.Tensor:
    """A tensor as float32, in memory of torch's own: aligned alike in each run, so that matrix products are too."""
    values = torch.empty(entry.shape)
    for start in range(0, entry.shape[0], _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, entry.shape[0])
        values[start:stop] = torch.from_numpy(entry.read_finite_f32(entry.read_rows(start, stop)))
    return values
