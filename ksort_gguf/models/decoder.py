"""The common shape of today's decoders, from metadata: families name only where they differ."""

from collections.abc import Callable
from dataclasses import dataclass

from ksort_gguf.errors import UnsupportedModelError
from ksort_gguf.models.family import Shapes
from ksort_gguf.models.keys import ModelKeys
from ksort_gguf.models.spec import Attention, Block, GatedMlp, ModelSpec, Norm, Projection, Rope
from ksort_gguf.names import MAX_HEAD_DIM, MAX_LAYERS, base_architecture


@dataclass(frozen=True)
class Differences:
    """How a family differs from Llama: RMSNorm, q, k and v apart, SwiGLU, RoPE on every layer."""

    required_biases: tuple[str, ...] = ()  # of "q", "k", "v", "output"
    optional_biases: tuple[str, ...] = ()  # used where the file has them
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE, one gain for all heads
    fused: bool = False  # attn_qkv holds q, k and v; ffn_up holds gate and up
    longrope: bool = False  # RoPE factors may differ between short and long contexts
    has_rope: Callable[[int], bool] = lambda layer: True
    multipliers: bool = False  # of embeddings, attention, residuals and logits, by metadata


def decoder(keys: ModelKeys, shapes: Shapes, *, row_order: str, differences: Differences) -> ModelSpec:
    """The spec of a file. Raises KsortError naming the file and the key, UnsupportedModelError for other shapes."""
    n_layers, file = keys.count("block_count"), keys.file
    if n_layers > MAX_LAYERS:
        raise UnsupportedModelError(f"{file}: key block_count is {n_layers}, expected at most {MAX_LAYERS}")
    n_embd, epsilon = keys.count("embedding_length"), keys.number("attention.layer_norm_rms_epsilon")
    builder = _Builder(keys, shapes, differences, n_embd, epsilon)
    output = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    multipliers = differences.multipliers
    return ModelSpec(
        architecture=base_architecture(keys.architecture),
        row_order=row_order,
        n_vocab=shapes.get("token_embd.weight", (0,))[0],
        n_embd=n_embd,
        context_length=keys.count("context_length"),
        embedding="token_embd.weight",
        output_norm=Norm("output_norm.weight", n_embd, epsilon),
        output=output,
        blocks=tuple(builder.block(layer) for layer in range(n_layers)),
        embedding_scale=(keys.number("embedding_scale", 1.0) or 1.0) if multipliers else 1.0,
        logit_scale=1 / keys.positive("logit_scale") if multipliers else 1.0,
    )


class _Builder:
    """Blocks of one file; what all have in common is read once."""

    def __init__(self, keys: ModelKeys, shapes: Shapes, differences: Differences, n_embd: int, epsilon: float):
        self._shapes, self._d, self._n_embd, self._epsilon = shapes, differences, n_embd, epsilon
        self._n_heads = keys.count("attention.head_count")
        self._n_kv_heads = keys.count("attention.head_count_kv", self._n_heads)
        self._head_dim = keys.count("attention.key_length", n_embd // self._n_heads)
        self._check_heads(keys)
        up = "blk.0.ffn_up.weight"
        in_file = shapes[up][0] // (2 if differences.fused else 1) if up in shapes else None
        self._n_ff = keys.count("feed_forward_length", in_file)
        self._window = int(keys.number("attention.sliding_window", 0))
        self._rope = rope(keys, shapes, self._head_dim, differences.longrope)
        self._scale, self._residual_scale = self._head_dim**-0.5, 1.0
        if differences.multipliers:
            self._scale = keys.number("attention.scale", 0) or self._scale
            self._residual_scale = keys.number("residual_scale", 0) or 1.0

    def _check_heads(self, keys: ModelKeys) -> None:
        head_dim, file = self._head_dim, keys.file
        if keys.count("attention.value_length", head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{file}: value heads of another size than key heads (attention.value_length) are not supported"
            )
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            raise UnsupportedModelError(f"{file}: head dimension {head_dim} is not an even number up to {MAX_HEAD_DIM}")
        if self._n_heads % self._n_kv_heads:
            raise UnsupportedModelError(
                f"{file}: {self._n_heads} query heads do not divide into {self._n_kv_heads} key heads"
            )

    def block(self, layer: int) -> Block:
        """The spec of one layer."""
        return Block(
            attention_norm=Norm(f"blk.{layer}.attn_norm.weight", self._n_embd, self._epsilon),
            attention=self._attention(layer),
            mlp_norm=Norm(f"blk.{layer}.ffn_norm.weight", self._n_embd, self._epsilon),
            mlp=self._mlp(layer),
            residual_scale=self._residual_scale,
        )

    def _attention(self, layer: int) -> Attention:
        d = self._head_dim
        n_q, n_kv = self._n_heads * d, self._n_kv_heads * d
        parts = {"q": (n_q, 0), "k": (n_kv, n_q), "v": (n_kv, n_q + n_kv)}
        q, k, v = (
            self._projection(layer, part, "attn_qkv" if self._d.fused else f"attn_{part}", n, self._n_embd, start)
            for part, (n, start) in parts.items()
        )
        norms = {
            f"{part}_norm": Norm(f"blk.{layer}.attn_{part}_norm.weight", d, self._epsilon)
            for part in (("q", "k") if self._d.qk_norm else ())
        }
        return Attention(
            n_heads=self._n_heads,
            n_kv_heads=self._n_kv_heads,
            head_dim=d,
            scale=self._scale,
            q=q,
            k=k,
            v=v,
            output=self._projection(layer, "output", "attn_output", self._n_embd, n_q),
            rope=self._rope if self._d.has_rope(layer) else None,
            window=self._window,
            **norms,
        )

    def _projection(self, layer: int, part: str, name: str, n_out: int, n_in: int, start: int = 0) -> Projection:
        bias: str | None = f"blk.{layer}.{name}.bias"
        is_used = part in self._d.required_biases or (part in self._d.optional_biases and bias in self._shapes)
        rows = (self._n_heads + 2 * self._n_kv_heads) * self._head_dim if name == "attn_qkv" else n_out
        offset = start if name == "attn_qkv" else 0
        return Projection(f"blk.{layer}.{name}.weight", n_out, n_in, bias if is_used else None, offset, rows)

    def _mlp(self, layer: int) -> GatedMlp:
        n_ff, n_embd, name = self._n_ff, self._n_embd, f"blk.{layer}.ffn_"
        down = Projection(f"{name}down.weight", n_embd, n_ff)
        if self._d.fused:
            gate, up = (Projection(f"{name}up.weight", n_ff, n_embd, start=start, rows=2 * n_ff) for start in (0, n_ff))
        else:
            gate, up = (Projection(f"{name}{part}.weight", n_ff, n_embd) for part in ("gate", "up"))
        return GatedMlp(gate, up, down)


def rope(keys: ModelKeys, shapes: Shapes, head_dim: int, longrope: bool) -> Rope:
    """RoPE as metadata and tensors say it. Raises UnsupportedModelError for yarn and other scaling."""
    file = keys.file
    n_rot = keys.count("rope.dimension_count", head_dim)
    if n_rot % 2 or n_rot > head_dim:
        raise UnsupportedModelError(f"{file}: {n_rot} rotated channels do not fit a head of {head_dim}")
    # llama.cpp's defaults: a factor without a type is linear scaling, and 0 means none
    scaling, factor = keys.text("rope.scaling.type", "linear"), keys.number("rope.scaling.factor", 1.0) or 1.0
    supported = ("none", "linear", *(("longrope",) if longrope else ()))
    if scaling not in supported:
        raise UnsupportedModelError(
            f"{file}: RoPE scaling {scaling!r} is not supported ({', '.join(supported)}, and llama3's rope_freqs are)"
        )
    factors = "rope_freqs.weight" if "rope_freqs.weight" in shapes else None
    long_factors, magnitude = None, 1.0
    original_context = int(keys.number("rope.scaling.original_context_length", 0))
    if longrope:
        magnitude = keys.positive("rope.scaling.attn_factor", 1.0)
        if "rope_factors_long.weight" in shapes or "rope_factors_short.weight" in shapes:
            factors, long_factors = "rope_factors_short.weight", "rope_factors_long.weight"
            original_context = keys.count("rope.scaling.original_context_length")
    return Rope(
        n_rot=n_rot,
        base=keys.positive("rope.freq_base", 10000.0),
        linear_factor=factor if scaling == "linear" else 1.0,
        factors=factors,
        long_factors=long_factors,
        original_context=original_context,
        magnitude=magnitude,
    )
