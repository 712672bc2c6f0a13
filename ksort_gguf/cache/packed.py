"""The public packed cache of one attention layer, for a model of one's own."""

import threading

import numpy as np

from ksort_gguf.binding.cpu import attend
from ksort_gguf.binding.structs import float_heads
from ksort_gguf.cache.cpu import CpuCache
from ksort_gguf.cache.exact import STEP_TOKENS, begin_after, exact_rows
from ksort_gguf.cache.exclusive import exclusive
from ksort_gguf.cache.protocol import CacheOptions, HeadShape
from ksort_gguf.errors import CacheTypeError, ContextError, KsortError, PlanError
from ksort_gguf.kvplan import KVPlan, Transform
from ksort_gguf.names import (
    CACHE_TYPES,
    DEFAULT_QUERY_TYPE,
    K_TYPES,
    MAX_HEAD_DIM,
    QUERY_TYPES,
    STEPS,
    V_TYPES,
    check_name,
    default_block_size,
)
from ksort_gguf.reference import reorder


class PackedCache:
    """Keys and values of one layer and one text, packed on the CPU, and attention over them.

    Keys and queries are given after RoPE. Not for several threads at once: BusyError says so.
    """

    def __init__(
        self, *, n_kv_heads: int, head_dim: int, n_ctx: int, cache_type_k: str = "sbfp12", cache_type_v: str = "sbfp12",
        block_size: int | None = None, query_type: str | None = None, plan: KVPlan | None = None, layer: int = 0,
        exact_tail: int | None = None, exact_sinks: int | None = None,
    ):  # fmt: skip
        """n_ctx: tokens that it may hold. block_size: channels that share an exponent (default 32).

        query_type: what queries are rounded to, "bfp16" beside BFP keys unless "f32" is asked for. plan: that of the
        model, with channels in the plan's row order, and `layer` the layer in it; it acts on BFP types. exact_tail,
        exact_sinks: how many of the newest and of the first tokens a query reads in f16, which are kept beside BFP
        types (default: 128 and 4 beside types of 4 bits or less; 0 for none). A query finds all of its tail where it
        is asked before 64 tokens follow it: long texts are appended and attended in steps of up to 64 tokens.
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
        block_size = default_block_size(head_dim) if block_size is None else block_size
        exact = exact_rows(cache_type_k, cache_type_v, exact_tail, exact_sinks, ("exact_tail", "exact_sinks"))
        options = CacheOptions(cache_type_k, cache_type_v, block_size, self._query_type, *exact)
        heads = HeadShape(n_kv_heads, n_kv_heads, head_dim, head_dim**-0.5, 0)
        self._cache = CpuCache([heads], options, n_ctx)
        self._k, self._v = self._cache.k[0], self._cache.v[0]
        self._exact = [rows for rows in (self._k.exact, self._v.exact) if rows is not None]
        self.n_kv_heads, self.head_dim, self.n_ctx = n_kv_heads, head_dim, n_ctx
        self._order, self._k_transform, self._v_transform = self._plan_of(plan, layer, has_bfp_keys, cache_type_v)
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
            for rows in self._exact:
                rows.begin = begin_after(rows.begin, self.n_tokens, len(k), self._cache.n_ring_tiles)
            self._k.pack(k, self.n_tokens, transform=self._k_transform)
            self._v.pack(v, self.n_tokens, transform=self._v_transform)
            self._cache.n_tokens += len(k)

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
            step, first = STEP_TOKENS if self._exact else len(q), self.n_tokens - len(q)
            outs = [
                attend(
                    self._k, self._v, q[at : at + step], first + at, window=window, query_type=self._query_type,
                    scale=self.head_dim**-0.5 if scale is None else scale, k_transform=self._k_transform,
                    v_transform=self._v_transform,
                )
                for at in range(0, len(q), step)
            ]  # fmt: skip
            return outs[0] if len(outs) == 1 else np.concatenate(outs)

    def truncate(self, n_tokens: int) -> None:
        """Forget all tokens after the first `n_tokens`."""
        self._cache.truncate(n_tokens)

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds."""
        return self._cache.n_tokens

    @property
    def n_bytes(self) -> int:
        """Bytes that the tokens' keys and values take, exact rows among them, whole tiles of 64 tokens."""
        return self._cache.k_bytes() + self._cache.v_bytes()

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
