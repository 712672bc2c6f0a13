"""What a backend, a running context, its cache and its attention offer, whatever they run on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.cache.rope_table import RopeTable
from ksort_gguf.kvplan import RopeTables, Transform
from ksort_gguf.names import CACHE_TYPES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CacheOptions:
    """How keys, values and queries are stored. `query_type` "f32" keeps queries as they are.

    Beside BFP types the newest `exact_tail` tokens that a query sees and the first `exact_sinks` are kept in f16, too;
    beside those of more than 4 bits only `exact_everywhere`.
    """

    k_type: str
    v_type: str
    block_size: int  # of keys and values where they are BFP, and of BFP16 queries
    query_type: str
    exact_tail: int = 0
    exact_sinks: int = 0
    exact_everywhere: bool = True

    def has_exact(self, type_name: str) -> bool:
        """Whether keys or values of this type have exact rows."""
        cache_type = CACHE_TYPES[type_name]
        is_theirs = cache_type.is_small or (cache_type.is_bfp and self.exact_everywhere)
        return is_theirs and (self.exact_tail > 0 or self.exact_sinks > 0)

    @property
    def has_blocks(self) -> bool:
        """Whether keys or values are stored in BFP."""
        return CACHE_TYPES[self.k_type].is_bfp or CACHE_TYPES[self.v_type].is_bfp


@dataclass(frozen=True)
class HeadShape:
    """The heads of one layer: softmax(scale q k^T) v, causal, over the last `window` tokens (0: all)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    window: int

    @property
    def qkv_width(self) -> int:
        """Values in a row of queries, keys and values."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What happens to one layer's heads: RoPE, and the plan's transforms for BFP types."""

    heads: HeadShape
    rope: RopeTables  # [n_kv_heads, head_dim]; all signs 0 where the layer has no RoPE
    rope_table: RopeTable
    k_transform: Transform | None = None
    v_transform: Transform | None = None


class Cache(Protocol):
    """The keys and values of one context."""

    options: CacheOptions
    n_ctx: int  # tokens that it may hold
    n_tokens: int  # that it holds

    def k_bytes(self) -> int:
        """Bytes that the stored keys occupy."""

    def v_bytes(self) -> int:
        """Bytes that the stored values occupy."""

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens from slot `n_tokens` on."""


class Attention(Protocol):
    """Stores a step's keys and values in a cache, and attends over it."""

    def bound(self, n_tokens: int) -> int:
        """Slots that a decode step looks at which ends with `n_tokens` in the cache; what is captured for one such
        step serves all steps of the same bound."""

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """Once a step: `n_tokens` new tokens come, the last one at slot n_slots - 1 (captured: or before it)."""

    def run(self, layer: int, qkv: FloatRows, out: FloatRows) -> None:
        """Store the layer's keys and values and attend.

        qkv: float32 rows [n_heads q | n_kv_heads k | n_kv_heads v] * head_dim, before RoPE; out: float32 rows
        [n_heads * head_dim], of the step's tokens.
        """


class Context(Protocol):
    """A model running one text."""

    @property
    def cache(self) -> Cache:
        """What it holds."""

    def forward(self, tokens: list[int], n_logits: int = 1) -> "torch.Tensor":
        """Append `tokens`; logits float32 [n_logits, n_vocab] of the last `n_logits` of them, in host memory.

        Raises ContextError where the tokens do not fit, BusyError while another thread uses this context, KsortError
        where the model's arithmetic overflowed; the cache then holds what it held before.
        """


class Heads(Protocol):
    """What a cache's size follows from, of one layer."""

    @property
    def n_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


class Spec(Protocol):
    """What users of a backend ask of its model's spec (models.spec.ModelSpec)."""

    @property
    def context_length(self) -> int:
        """Tokens that the model was trained for."""

    @property
    def attentions(self) -> Sequence[Heads]:
        """The layers' heads."""


class Backend(Protocol):
    """A model on a device, ready to run."""

    @property
    def spec(self) -> Spec:
        """The model's."""

    n_vocab: int
    n_threads: int
    has_exact_rows: bool  # whether its caches can keep them

    def start(self, options: CacheOptions, n_ctx: int) -> Context:
        """A new, empty context of at most `n_ctx` tokens. Raises KsortError for options that do not fit."""
