"""Attention of one context on the GPU over packed keys, by libksort_cuda. All calls only enqueue, so that steps can be
captured in a CUDA graph."""

from collections.abc import Sequence

import numpy as np
import torch

from ksort_gguf.binding.cuda import Layer, Tokens
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.cache.cuda import CudaCache
from ksort_gguf.cache.cuda_exact import CudaExact
from ksort_gguf.cache.cuda_float_attention import FloatAttention
from ksort_gguf.cache.protocol import Attention, LayerPlan
from ksort_gguf.cache.rope_table import RopeTable


def cuda_attention(
    cache: CudaCache, layers: Sequence[LayerPlan], n_cached: torch.Tensor, status: torch.Tensor, n_ubatch: int
) -> Attention:
    """Attention over `cache`. n_cached, status: int32 [1] each on its device: the tokens before a step, and where
    kernels report what they find. n_ubatch: the most tokens of a step."""
    if cache.is_packed:
        return PackedAttention(cache, layers, n_cached, status, n_ubatch)
    return FloatAttention(cache, layers, n_cached)


class PackedAttention:
    """cache.protocol.Attention over BFP keys."""

    def __init__(
        self, cache: CudaCache, layers: Sequence[LayerPlan], n_cached: torch.Tensor, status: torch.Tensor,
        n_ubatch: int,
    ):  # fmt: skip
        self._heads = [plan.heads for plan in layers]
        self._n_ctx, self._n_cached, self._status = cache.n_ctx, n_cached, status
        device = n_cached.device
        self._exact = CudaExact(cache, n_cached, n_ubatch)

        def on_device(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        positions: dict[RopeTable, list[torch.Tensor]] = {
            table: [on_device(part) for part in table.arrays(cache.n_ctx)]
            for table in dict.fromkeys(plan.rope_table for plan in layers)
        }
        options = cache.options
        self._layers = [
            Layer(
                cache.layout(options.k_type, plan.heads),
                cache.k[layer],
                cache.layout(options.v_type, plan.heads),
                cache.v[layer],
                n_heads=plan.heads.n_heads,
                scale=plan.heads.scale,
                window=plan.heads.window,
                max_slots=cache.n_ctx,
                x_type="f32",
                on_device=on_device,
                rope=plan.rope,
                cos=positions[plan.rope_table][0],
                sin=positions[plan.rope_table][1],
                k_transform=plan.k_transform,
                v_transform=plan.v_transform,
            )
            for layer, plan in enumerate(layers)
        ]
        for layer, calls in enumerate(self._layers):
            self._exact.widest(layer, calls)
        sizes = (layer.workspace_bytes(self._tokens(n)) for n in (1, n_ubatch) for layer in self._layers)
        self._tokens_of: dict[int, Tokens] = {}  # by their number: the same object spares the layers work
        self._workspace = torch.empty(max(sizes), dtype=torch.uint8, device=device)

    def bound(self, n_tokens: int) -> int:
        """See Attention: one captured step serves the whole context."""
        return self._n_ctx

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """See Attention; where the tokens stand is read on the device."""
        if n_tokens not in self._tokens_of:
            self._tokens_of[n_tokens] = self._tokens(n_tokens)
        self._new = self._tokens_of[n_tokens]
        self._exact.begin(n_tokens, n_slots)
        self._stream = torch.cuda.current_stream().cuda_stream if self._n_cached.is_cuda else 0

    def run(self, layer: int, qkv: FloatRows, out: FloatRows) -> None:
        """See Attention."""
        h, calls = self._heads[layer], self._layers[layer]
        n_q, n_kv = h.n_heads * h.head_dim, h.n_kv_heads * h.head_dim
        self._exact.enter(layer, calls)
        calls.pack(self._new, qkv.columns(n_q, n_q + n_kv), qkv.columns(n_q + n_kv, n_q + 2 * n_kv), self._stream)
        calls.attend(self._new, qkv, out, self._workspace, self._stream)
        self._exact.leave(layer)

    def _tokens(self, n_tokens: int) -> Tokens:
        return Tokens(n_tokens, self._n_cached, self._status)
