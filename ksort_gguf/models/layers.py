"""What attention is given, a layer: heads, RoPE and a plan's transforms, from a spec."""

from collections.abc import Callable

import numpy as np

from ksort_gguf.cache.protocol import CacheOptions, HeadShape, LayerPlan
from ksort_gguf.cache.rope_table import RopeTable
from ksort_gguf.kvplan import KVPlan, Transforms
from ksort_gguf.models.rope import frequencies, layer_tables
from ksort_gguf.models.spec import Attention, ModelSpec, Rope
from ksort_gguf.names import CACHE_TYPES

RopeFactors = Callable[[Rope, int], np.ndarray | None]  # as Source.rope_factors


def head_shape(attention: Attention) -> HeadShape:
    """The heads of a layer."""
    a = attention
    return HeadShape(a.n_heads, a.n_kv_heads, a.head_dim, a.scale, a.window)


class LayerPlans:
    """The LayerPlans of a model's contexts. Rope tables are shared by its layers and contexts."""

    def __init__(self, spec: ModelSpec, plan: KVPlan | None, rope_factors: RopeFactors):
        """rope_factors: read here, for short and for long contexts."""
        self.heads = [head_shape(attention) for attention in spec.attentions]
        self._spec, self._plan = spec, plan
        self._ropes = [layer_tables(a, spec.row_order, plan, layer) for layer, a in enumerate(spec.attentions)]
        self._tables: dict[tuple[Rope | None, bool], RopeTable] = {}
        for rope in dict.fromkeys(a.rope for a in spec.attentions):
            for is_long in (False, True):
                self._tables[rope, is_long] = _rope_table(rope, is_long, rope_factors)

    def layers(self, options: CacheOptions, n_ctx: int) -> list[LayerPlan]:
        """For a context of `n_ctx` tokens; a plan transforms BFP types only."""
        plan = self._plan
        k_plan = plan.keys if plan and CACHE_TYPES[options.k_type].is_bfp else Transforms()
        v_plan = plan.values if plan and CACHE_TYPES[options.v_type].is_bfp else Transforms()
        return [
            LayerPlan(
                heads=heads,
                rope=self._ropes[layer],
                rope_table=self._tables[a.rope, a.rope is not None and n_ctx > a.rope.original_context],
                k_transform=k_plan.layer(layer),
                v_transform=v_plan.layer(layer),
            )
            for layer, (heads, a) in enumerate(zip(self.heads, self._spec.attentions, strict=True))
        ]


def _rope_table(rope: Rope | None, is_long: bool, rope_factors: RopeFactors) -> RopeTable:
    if rope is None:
        return RopeTable(np.zeros(1))
    n_ctx = rope.original_context + 1 if is_long else rope.original_context
    return RopeTable(frequencies(rope, rope_factors(rope, n_ctx)), rope.magnitude)
