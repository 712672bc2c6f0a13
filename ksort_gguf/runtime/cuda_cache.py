"""The KV cache of one sequence in a GPU's memory: reserved and zeroed at the start, so that graphs can refer to it."""

import torch

from ksort_gguf import native_cuda
from ksort_gguf.cache_types import CACHE_TYPES
from ksort_gguf.errors import KsortError
from ksort_gguf.families import Geometry
from ksort_gguf.runtime.cuda_device import memory_errors
from ksort_gguf.runtime.kv_cache import CacheOptions, KVCache

FLOAT_BLOCK = 512  # slots of a float cache that lie together
FLOAT_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class CudaCache(KVCache):
    """Keys and values of all layers as tensors `k[layer]`, `v[layer]`.

    BFP keys: uint8, contiguous [tile][KV head] tiles of both, as native_cuda.CacheLayout says (`k_layout`, `v_layout`).
    Float keys: each in its type, [blocks of FLOAT_BLOCK slots, n_kv_heads, FLOAT_BLOCK, head_dim]. Raises KsortError
    for what runs on the CPU only.
    """

    def __init__(self, geometry: Geometry, options: CacheOptions, n_ctx: int, device: torch.device):
        self._device, self.is_packed = device, CACHE_TYPES[options.k_type].is_bfp
        check_options(options, geometry.head_dim)
        super().__init__(geometry, options, n_ctx)

    @property
    def k_layout(self) -> native_cuda.CacheLayout:
        return self._layout(self.options.k_type)

    @property
    def v_layout(self) -> native_cuda.CacheLayout:
        return self._layout(self.options.v_type)

    def _layout(self, type_name: str) -> native_cuda.CacheLayout:
        g = self.geometry
        return native_cuda.CacheLayout(type_name, g.head_dim, self.options.block_size, g.n_kv_heads, self._n_tiles)

    def _layer_cache(self, type_name: str) -> torch.Tensor:
        g = self.geometry
        with memory_errors(f"a cache of {self.n_ctx} tokens"):
            if self.is_packed:
                return torch.zeros(self._layout(type_name).n_bytes, dtype=torch.uint8, device=self._device)
            shape = -(-self.n_ctx // FLOAT_BLOCK), g.n_kv_heads, FLOAT_BLOCK, g.head_dim
            return torch.zeros(shape, dtype=FLOAT_TYPES[type_name], device=self._device)


def check_options(options: CacheOptions, head_dim: int) -> None:
    """Raise KsortError, naming the flag, unless these types run on the GPU for heads of `head_dim` channels."""
    k_type, v_type, query_type = options.k_type, options.v_type, options.query_type
    if not CACHE_TYPES[k_type].is_bfp:
        if v_type not in FLOAT_TYPES:
            raise KsortError(
                f"--cache-type-v {v_type}: on the GPU such values need keys of {', '.join(native_cuda.K_TYPES)}: "
                f"pass one of them with --cache-type-k, or values of {', '.join(FLOAT_TYPES)}"
            )
        if query_type != "f32":
            raise KsortError(f"--query-type {query_type}: on the GPU {k_type} keys leave queries as they are: use f32")
        return
    if v_type not in native_cuda.V_TYPES:
        known = ", ".join(native_cuda.V_TYPES)
        raise KsortError(f"--cache-type-v {v_type}: on the GPU {k_type} keys go with values of {known}")
    if query_type != "bfp16":
        raise KsortError(f"--query-type {query_type}: on the GPU {k_type} keys take queries in bfp16: leave it out")
    if head_dim not in native_cuda.HEAD_DIMS:
        known = ", ".join(map(str, native_cuda.HEAD_DIMS))
        raise KsortError(
            f"--cache-type-k {k_type}: on the GPU heads have {known} channels, this model's have {head_dim}: use f16 "
            "keys and values, or the CPU"
        )
