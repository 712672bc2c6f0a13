"""The K plan: for each layer and KV head, how the channels of keys (and queries) are rearranged."""

from dataclasses import dataclass

import numpy as np

RANKS = ("weight-norm", "effective-norm")


@dataclass(frozen=True, eq=False)
class KPlan:
    """A plan and what it was made for. The steps known today: "order" (K-sort)."""

    name: str  # "ksort"
    steps: tuple[str, ...]  # in the order applied
    rank: str  # one of RANKS: what the channels were sorted by
    row_order: str  # the stock row order that channel numbers refer to, see families/rope.py
    base_architecture: str  # general.architecture of the stock model
    weights_hash: str  # "sha256:<hex>" of the stock projections, see rank.ProjectionHash
    # int32 [n_layers, n_kv_heads, head_dim]: order[l, h, i] is the stock channel that stands at place i; None: no order
    order: np.ndarray | None
