"""What an order does for blocks: how far the largest channel of a block stands above the others."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ksort_gguf.kvplan import KVPlan
from ksort_gguf.models.source import Source
from ksort_gguf.plan.fold import inverse_order
from ksort_gguf.plan.rank import key_energies, key_projection


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer's key channels, by their rank (a norm); means over KV heads.

    A block's exponent is set by its largest value, so a crest near 1 wastes no mantissa bits on the others.
    """

    spread: float  # largest / median norm of a head
    crest_stock: float  # largest / root mean square norm of a block, in stock order
    crest_sorted: float  # the same in the plan's order


def layer_statistics(source: Source, plan: KVPlan | None, block_size: int) -> Iterator[LayerStatistics]:
    """Statistics of each layer in the order of `plan`, that of a folded source, or in that of the paper's.

    Norms are those that the plan ranked by; row norms of Wk where that was measured on keys. Raises KsortError.
    """
    orders = None if plan is None else plan.order
    rank = plan.rank if plan and plan.rank and plan.rank != "key-rms" else "weight-norm"
    for layer, attention in enumerate(source.spec.attentions):
        weight, bias = key_projection(source, attention)
        if orders is not None:
            rows = np.arange(attention.n_kv_heads)[:, None] * attention.head_dim + inverse_order(orders[layer])
            weight, bias = weight[rows.reshape(-1)], None if bias is None else bias[rows.reshape(-1)]
        norms = np.sqrt(key_energies(source, layer, rank, weight, bias))
        order = np.argsort(-norms, axis=1, kind="stable") if orders is None else orders[layer]
        yield LayerStatistics(
            spread=float(np.mean(norms.max(axis=1) / np.maximum(np.median(norms, axis=1), np.finfo(float).tiny))),
            crest_stock=mean_crest(norms, block_size),
            crest_sorted=mean_crest(np.take_along_axis(norms, order, axis=1), block_size),
        )


def mean_crest(norms: np.ndarray, block_size: int) -> float:
    """Mean over blocks of largest / root mean square; norms [n_kv_heads, head_dim], the last block may be shorter."""
    crests = []
    for start in range(0, norms.shape[1], block_size):
        block = norms[:, start : start + block_size]
        rms = np.sqrt(np.mean(block**2, axis=1))
        crests.append(block.max(axis=1) / np.maximum(rms, np.finfo(float).tiny))
    return float(np.mean(crests))
