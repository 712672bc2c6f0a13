"""Attention of one sequence on the GPU: over packed keys by libksort_cuda, over float keys by torch.

Both kinds offer
    bound(n_tokens)        slots that a decode step looks at which ends with `n_tokens` tokens in the cache; a captured
                           step serves all steps of the same bound
    begin(n_tokens, bound) once a step: n_tokens new tokens stand behind the cache's n_cached (a device tensor)
    run(layer, qkv)        stores the layer's keys and values and attends: float32 [n_tokens, n_heads * head_dim] from
                           float32 qkv [n_tokens, (n_heads + 2 n_kv_heads) * head_dim], before RoPE
and only enqueue, so that steps can be captured in a CUDA graph.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ksort_gguf import native_cuda
from ksort_gguf.cache_types import CACHE_TYPES
from ksort_gguf.families.rope import RopeTables, cos_sin
from ksort_gguf.plan.kplan import KPlan, Transform
from ksort_gguf.runtime.cuda_cache import FLOAT_BLOCK, FLOAT_TYPES, CudaCache

_TABLE_TYPES = {"shift": np.float32, "scale": np.float32, "sequence": np.uint16, "feedback": np.float32}


class Waves:
    """cos and sin of every position's RoPE angles, float32 [n_ctx, n_frequencies] on the device."""

    def __init__(self, theta: np.ndarray, n_ctx: int, device: torch.device):
        self.cos, self.sin = (torch.from_numpy(wave).to(device) for wave in cos_sin(theta, n_ctx))


class PackedAttention:
    """Over BFP keys. `status`: int32 [1], where the kernels tell what they find."""

    def __init__(
        self, cache: CudaCache, ropes: list[RopeTables], plan: KPlan | None, waves: Waves, n_cached: torch.Tensor,
        status: torch.Tensor, n_ubatch: int,
    ):  # fmt: skip
        self._g, self._n_cached, self._status = cache.geometry, n_cached, status
        self._n_ctx, self._kept = cache.n_ctx, [waves]  # and the tables that kernels read
        v_plan = plan.values if plan and CACHE_TYPES[cache.options.v_type].is_bfp else None
        self._layers = [
            native_cuda.Layer(
                cache.k_layout,
                cache.k[layer].data_ptr(),
                cache.v_layout,
                cache.v[layer].data_ptr(),
                n_heads=self._g.n_heads,
                scale=1 / math.sqrt(self._g.head_dim),
                window=self._g.window,
                max_slots=cache.n_ctx,
                x_type="f32",
                rope=self._rope(rope, waves),
                k_transform=self._transform(plan.keys.layer(layer) if plan else None),
                v_transform=self._transform(v_plan.layer(layer) if v_plan else None),
            )
            for layer, rope in enumerate(ropes)
        ]
        sizes = (self._layers[0].workspace_bytes(self._tokens(n)) for n in (1, n_ubatch))
        self._workspace = torch.empty(max(sizes), dtype=torch.uint8, device=n_cached.device)

    def bound(self, n_tokens: int) -> int:
        return self._n_ctx

    def begin(self, n_tokens: int, bound: int) -> None:
        self._new = self._tokens(n_tokens)

    def run(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        g, stream = self._g, torch.cuda.current_stream().cuda_stream if qkv.is_cuda else 0
        out = torch.empty((len(qkv), g.n_heads * g.head_dim), device=qkv.device)
        q, k, v = (
            qkv.data_ptr() + n_heads * g.head_dim * qkv.element_size()
            for n_heads in (0, g.n_heads, g.n_heads + g.n_kv_heads)
        )
        calls, strides = self._layers[layer], (qkv.stride(0), qkv.numel())
        calls.pack(self._new, native_cuda.Rows(k, *strides), v, stream)
        out_rows = native_cuda.Rows(out.data_ptr(), out.stride(0), out.numel())
        calls.attend(
            self._new, native_cuda.Rows(q, *strides), out_rows, self._workspace.data_ptr(), len(self._workspace), stream
        )
        return out

    def _tokens(self, n_tokens: int) -> native_cuda.Tokens:
        return native_cuda.Tokens(n_tokens, self._n_cached.data_ptr(), self._status.data_ptr())

    def _on_device(self, table: np.ndarray, dtype: type) -> int:
        """The address of a copy on the device."""
        tensor = torch.from_numpy(np.ascontiguousarray(table, dtype)).to(self._n_cached.device)
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _rope(self, tables: RopeTables, waves: Waves) -> native_cuda.RopeAddresses:
        return native_cuda.RopeAddresses(
            self._on_device(tables.partner, np.uint16),
            self._on_device(tables.sign, np.int8),
            self._on_device(tables.frequency, np.uint16),
            waves.cos.data_ptr(),
            waves.sin.data_ptr(),
            n_frequencies=waves.cos.shape[1],
            n_positions=waves.cos.shape[0],
        )

    def _transform(self, transform: Transform | None) -> native_cuda.TransformAddresses | None:
        if transform is None:
            return None
        tables = {name: getattr(transform, name) for name in _TABLE_TYPES}
        return native_cuda.TransformAddresses(
            transform.rotate,
            **{name: self._on_device(t, _TABLE_TYPES[name]) for name, t in tables.items() if t is not None},
        )


class FloatAttention:
    """Over float keys, by torch: nothing that a graph fixes depends on a length but the number of blocks looked at.

    Prompts take scaled_dot_product_attention with a mask. It would give a decode step's whole context to one
    multiprocessor a head, so a step's products go over all blocks of slots at once, and its softmax over their scores.
    """

    def __init__(self, cache: CudaCache, ropes: list[RopeTables], waves: Waves, n_cached: torch.Tensor):
        self._g, self._cache, self._n_cached = cache.geometry, cache, n_cached
        self._group = self._g.n_heads // self._g.n_kv_heads
        self._dtype = FLOAT_TYPES[cache.options.k_type]
        shared = {}  # tables of the same contents once: without a plan's order all layers have the same
        for rope in ropes:
            if (contents := _contents(rope)) not in shared:
                shared[contents] = TorchRope(rope, self._g.n_heads, waves, q_scale=1 / math.sqrt(self._g.head_dim))
        self._ropes = [shared[_contents(rope)] for rope in ropes]
        self._distinct_ropes = list(shared.values())

    def bound(self, n_tokens: int) -> int:
        step = max(FLOAT_BLOCK, (1 << n_tokens.bit_length()) // 8)  # so a longer context takes few more graphs
        return min(-(-n_tokens // step) * step, self._cache.k[0].shape[0] * FLOAT_BLOCK)

    def begin(self, n_tokens: int, bound: int) -> None:
        device, window = self._n_cached.device, self._g.window
        self._n_blocks = -(-bound // FLOAT_BLOCK)
        slots = self._n_cached.long() + torch.arange(n_tokens, device=device)
        self._block, self._place = slots // FLOAT_BLOCK, slots % FLOAT_BLOCK
        distance = slots[:, None] - torch.arange(self._n_blocks * FLOAT_BLOCK, device=device)
        self._mask = distance >= 0 if not window else (distance >= 0) & (distance < window)
        if n_tokens == 1:
            bias = torch.zeros(self._mask.shape, device=device).masked_fill_(~self._mask, -math.inf)
            self._bias = bias.view(self._n_blocks, 1, 1, FLOAT_BLOCK)
        for rope in self._distinct_ropes:
            rope.begin(slots)

    def run(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        g, n = self._g, len(qkv)
        heads = qkv.view(n, -1, g.head_dim)
        turned = self._ropes[layer].turn(heads[:, : g.n_heads + g.n_kv_heads]).to(self._dtype)
        q, k = turned.split((g.n_heads, g.n_kv_heads), 1)  # [n, heads, head_dim]
        caches = self._cache.k[layer], self._cache.v[layer]
        for cache, new in zip(caches, (k, heads[:, g.n_heads + g.n_kv_heads :]), strict=True):
            cache[self._block, :, self._place] = new.to(cache.dtype)
        keys, values = (cache[: self._n_blocks].to(self._dtype) for cache in caches)
        out = self._decode(q, keys, values) if n == 1 else self._prompt(q, keys, values)
        return out.reshape(n, -1).float()

    def _prompt(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[n, n_heads, head_dim] from q of that shape, and keys and values as the cache has them."""
        of_heads = (
            x.transpose(0, 1)[:, None].expand(-1, self._group, -1, -1, -1).reshape(1, q.shape[1], -1, q.shape[2])
            for x in (keys, values)
        )
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *of_heads, self._mask, scale=1.0)
        return out[0].transpose(0, 1)

    def _decode(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """float32 [n_heads, head_dim] from q [1, n_heads, head_dim], and keys and values as the cache has them."""
        n_blocks, n_kv_heads, _, head_dim = keys.shape
        q = q.view(1, n_kv_heads, self._group, head_dim).expand(n_blocks, -1, -1, -1).flatten(0, 1)
        scores = _products(q, keys.flatten(0, 1).transpose(1, 2)).view(n_blocks, n_kv_heads, self._group, -1)
        scores = (scores + self._bias).permute(1, 2, 0, 3)  # [n_kv_heads, group, n_blocks, FLOAT_BLOCK]
        weights = scores.flatten(2).softmax(-1).to(self._dtype).view(scores.shape)
        parts = _products(weights.permute(2, 0, 1, 3).flatten(0, 1), values.flatten(0, 1))
        return parts.view(n_blocks, -1, head_dim).sum(0)


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix products of a batch, summed and stored in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _contents(tables: RopeTables) -> tuple[bytes, ...]:
    return tuple(table.tobytes() for table in vars(tables).values())


class TorchRope:
    """RoPE with tables [n_kv_heads, head_dim], for rows of `n_heads` query heads, which it also scales by `q_scale`,
    then the KV heads."""

    def __init__(self, tables: RopeTables, n_heads: int, waves: Waves, q_scale: float):
        kv_heads = np.arange(len(tables.partner))
        heads = np.concatenate([np.repeat(kv_heads, n_heads // len(kv_heads)), kv_heads])
        device = waves.cos.device
        self._waves = waves
        self._partner = torch.from_numpy(tables.partner[heads].astype(np.int64)).to(device)
        self._frequency = torch.from_numpy(tables.frequency[heads].astype(np.int64)).to(device)
        scale = np.where(np.arange(len(heads)) < n_heads, np.float32(q_scale), np.float32(1))[:, None]
        sign = tables.sign[heads]
        # cos counts for turned channels, sin with its sign; channels that RoPE leaves alone are only scaled
        self._of_cos, self._of_sin, self._still = (
            torch.from_numpy(factor * scale).to(device) for factor in (np.abs(sign), sign, sign == 0)
        )

    def begin(self, positions: torch.Tensor) -> None:
        """Prepare for tokens at `positions`, int64 [n]."""
        cos, sin = (wave[positions][:, self._frequency] for wave in (self._waves.cos, self._waves.sin))
        self._cos, self._sin = cos * self._of_cos + self._still, sin * self._of_sin  # [n, heads, head_dim]

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE of float32 x [n, heads, head_dim], float32."""
        partners = x.gather(2, self._partner.expand(x.shape))
        return x * self._cos + partners * self._sin
