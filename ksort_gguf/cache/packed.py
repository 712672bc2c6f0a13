"""The public packed cache of one attention layer, for a model of one's own."""

import threading

import numpy as np

from ksort_gguf.binding.cpu import PackedHeads, attend
from ksort_gguf.binding.structs import float_heads
from ksort_gguf.cache.exclusive import exclusive
from ksort_gguf.errors import CacheTypeError, ContextError, KsortError, PlanError
from ksort_gguf.kvplan import KVPlan, Transform
from ksort_gguf.names import (
    CACHE_TYPES,
    DEFAULT_QUERY_TYPE,
    K_TYPES,
    MAX_HEAD_DIM,
    QUERY_TYPES,
    STEPS,
    TILE_TOKENS,
    V_TYPES,
    check_block_size,
    check_name,
    default_block_size,
)
from ksort_gguf.reference import reorder


class PackedCache:
    """Keys and values of one layer and one text, packed on the CPU, and attention over them.

    Keys and queries are given after RoPE. Not for several threads at once: BusyError says so.
    """

    def __init__(
        self, *, n_kv_heads: int, head_dim: int, n_ctx: int, cache_type_k: str = "bfp12", cache_type_v: str = "bfp12",
        block_size: int | None = None, query_type: str | None = None, plan: KVPlan | None = None, layer: int = 0,
    ):  # fmt: skip
        """n_ctx: tokens that it may hold. block_size: channels that share an exponent or scale (default 32).

        query_type: what queries are rounded to, "bfp16" beside BFP and SBFP keys unless "f32" is asked for. plan: that
        of the model, with channels in the plan's row order, and `layer` the layer in it; it acts on BFP and SBFP types.
        Raises CacheTypeError, PlanError and ContextError naming the argument that does not fit.
        """
        check_name("cache_type_k", cache_type_k, K_TYPES)
        check_name("cache_type_v", cache_type_v, V_TYPES)
        has_bfp_keys = CACHE_TYPES[cache_type_k].is_bfp
        self._query_type = query_type or (DEFAULT_QUERY_TYPE if has_bfp_keys else "f32")
        check_name("query_type", self._query_type, QUERY_TYPES)
        if n_kv_heads < 1:
            raise KsortError(f"`n_kv_heads` {n_kv_heads} is not positive", field="n_kv_heads")
        if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
            raise CacheTypeError(f"`head_dim` {head_dim} is not an even number up to {MAX_HEAD_DIM}", field="head_dim")
        if n_ctx < 1:
            raise ContextError(f"`n_ctx` {n_ctx} is not positive: pass a number of tokens", field="n_ctx")
        block_size = default_block_size(head_dim) if block_size is None else block_size
        if has_bfp_keys or CACHE_TYPES[cache_type_v].is_bfp or self._query_type == "bfp16":
            check_block_size(block_size, head_dim)
        self.n_kv_heads, self.head_dim, self.n_ctx, self.n_tokens = n_kv_heads, head_dim, n_ctx, 0
        self._order, self._k_transform, self._v_transform = self._plan_of(plan, layer, has_bfp_keys, cache_type_v)
        self._k = PackedHeads(cache_type_k, head_dim, block_size, n_kv_heads, n_ctx)
        self._v = PackedHeads(cache_type_v, head_dim, block_size, n_kv_heads, n_ctx)
        types = CACHE_TYPES[cache_type_k], CACHE_TYPES[cache_type_v]
        self._tile_bytes = n_kv_heads * sum(t.tile_bytes(head_dim, block_size) for t in types)
        self._lock = threading.Lock()

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        """Store the next tokens' keys and values, float [n_tokens, n_kv_heads, head_dim] both, keys after RoPE.

        Raises ContextError where they do not fit, KsortError for NaN, infinity and values beyond the types' range
        (nothing is stored then), ValueError for other shapes.
        """
        with exclusive(self._lock):
            k, v = (float_heads(name, x, self.head_dim, self.n_kv_heads) for name, x in (("k", k), ("v", v)))
            if len(k) != len(v):
                raise ValueError(f"{len(k)} tokens of keys, but {len(v)} of values")
            if self.n_tokens + len(k) > self.n_ctx:
                raise ContextError(
                    f"{self.n_tokens + len(k)} tokens do not fit the context of {self.n_ctx}: raise it with `n_ctx`",
                    field="n_ctx",
                )
            if len(k) == 0:
                return
            k = k if self._order is None else reorder(k, self._order)
            self._k.pack(k, self.n_tokens, transform=self._k_transform)
            self._v.pack(v, self.n_tokens, transform=self._v_transform)
            self.n_tokens += len(k)

    def attend(self, q: np.ndarray, *, scale: float | None = None, window: int = 0) -> np.ndarray:
        """Causal attention of the tokens appended last: float32 [n, n_heads, head_dim] from q likewise, after RoPE.

        Query i of the n stands at token n_tokens - n + i and sees the `window` tokens up to it (0: all). Query head g
        reads KV head g // (n_heads / n_kv_heads). scale: of scores, 1 / sqrt(head_dim) unless given. Raises KsortError
        for NaN and infinity, ValueError for other shapes or more queries than tokens.
        """
        with exclusive(self._lock):
            q = float_heads("q", q, self.head_dim)
            if q.shape[1] % self.n_kv_heads:
                raise ValueError(f"{q.shape[1]} query heads do not divide into {self.n_kv_heads} KV heads")
            if not 0 < len(q) <= self.n_tokens:
                raise ValueError(f"{len(q)} queries for {self.n_tokens} tokens: append keys and values first")
            if self._order is not None:
                q = reorder(q, np.repeat(self._order, q.shape[1] // self.n_kv_heads, axis=0))
            return attend(
                self._k, self._v, q, self.n_tokens - len(q), scale=self.head_dim**-0.5 if scale is None else scale,
                window=window, query_type=self._query_type, k_transform=self._k_transform,
                v_transform=self._v_transform,
            )  # fmt: skip

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens after the first `n_tokens`."""
        if not 0 <= n_tokens <= self.n_tokens:
            raise ValueError(f"cannot keep {n_tokens} of {self.n_tokens} tokens")
        self.n_tokens = n_tokens

    @property
    def n_bytes(self) -> int:
        """Bytes that the tokens' keys and values take, whole tiles of 64 tokens."""
        return -(-self.n_tokens // TILE_TOKENS) * self._tile_bytes

    def _plan_of(
        self, plan: KVPlan | None, layer: int, has_bfp_keys: bool, cache_type_v: str
    ) -> tuple[np.ndarray | None, Transform | None, Transform | None]:
        """The order, and the transforms of keys and of values, of a layer."""
        if plan is None:
            return None, None, None
        k = plan.keys.layer(layer) if has_bfp_keys else None
        v = plan.values.layer(layer) if CACHE_TYPES[cache_type_v].is_bfp else None
        if layer < 0:
            raise PlanError(f"`layer` {layer} is negative: pass the layer's number, from 0", field="layer")
        if plan.order is not None and layer >= len(plan.order):
            raise PlanError(f"`layer` {layer}: the plan has {len(plan.order)} layers", field="layer")
        order = None if plan.order is None or not has_bfp_keys else plan.order[layer]
        heads = self.n_kv_heads, self.head_dim
        for step in STEPS.values():
            for table in step.tables:
                tables = [order] if step.folded else [t.tables().get(table.name) for t in (k, v) if t is not None]
                for values in tables:
                    if values is not None and values.shape != table.shape(*heads):
                        raise PlanError(
                            f"`plan`: its {table.name} of layer {layer} is {list(values.shape)}, but the cache has "
                            f"{heads[0]} KV heads of {heads[1]} channels",
                            field="plan",
                        )
        return order, k, v
