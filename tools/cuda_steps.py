"""Packing and attention of one layer on a GPU, on random data: what bench_attend_cuda.py measures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ksort_gguf import cache_types
from ksort_gguf.cache_types import CACHE_TYPES, TILE_TOKENS
from ksort_gguf.families.rope import cos_sin, stock_tables
from ksort_gguf.native_cuda import CacheLayout, Layer, RopeAddresses, Rows, Tokens, TransformAddresses, check_status

ROPE_BASE = 10000.0
_SOURCE_TOKENS = 4096  # random tokens that are packed; larger caches repeat their tiles
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `depth` tokens each, the last `n_tokens` of which are new."""

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    depth: int
    n_tokens: int = 1

    def layout(self, type_name: str) -> CacheLayout:
        block_size = cache_types.default_block_size(self.head_dim)
        n_tiles = -(-self.depth // TILE_TOKENS)
        return CacheLayout(type_name, self.head_dim, block_size, self.n_kv_heads, n_tiles, self.batch)

    def cache_bytes(self, k_type: str, v_type: str) -> int:
        """Bytes of all keys and values."""
        return self.layout(k_type).n_bytes + self.layout(v_type).n_bytes

    def x_bytes(self) -> int:
        """Bytes of the new tokens' keys and values in f16, before packing."""
        return 2 * 2 * self.batch * self.n_tokens * self.n_kv_heads * self.head_dim


class Waves:
    """RoPE of all channels: tables of every KV head, and cos and sin up to `n_positions`, on the device."""

    def __init__(self, n_kv_heads: int, head_dim: int, n_positions: int):
        tables = stock_tables(head_dim, head_dim, "half")
        theta = ROPE_BASE ** (-np.arange(0, head_dim, 2) / head_dim)
        arrays = [np.tile(table, (n_kv_heads, 1)) for table in (tables.partner, tables.sign, tables.frequency)]
        self._kept = [torch.from_numpy(array).cuda() for array in (*arrays, *cos_sin(theta, n_positions))]
        self.addresses = RopeAddresses(*(t.data_ptr() for t in self._kept), head_dim // 2, n_positions)


class Plan:
    """A random transform with all steps, for every KV head."""

    def __init__(self, n_kv_heads: int, head_dim: int):
        shape = n_kv_heads, head_dim
        shift, scale = torch.randn(shape, device="cuda"), torch.rand(shape, device="cuda") + 0.5
        feedback = torch.randn((*shape, head_dim), device="cuda").triu(1) * 0.1
        self._kept = shift, scale, feedback
        self.keys = TransformAddresses(True, shift.data_ptr(), scale.data_ptr(), None, feedback.data_ptr())
        self.values = TransformAddresses(True, None, scale.data_ptr(), None, feedback.data_ptr())


class PackedSteps:
    """Calls of libksort_cuda on `copies` caches of `shape`; rows are f16, [batch, n_tokens, heads, head_dim]."""

    def __init__(self, shape: Shape, k_type: str, v_type: str, copies: int, waves: Waves, plan: Plan | None = None):
        self._shape, self._kept = shape, (waves, plan)
        self._status = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._n_cached = torch.full((shape.batch,), shape.depth - shape.n_tokens, dtype=torch.int32, device="cuda")
        self._tokens = self._tokens_of(shape.n_tokens, self._n_cached)
        self._waves, self._transforms = waves, {}
        if plan is not None:
            self._transforms["k_transform"] = plan.keys
            self._transforms["v_transform"] = plan.values if CACHE_TYPES[v_type].is_bfp else None
        source = self._random_tiles(k_type, v_type)
        self._memory = [
            [_repeated(tiles, shape.layout(name).n_bytes) for tiles, name in zip(source, (k_type, v_type), strict=True)]
            for _ in range(copies)
        ]
        self._layers = [self._layer(shape, k_type, v_type, k, v) for k, v in self._memory]

    def attend_calls(self) -> list[Callable[[], None]]:
        """One attention call for each copy."""
        shape = self._shape
        rows_shape = shape.batch, shape.n_tokens, shape.n_heads, shape.head_dim
        q = torch.randn(rows_shape, dtype=torch.float16, device="cuda")
        out = torch.empty_like(q)
        workspace = torch.empty(self._layers[0].workspace_bytes(self._tokens), dtype=torch.uint8, device="cuda")
        self._attended = q, out, workspace
        q_rows, out_rows = (Rows(x.data_ptr(), x.stride(1), x.stride(0)) for x in (q, out))
        memory = workspace.data_ptr(), len(workspace)
        return [
            lambda layer=layer: layer.attend(self._tokens, q_rows, out_rows, *memory, _stream())
            for layer in self._layers
        ]

    def pack_calls(self) -> list[Callable[[], None]]:
        """One call for each copy that packs the new tokens, each copy's own rows."""
        shape = self._shape
        rows_shape = shape.batch, shape.n_tokens, shape.n_kv_heads, shape.head_dim
        self._x = [
            [torch.randn(rows_shape, dtype=torch.float16, device="cuda") for _ in range(2)] for _ in self._layers
        ]
        return [
            lambda layer=layer, k=k, v=v: layer.pack(
                self._tokens, Rows(k.data_ptr(), k.stride(1), k.stride(0)), v.data_ptr(), _stream()
            )
            for layer, (k, v) in zip(self._layers, self._x, strict=True)
        ]

    def check(self) -> None:
        """Raise unless every call so far went well. Synchronizes."""
        check_status(int(self._status))

    def _tokens_of(self, n_tokens: int, n_cached: torch.Tensor) -> Tokens:
        return Tokens(n_tokens, n_cached.data_ptr(), self._status.data_ptr())

    def _layer(self, shape: Shape, k_type: str, v_type: str, k: torch.Tensor, v: torch.Tensor) -> Layer:
        return Layer(
            shape.layout(k_type), k.data_ptr(), shape.layout(v_type), v.data_ptr(), n_heads=shape.n_heads,
            scale=shape.head_dim**-0.5, window=0, max_slots=shape.depth, x_type="f16", rope=self._waves.addresses,
            **self._transforms,
        )  # fmt: skip

    def _random_tiles(self, k_type: str, v_type: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tiles of random keys and of random values, of all KV heads, packed by the library: uint8 [tiles, bytes]."""
        s = self._shape
        one = Shape(1, s.n_heads, s.n_kv_heads, s.head_dim, min(s.depth, _SOURCE_TOKENS), min(s.depth, _SOURCE_TOKENS))
        layouts = one.layout(k_type), one.layout(v_type)
        k, v = (torch.zeros(layout.n_bytes, dtype=torch.uint8, device="cuda") for layout in layouts)
        rows = [
            torch.randn((1, one.n_tokens, s.n_kv_heads, s.head_dim), dtype=torch.float16, device="cuda") for _ in "kv"
        ]
        n_cached = torch.zeros(1, dtype=torch.int32, device="cuda")
        k_rows = Rows(rows[0].data_ptr(), rows[0].stride(1), rows[0].stride(0))
        layer = self._layer(one, k_type, v_type, k, v)
        layer.pack(self._tokens_of(one.n_tokens, n_cached), k_rows, rows[1].data_ptr(), _stream())
        self.check()
        return k.view(layouts[0].n_tiles, -1), v.view(layouts[1].n_tiles, -1)


def sdpa_calls(shape: Shape, copies: int) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """By backend of torch's attention: a call for each of `copies` f16 caches. A backend may refuse when called.

    Prompts behind other tokens are causal from the lower right corner; where that has no kernel, the same products
    without a mask stand for it ("flash, no mask": at most n_tokens / 2 / depth more work).
    """
    q = torch.randn((shape.batch, shape.n_heads, shape.n_tokens, shape.head_dim), dtype=torch.float16, device="cuda")
    size = shape.batch, shape.n_kv_heads, shape.depth, shape.head_dim
    caches = [[torch.randn(size, dtype=torch.float16, device="cuda") for _ in "kv"] for _ in range(copies)]
    mask = {}
    if shape.n_tokens == shape.depth:
        mask = {"is_causal": True}
    elif shape.n_tokens > 1:
        mask = {"attn_mask": causal_lower_right(shape.n_tokens, shape.depth)}
    runs = [(name, backend, mask) for name, backend in _BACKENDS.items()]
    if "attn_mask" in mask:
        runs.append(("flash, no mask", SDPBackend.FLASH_ATTENTION, {}))

    def call(backend: SDPBackend, mask: dict, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=shape.n_heads != shape.n_kv_heads, **mask)

    for name, *run in runs:
        yield name, [partial(call, *run, k, v) for k, v in caches]


def _repeated(tiles: torch.Tensor, n_bytes: int) -> torch.Tensor:
    """uint8 [n_bytes] of whole `tiles` [n, bytes], again and again."""
    out = torch.empty(n_bytes, dtype=torch.uint8, device="cuda").view(-1, tiles.shape[1])
    for start in range(0, len(out), len(tiles)):
        part = out[start : start + len(tiles)]
        part.copy_(tiles[: len(part)])
    return out.view(-1)


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
