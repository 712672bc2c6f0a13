"""What the converter and the runner need to know of a model architecture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import gguf

from ksort_gguf.cache_types import MAX_HEAD_DIM, Keys
from ksort_gguf.errors import KsortError

MAX_LAYERS = 1024  # several times what exists; more is a damaged file, refused before anything is counted up to it
_BIASED_PARTS = ("attn_q", "attn_k", "attn_v")
_LAYER_PARTS = ("attn_norm", *_BIASED_PARTS, "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a model, read from GGUF metadata (stock or folded)."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_rot: int  # rotated channels of a head
    context_length: int
    rms_epsilon: float
    rope_base: float
    rope_scaling: str  # "none" or "linear"
    rope_factor: float  # positions are divided by it when rope_scaling is "linear"
    window: int  # sliding attention window in tokens, 0 for none


@dataclass(frozen=True)
class Family:
    """One model architecture: names, row order of Wq and Wk in its stock GGUF files."""

    name: str  # general.architecture of a stock file
    arch: gguf.MODEL_ARCH
    hf_architectures: tuple[str, ...]  # "architectures" in config.json
    row_order: str  # of q and k rows in a stock GGUF: see families/rope.py
    hf_row_order: str = "half"
    biases: str = "optional"  # of the q, k and v projections: "optional" or "required"
    output_bias: bool = False  # whether the attention output projection may have one too
    extra_keys: tuple[str, ...] = ()  # hyperparameters that llama.cpp's converter writes for this family only

    def required_tensors(self, n_layers: int) -> list[str]:
        """GGUF names of the tensors that every model of this family has."""
        names = ["token_embd.weight", "output_norm.weight"]
        for layer in range(n_layers):
            names += [f"blk.{layer}.{part}.weight" for part in _LAYER_PARTS]
            if self.biases == "required":
                names += [f"blk.{layer}.{part}.bias" for part in _BIASED_PARTS]
        return names

    def optional_tensors(self, n_layers: int) -> list[str]:
        """GGUF names of the tensors that a model may have: without output.weight the embedding serves for both."""
        names = ["output.weight", "rope_freqs.weight"]
        parts = (_BIASED_PARTS if self.biases == "optional" else ()) + (("attn_output",) if self.output_bias else ())
        return names + [f"blk.{layer}.{part}.bias" for layer in range(n_layers) for part in parts]

    def shapes(self, geometry: Geometry, n_vocab: int, n_ff: int) -> dict[str, tuple[int, ...]]:
        """The shape (rows first) of every tensor that a model of this family has or may have."""
        g = geometry
        n_q, n_kv = g.n_heads * g.head_dim, g.n_kv_heads * g.head_dim
        shapes = {
            "token_embd.weight": (n_vocab, g.n_embd),
            "output_norm.weight": (g.n_embd,),
            "output.weight": (n_vocab, g.n_embd),
            "rope_freqs.weight": (g.n_rot // 2,),
        }
        layer_shapes = {
            "attn_norm.weight": (g.n_embd,),
            "attn_q.weight": (n_q, g.n_embd),
            "attn_k.weight": (n_kv, g.n_embd),
            "attn_v.weight": (n_kv, g.n_embd),
            "attn_q.bias": (n_q,),
            "attn_k.bias": (n_kv,),
            "attn_v.bias": (n_kv,),
            "attn_output.weight": (g.n_embd, n_q),
            "attn_output.bias": (g.n_embd,),
            "ffn_norm.weight": (g.n_embd,),
            "ffn_gate.weight": (n_ff, g.n_embd),
            "ffn_up.weight": (n_ff, g.n_embd),
            "ffn_down.weight": (g.n_embd, n_ff),
        }
        for layer in range(g.n_layers):
            shapes |= {f"blk.{layer}.{part}": shape for part, shape in layer_shapes.items()}
        return shapes

    def q_tensors(self, layer: int) -> tuple[str, str]:
        """GGUF names of the layer's query projection: weight, bias (the bias may be absent)."""
        return f"blk.{layer}.attn_q.weight", f"blk.{layer}.attn_q.bias"

    def k_tensors(self, layer: int) -> tuple[str, str]:
        """GGUF names of the layer's key projection: weight, bias (the bias may be absent)."""
        return f"blk.{layer}.attn_k.weight", f"blk.{layer}.attn_k.bias"

    def input_norm(self, layer: int) -> str:
        """GGUF name of the RMSNorm gain in front of the q and k projections."""
        return f"blk.{layer}.attn_norm.weight"

    def geometry(self, metadata: Mapping[str, object], file: str) -> Geometry:
        """Read the geometry from plain metadata values. Raises KsortError naming `file` and the key."""
        prefix = str(metadata.get("general.architecture", self.name))

        def get(key: str, default=None):
            value = metadata.get(f"{prefix}.{key}", default)
            if value is None:
                raise KsortError(f"{file}: missing key {prefix}.{key}: the file is incomplete, convert it again")
            return value

        def count(key: str, default=None) -> int:
            value = get(key, default)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise KsortError(
                    f"{file}: key {prefix}.{key} is {value!r}, expected one positive integer for all layers"
                )
            return value

        def number(key: str, default=None) -> float:
            value = get(key, default)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise KsortError(f"{file}: key {prefix}.{key} is {value!r}, expected a number, zero or more")
            return float(value)

        n_layers = count("block_count")
        if n_layers > MAX_LAYERS:
            raise KsortError(f"{file}: key {prefix}.block_count is {n_layers}, expected at most {MAX_LAYERS}")
        n_embd, n_heads = count("embedding_length"), count("attention.head_count")
        n_kv_heads = count("attention.head_count_kv", n_heads)
        head_dim = count("attention.key_length", n_embd // n_heads)
        if count("attention.value_length", head_dim) != head_dim:
            raise KsortError(f"{file}: value heads of another size than key heads are not supported")
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            raise KsortError(f"{file}: head dimension {head_dim} is not an even number up to {MAX_HEAD_DIM}")
        if n_heads % n_kv_heads:
            raise KsortError(f"{file}: {n_heads} query heads do not divide into {n_kv_heads} key heads")
        n_rot = count("rope.dimension_count", head_dim)
        if n_rot % 2 or n_rot > head_dim:
            raise KsortError(f"{file}: {n_rot} rotated channels do not fit a head of {head_dim}")
        scaling = str(get("rope.scaling.type", "none"))
        if scaling not in ("none", "linear"):
            raise KsortError(
                f"{file}: RoPE scaling {scaling!r} is not supported (none, linear, and llama3's rope_freqs are)"
            )
        rope_base = number("rope.freq_base", 10000.0)
        if rope_base == 0:
            raise KsortError(f"{file}: key {prefix}.rope.freq_base is 0: the file is damaged, get it again")
        return Geometry(
            n_layers=n_layers,
            n_embd=n_embd,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            n_rot=n_rot,
            context_length=count("context_length"),
            rms_epsilon=number("attention.layer_norm_rms_epsilon"),
            rope_base=rope_base,
            rope_scaling=scaling,
            rope_factor=number("rope.scaling.factor", 1.0) or 1.0,  # llama.cpp's rule: 0 means no scaling
            window=int(number("attention.sliding_window", 0)),
        )


def base_architecture(architecture: str) -> str:
    """The stock architecture behind `architecture`, folded or not."""
    return architecture.removeprefix(Keys.FOLDED_PREFIX)
