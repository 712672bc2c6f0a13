"""The KV cache of one context in a GPU's memory: reserved and zeroed at the start, so that graphs can refer to it."""

from collections.abc import Sequence

import torch

from ksort_gguf.binding import cuda
from ksort_gguf.cache.cpu import ContextCache
from ksort_gguf.cache.cuda_device import memory_errors
from ksort_gguf.cache.protocol import CacheOptions, HeadShape
from ksort_gguf.errors import CacheTypeError
from ksort_gguf.names import CACHE_TYPES

FLOAT_BLOCK = 512  # slots of a float cache that lie together
FLOAT_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class CudaCache(ContextCache):
    """Keys and values of all layers as tensors `k[layer]`, `v[layer]`.

    BFP keys: uint8, contiguous [tile][KV head] tiles of both, as `layout` says. Float keys: each in its type, [blocks
    of FLOAT_BLOCK slots, n_kv_heads, FLOAT_BLOCK, head_dim]. Raises CacheTypeError for what runs on the CPU only.
    """

    def __init__(self, layers: Sequence[HeadShape], options: CacheOptions, n_ctx: int, device: torch.device):
        self._device, self.is_packed = device, CACHE_TYPES[options.k_type].is_bfp
        for heads in layers:
            check_options(options, heads.head_dim)
        super().__init__(layers, options, n_ctx)
        self.k = [self._layer(options.k_type, heads) for heads in layers]
        self.v = [self._layer(options.v_type, heads) for heads in layers]

    def layout(self, type_name: str, heads: HeadShape) -> cuda.CacheLayout:
        """Where a layer's packed keys or values lie."""
        return cuda.CacheLayout(type_name, heads.head_dim, self.options.block_size, heads.n_kv_heads, self.n_tiles)

    def _layer(self, type_name: str, heads: HeadShape) -> torch.Tensor:
        with memory_errors(f"a cache of {self.n_ctx} tokens"):
            if self.is_packed:
                return torch.zeros(self.layout(type_name, heads).n_bytes, dtype=torch.uint8, device=self._device)
            shape = -(-self.n_ctx // FLOAT_BLOCK), heads.n_kv_heads, FLOAT_BLOCK, heads.head_dim
            return torch.zeros(shape, dtype=FLOAT_TYPES[type_name], device=self._device)


def check_options(options: CacheOptions, head_dim: int) -> None:
    """Raise CacheTypeError, naming the argument, unless these types run on the GPU for heads of `head_dim` channels."""
    k_type, v_type, query_type = options.k_type, options.v_type, options.query_type
    for field in ("exact_tail", "exact_sinks"):
        if n := getattr(options, field):
            raise CacheTypeError(
                f"`cache_{field}` {n}: exact rows are not kept on the GPU: leave it out, or run on the CPU",
                field=f"cache_{field}",
            )
    if not CACHE_TYPES[k_type].is_bfp:
        if v_type not in FLOAT_TYPES:
            raise CacheTypeError(
                f"`cache_type_v` {v_type}: on the GPU such values need keys of {', '.join(cuda.K_TYPES)}: "
                f"pass one of them with `cache_type_k`, or values of {', '.join(FLOAT_TYPES)}",
                field="cache_type_v",
            )
        if query_type != "f32":
            raise CacheTypeError(
                f"`query_type` {query_type}: on the GPU {k_type} keys leave queries as they are: use f32",
                field="query_type",
            )
        return
    if v_type not in cuda.V_TYPES:
        known = ", ".join(cuda.V_TYPES)
        raise CacheTypeError(
            f"`cache_type_v` {v_type}: on the GPU {k_type} keys go with values of {known}", field="cache_type_v"
        )
    if query_type != "bfp16":
        raise CacheTypeError(
            f"`query_type` {query_type}: on the GPU {k_type} keys take queries in bfp16: leave it out",
            field="query_type",
        )
    if head_dim not in cuda.HEAD_DIMS:
        known = ", ".join(map(str, cuda.HEAD_DIMS))
        raise CacheTypeError(
            f"`cache_type_k` {k_type}: on the GPU heads have {known} channels, this model's have {head_dim}: use f16 "
            "keys and values, or the CPU",
            field="cache_type_k",
        )
