"""Packing and attention of one layer on a GPU, on random data: what bench_attend_cuda.py measures."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ksort_gguf.binding.cuda import CacheLayout, Layer, Tokens, check_status
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.cache.rope_table import cos_sin
from ksort_gguf.kvplan import RopeTables, Transform
from ksort_gguf.models.rope import stock_tables
from ksort_gguf.names import CACHE_TYPES, TILE_TOKENS, default_block_size

Call = Callable[[], object]  # that only enqueues

ROPE_BASE = 10000.0
_SOURCE_TOKENS = 4096  # random tokens that are packed; larger caches repeat their tiles
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Shape:
    """`batch` contexts of `depth` tokens each, the last `n_tokens` of which are new."""

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    depth: int
    n_tokens: int = 1

    def layout(self, type_name: str) -> CacheLayout:
        block_size = default_block_size(self.head_dim)
        n_tiles = -(-self.depth // TILE_TOKENS)
        return CacheLayout(type_name, self.head_dim, block_size, self.n_kv_heads, n_tiles, self.batch)

    def cache_bytes(self, k_type: str, v_type: str) -> int:
        """Bytes of all keys and values."""
        return self.layout(k_type).n_bytes + self.layout(v_type).n_bytes

    def x_bytes(self) -> int:
        """Bytes of the new tokens' keys and values in f16, before packing."""
        return 2 * 2 * self.batch * self.n_tokens * self.n_kv_heads * self.head_dim


class DeviceCopies:
    """Copies of arrays in the GPU's memory, one of each array."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[np.ndarray, torch.Tensor]] = {}  # arrays are kept: ids stay theirs

    def __call__(self, values: np.ndarray) -> torch.Tensor:
        if id(values) not in self._copies:
            self._copies[id(values)] = values, torch.from_numpy(values).cuda()
        return self._copies[id(values)][1]


class Rope:
    """RoPE of all channels of every KV head, and its rope table up to `n_positions` on the device."""

    def __init__(self, n_kv_heads: int, head_dim: int, n_positions: int):
        stock = stock_tables(head_dim, head_dim, "half")
        arrays = (np.tile(values, (n_kv_heads, 1)) for values in (stock.partner, stock.sign, stock.frequency))
        self.tables = RopeTables(*arrays)
        theta = ROPE_BASE ** (-np.arange(0, head_dim, 2) / head_dim)
        self.cos, self.sin = (torch.from_numpy(table).cuda() for table in cos_sin(theta, n_positions))


class Plan:
    """A random transform with all steps, for every KV head."""

    def __init__(self, n_kv_heads: int, head_dim: int):
        random, shape = np.random.default_rng(0), (n_kv_heads, head_dim)
        shift = random.standard_normal(shape, dtype=np.float32)
        scale = random.random(shape, dtype=np.float32) + np.float32(0.5)
        feedback = np.triu(random.standard_normal((*shape, head_dim), dtype=np.float32), 1) * np.float32(0.1)
        self.keys = Transform(shift=shift, scale=scale, rotate=True, feedback=feedback)
        self.values = Transform(scale=scale, rotate=True, feedback=feedback)


class PackedSteps:
    """Calls of libksort_cuda on `copies` caches of `shape`; rows are f16, [batch * n_tokens, heads * head_dim]."""

    def __init__(self, shape: Shape, k_type: str, v_type: str, copies: int, rope: Rope, plan: Plan | None = None):
        self._shape, self._types, self._rope, self._on_device = shape, (k_type, v_type), rope, DeviceCopies()
        self._k_transform = None if plan is None else plan.keys
        self._v_transform = plan.values if plan is not None and CACHE_TYPES[v_type].is_bfp else None
        self._status = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._tokens = self._tokens_of(shape)
        tiles = list(zip(self._random_tiles(), self._layouts(shape), strict=True))
        self._layers = [
            self._layer(shape, *(_repeated(source, layout.n_bytes) for source, layout in tiles)) for _ in range(copies)
        ]

    def attend_calls(self) -> list[Call]:
        """One attention call for each copy."""
        self.q = _random_rows(self._shape, self._shape.n_heads)
        self.out = torch.empty_like(self.q)
        n_bytes = self._layers[0].workspace_bytes(self._tokens)
        rows = FloatRows(self.q), FloatRows(self.out), torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
        return [partial(_attend, layer, self._tokens, *rows) for layer in self._layers]

    def pack_calls(self) -> list[Call]:
        """One call for each copy that packs the new tokens, each copy's own rows."""
        n_kv_heads = self._shape.n_kv_heads
        self.x = [[_random_rows(self._shape, n_kv_heads) for _ in "kv"] for _ in self._layers]
        return [
            partial(_pack, layer, self._tokens, *(FloatRows(rows) for rows in x))
            for layer, x in zip(self._layers, self.x, strict=True)
        ]

    def check(self) -> None:
        """Raise unless every call so far went well. Synchronizes."""
        check_status(int(self._status))

    def _tokens_of(self, shape: Shape) -> Tokens:
        n_cached = torch.full((shape.batch,), shape.depth - shape.n_tokens, dtype=torch.int32, device="cuda")
        return Tokens(shape.n_tokens, n_cached, self._status)

    def _layouts(self, shape: Shape) -> tuple[CacheLayout, CacheLayout]:
        """Of keys and of values."""
        k_type, v_type = self._types
        return shape.layout(k_type), shape.layout(v_type)

    def _layer(self, shape: Shape, k: torch.Tensor, v: torch.Tensor) -> Layer:
        k_layout, v_layout = self._layouts(shape)
        return Layer(
            k_layout, k, v_layout, v, n_heads=shape.n_heads, scale=shape.head_dim**-0.5, window=0,
            max_slots=shape.depth, x_type="f16", on_device=self._on_device, rope=self._rope.tables,
            cos=self._rope.cos, sin=self._rope.sin, k_transform=self._k_transform, v_transform=self._v_transform,
        )  # fmt: skip

    def _random_tiles(self) -> list[torch.Tensor]:
        """Tiles of random keys and of random values, of all KV heads, packed by the library: uint8 [tiles, bytes]."""
        s, n_tokens = self._shape, min(self._shape.depth, _SOURCE_TOKENS)
        one = Shape(1, s.n_heads, s.n_kv_heads, s.head_dim, n_tokens, n_tokens)
        layouts = self._layouts(one)
        memory = [torch.zeros(layout.n_bytes, dtype=torch.uint8, device="cuda") for layout in layouts]
        k, v = (FloatRows(_random_rows(one, s.n_kv_heads)) for _ in "kv")
        _pack(self._layer(one, *memory), self._tokens_of(one), k, v)
        self.check()
        return [tiles.view(layout.n_tiles, -1) for tiles, layout in zip(memory, layouts, strict=True)]


def _random_rows(shape: Shape, n_heads: int) -> torch.Tensor:
    """f16 [batch * n_tokens, n_heads * head_dim]."""
    size = shape.batch * shape.n_tokens, n_heads * shape.head_dim
    return torch.randn(size, dtype=torch.float16, device="cuda")


def _pack(layer: Layer, tokens: Tokens, k: FloatRows, v: FloatRows) -> None:
    layer.pack(tokens, k, v, torch.cuda.current_stream().cuda_stream)


def _attend(layer: Layer, tokens: Tokens, q: FloatRows, out: FloatRows, workspace: torch.Tensor) -> None:
    layer.attend(tokens, q, out, workspace, torch.cuda.current_stream().cuda_stream)


def sdpa_calls(shape: Shape, copies: int) -> Iterator[tuple[str, list[Call]]]:
    """By backend of torch's attention: a call for each of `copies` f16 caches. A backend may refuse when called.

    Prompts behind other tokens are causal from the lower right corner; where that has no kernel, the same products
    without a mask stand for it ("flash, no mask": at most n_tokens / 2 / depth more work).
    """
    q = torch.randn((shape.batch, shape.n_heads, shape.n_tokens, shape.head_dim), dtype=torch.float16, device="cuda")
    size = shape.batch, shape.n_kv_heads, shape.depth, shape.head_dim
    caches = [[torch.randn(size, dtype=torch.float16, device="cuda") for _ in "kv"] for _ in range(copies)]
    mask: dict[str, Any] = {}
    if shape.n_tokens == shape.depth:
        mask = {"is_causal": True}
    elif shape.n_tokens > 1:
        mask = {"attn_mask": causal_lower_right(shape.n_tokens, shape.depth)}
    runs: list[tuple[str, SDPBackend, dict[str, Any]]] = [(name, each, mask) for name, each in _BACKENDS.items()]
    if "attn_mask" in mask:
        runs.append(("flash, no mask", SDPBackend.FLASH_ATTENTION, {}))

    def call(backend: SDPBackend, mask: dict[str, Any], k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=shape.n_heads != shape.n_kv_heads, **mask)

    for name, backend, mask in runs:
        yield name, [partial(call, backend, mask, k, v) for k, v in caches]


def _repeated(tiles: torch.Tensor, n_bytes: int) -> torch.Tensor:
    """uint8 [n_bytes] of whole `tiles` [n, bytes], again and again."""
    out = torch.empty(n_bytes, dtype=torch.uint8, device="cuda").view(-1, tiles.shape[1])
    for start in range(0, len(out), len(tiles)):
        part = out[start : start + len(tiles)]
        part.copy_(tiles[: len(part)])
    return out.view(-1)
