"""Attention of one context on the GPU over float keys, by torch.

Nothing that a CUDA graph fixes depends on a length but the number of blocks looked at.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.cache.cuda import FLOAT_BLOCK, FLOAT_TYPES, CudaCache
from ksort_gguf.cache.protocol import LayerPlan


class FloatAttention:
    """cache.protocol.Attention over float keys.

    Prompts take scaled_dot_product_attention with a mask. It would give a decode step's whole context to one
    multiprocessor a head, so a step's products go over all blocks of slots at once, and its softmax over their scores.
    """

    def __init__(self, cache: CudaCache, layers: Sequence[LayerPlan], n_cached: torch.Tensor):
        self._cache, self._n_cached, self._heads = cache, n_cached, [plan.heads for plan in layers]
        self._dtype = FLOAT_TYPES[cache.options.k_type]
        shared: dict[tuple, TorchRope] = {}  # of the same contents once: without an order all layers have the same
        for plan in layers:
            if (contents := _contents(plan)) not in shared:
                shared[contents] = TorchRope(plan, cache.n_ctx, n_cached.device)
        self._ropes = [shared[_contents(plan)] for plan in layers]
        self._distinct_ropes = list(shared.values())
        self._masks: dict[int, _Mask] = {}

    def bound(self, n_tokens: int) -> int:
        """See Attention."""
        step = max(FLOAT_BLOCK, (1 << n_tokens.bit_length()) // 8)  # so a longer context takes few more graphs
        return min(-(-n_tokens // step) * step, self._cache.k[0].shape[0] * FLOAT_BLOCK)

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """See Attention."""
        self._n_blocks = -(-n_slots // FLOAT_BLOCK)
        slots = self._n_cached.long() + torch.arange(n_tokens, device=self._n_cached.device)
        self._block, self._place = slots // FLOAT_BLOCK, slots % FLOAT_BLOCK
        self._masks = {window: _Mask(slots, self._n_blocks, window) for window in {h.window for h in self._heads}}
        for rope in self._distinct_ropes:
            rope.begin(slots)

    def run(self, layer: int, qkv: FloatRows, out: FloatRows) -> None:
        """See Attention."""
        h, n = self._heads[layer], qkv.n_rows
        heads = qkv.tensor().view(n, -1, h.head_dim)
        turned = self._ropes[layer].turn(heads[:, : h.n_heads + h.n_kv_heads]).to(self._dtype)
        q, k = turned.split((h.n_heads, h.n_kv_heads), 1)  # [n, heads, head_dim]
        caches = self._cache.k[layer], self._cache.v[layer]
        for cache, new in zip(caches, (k, heads[:, h.n_heads + h.n_kv_heads :]), strict=True):
            cache[self._block, :, self._place] = new.to(cache.dtype)
        keys, values = (cache[: self._n_blocks].to(self._dtype) for cache in caches)
        attend = _decode if n == 1 else _prompt
        attend(q, keys, values, self._masks[h.window], out.tensor().view(n, h.n_heads, h.head_dim))


class _Mask:
    """What each token of a step sees of the slots looked at."""

    def __init__(self, slots: torch.Tensor, n_blocks: int, window: int):
        distance = slots[:, None] - torch.arange(n_blocks * FLOAT_BLOCK, device=slots.device)
        self.visible = distance >= 0 if not window else (distance >= 0) & (distance < window)  # [n, slots]
        if len(slots) == 1:  # what is added to a decode step's scores
            bias = torch.zeros(self.visible.shape, device=slots.device).masked_fill_(~self.visible, -math.inf)
            self.bias = bias.view(n_blocks, 1, 1, FLOAT_BLOCK)


def _prompt(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: _Mask, out: torch.Tensor) -> None:
    """Into `out` [n, n_heads, head_dim], from q of that shape, and keys and values as the cache has them."""
    group = q.shape[1] // keys.shape[1]
    k, v = (
        x.transpose(0, 1)[:, None].expand(-1, group, -1, -1, -1).reshape(1, q.shape[1], -1, q.shape[2])
        for x in (keys, values)
    )
    attended = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, mask.visible, scale=1.0)
    out.copy_(attended[0].transpose(0, 1))


def _decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: _Mask, out: torch.Tensor) -> None:
    """Into `out`, float32 [1, n_heads, head_dim], from q of that shape, and keys and values as the cache has them."""
    n_blocks, n_kv_heads, _, head_dim = keys.shape
    group = q.shape[1] // n_kv_heads
    q = q.view(1, n_kv_heads, group, head_dim).expand(n_blocks, -1, -1, -1).flatten(0, 1)
    scores = _products(q, keys.flatten(0, 1).transpose(1, 2)).view(n_blocks, n_kv_heads, group, -1)
    scores = (scores + mask.bias).permute(1, 2, 0, 3)  # [n_kv_heads, group, n_blocks, FLOAT_BLOCK]
    weights = scores.flatten(2).softmax(-1).to(q.dtype).view(scores.shape)
    parts = _products(weights.permute(2, 0, 1, 3).flatten(0, 1), values.flatten(0, 1))
    torch.sum(parts.view(n_blocks, -1, head_dim), 0, out=out[0])


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix products of a batch, summed and stored in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _contents(plan: LayerPlan) -> tuple:
    return (plan.heads, plan.rope_table, *(table.tobytes() for table in vars(plan.rope).values()))


class TorchRope:
    """RoPE of rows of a layer's query heads, which it also multiplies by the scale of scores, then its KV heads."""

    def __init__(self, plan: LayerPlan, n_ctx: int, device: torch.device):
        h, tables = plan.heads, plan.rope
        kv_heads = np.arange(h.n_kv_heads)
        heads = np.concatenate([np.repeat(kv_heads, h.n_heads // h.n_kv_heads), kv_heads])
        self._positions = [torch.from_numpy(part).to(device) for part in plan.rope_table.arrays(n_ctx)]
        self._partner = torch.from_numpy(tables.partner[heads].astype(np.int64)).to(device)
        self._frequency = torch.from_numpy(tables.frequency[heads].astype(np.int64)).to(device)
        scale = np.where(np.arange(len(heads)) < h.n_heads, np.float32(h.scale), np.float32(1))[:, None]
        sign = tables.sign[heads]
        # cos counts for turned channels, sin with its sign; channels that RoPE leaves alone are only scaled
        self._of_cos, self._of_sin, self._still = (
            torch.from_numpy(factor * scale).to(device) for factor in (np.abs(sign), sign, sign == 0)
        )

    def begin(self, slots: torch.Tensor) -> None:
        """Prepare for tokens at the positions `slots`, int64 [n]."""
        cos, sin = (part[slots][:, self._frequency] for part in self._positions)
        self._cos, self._sin = cos * self._of_cos + self._still, sin * self._of_sin  # [n, heads, head_dim]

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE of float32 x [n, heads, head_dim], float32."""
        partners = x.gather(2, self._partner.expand(x.shape))
        return x * self._cos + partners * self._sin
