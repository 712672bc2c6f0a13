"""Exact rows of all layers on the GPU. Each layer's ring holds the tail of one token; steps of many tokens run on a
larger ring, the stage, that the layers share:

    layer's ring  --tiles of the tail-->  stage  --pack, attend-->  stage  --newest tiles-->  layer's ring

So exact rows cost what their tail costs, whatever the number of tokens that go through the layers together.
"""

from collections.abc import Sequence

import torch

from ksort_gguf.binding.cuda import ExactRows, Layer
from ksort_gguf.cache.cuda import CudaCache
from ksort_gguf.cache.exact import ring_tiles
from ksort_gguf.cache.protocol import HeadShape
from ksort_gguf.names import TILE_TOKENS


class CudaExact:
    """The exact rows of a cache, for steps of up to n_ubatch tokens."""

    def __init__(self, cache: CudaCache, n_cached: torch.Tensor, n_ubatch: int):
        """n_cached: int32 [1] on the device, the tokens before a step."""
        o, self._cache, self._n_cached = cache.options, cache, n_cached
        self._has_any = cache.has_exact(o.k_type) or cache.has_exact(o.v_type)
        self._n_staged = ring_tiles(o.exact_tail, cache.n_ctx, n_ubatch) if self._has_any else 0
        self._begin, self._stage_begin = torch.zeros_like(n_cached), torch.zeros_like(n_cached)
        shapes = dict.fromkeys(cache.layers)
        self._stages = {heads: self._stage(heads) for heads in shapes} if self._n_staged > cache.n_ring_tiles else {}
        self._rings = [
            self._rows(heads, k, v, self._begin, cache.n_ring_tiles)
            for heads, k, v in zip(cache.layers, cache.k_exact, cache.v_exact, strict=True)
        ]
        self._staged = [
            self._rows(heads, *self._stages[heads], self._stage_begin, self._n_staged) if self._stages else None
            for heads in cache.layers
        ]
        self._is_staged = False

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """See Attention. Slots are read on the device, save by steps of many tokens, which are not captured."""
        rows = self._cache.n_ring_tiles * TILE_TOKENS
        self._is_staged = bool(self._stages) and n_tokens + self._cache.options.exact_tail - 1 > rows
        torch.minimum(self._begin, self._n_cached, out=self._begin)  # cache.exact.begin_after
        if self._is_staged:
            self._stage_begin.copy_(self._begin)
            first = n_slots - n_tokens
            self._old = self._tiles(max(0, first - rows), first)
            self._new = self._tiles(max(0, n_slots - rows), n_slots)
        torch.maximum(self._begin, self._n_cached + (n_tokens - rows), out=self._begin)

    def enter(self, layer: int, calls: Layer) -> None:
        """Before the step's tokens are packed: the rows that the layer's calls keep and read."""
        staged = self._staged[layer] if self._is_staged else None
        calls.set_exact(staged or self._rings[layer])
        if staged:
            for ring, stage in self._memory(layer):
                stage.index_copy_(0, self._old[1], ring.index_select(0, self._old[0]))

    def leave(self, layer: int) -> None:
        """After they have attended."""
        if self._is_staged:
            for ring, stage in self._memory(layer):
                ring.index_copy_(0, self._new[0], stage.index_select(0, self._new[1]))

    def widest(self, layer: int, calls: Layer) -> None:
        """Set what a step of the most tokens uses, to ask for its workspace."""
        calls.set_exact(self._staged[layer] or self._rings[layer])

    def _stage(self, heads: HeadShape) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        o = self._cache.options
        k, v = (self._cache.exact_rows(name, heads, self._n_staged) for name in (o.k_type, o.v_type))
        return k, v

    def _rows(
        self, heads: HeadShape, k: torch.Tensor | None, v: torch.Tensor | None, begin: torch.Tensor, n_tiles: int
    ) -> ExactRows:
        o, layout = self._cache.options, self._cache.layout
        sizes = dict(n_tail=o.exact_tail, n_sinks=o.exact_sinks, n_tiles=n_tiles)
        return ExactRows(layout(o.k_type, heads), k, layout(o.v_type, heads), v, begin, **sizes)

    def _memory(self, layer: int) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Ring and stage of the layer's keys and of its values, where they have exact rows."""
        cache = self._cache
        pairs = zip((cache.k_exact[layer], cache.v_exact[layer]), self._stages[cache.layers[layer]], strict=True)
        return [(ring, stage) for ring, stage in pairs if ring is not None and stage is not None]

    def _tiles(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in a ring and in the stage of the tiles of slots begin .. end-1, and of the sinks' tile."""
        tiles = range(begin // TILE_TOKENS, -(-end // TILE_TOKENS))
        tiles = tiles[-self._cache.n_ring_tiles :]
        places = [[0, *(1 + tile % n for tile in tiles)] for n in (self._cache.n_ring_tiles, self._n_staged)]
        ring, stage = (torch.tensor(place, device=self._begin.device) for place in places)
        return ring, stage
