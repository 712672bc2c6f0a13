"""The KV plan as data, and RoPE as tables: what packers and attention take beside the numbers themselves.

How one is made stands in plan/, how it is stored in plan/file.py and FORMAT.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ksort_gguf.errors import PlanError
from ksort_gguf.names import PLANS, RUN_TIME_STEPS, STEPS, TRANSFORM_TABLES


def parse_plan(text: str) -> tuple[str, tuple[str, ...]]:
    """The name and the steps of a plan in words: names of PLANS and STEPS joined by commas, as in "ksort,shift".

    The name is one of PLANS where the steps are its, else the steps joined by commas. Raises PlanError.
    """
    chosen: set[str] = set()
    for part in text.split(","):
        if part not in PLANS and part not in STEPS:
            known = ", ".join((*PLANS, *STEPS))
            raise PlanError(f"`plan` {text}: {part!r} is not one of {known}", field="plan")
        chosen.update(PLANS.get(part, (part,)))
    steps = tuple(step for step in STEPS if step in chosen)
    return next((name for name, known in PLANS.items() if known == steps), ",".join(steps)), steps


def has_run_time_steps(steps: tuple[str, ...]) -> bool:
    """Whether one of `steps` acts when keys and values are stored."""
    return not set(RUN_TIME_STEPS).isdisjoint(steps)


@dataclass(frozen=True, eq=False)
class RopeTables:
    """RoPE of heads in any order of their channels. Arrays are [head_dim] or [n_kv_heads, head_dim], a channel each:

    y[c] = x[c] cos[frequency[c]] + sign[c] x[partner[c]] sin[frequency[c]]; sign 0 means y[c] = x[c].
    """

    partner: np.ndarray  # uint16
    sign: np.ndarray  # int8
    frequency: np.ndarray  # uint16


@dataclass(frozen=True, eq=False)
class Transform:
    """What happens to a layer's keys, or values, between RoPE and storing (FORMAT.md section 3). Heads are KV heads.

    Its arrays are those of names.TRANSFORM_TABLES, None for steps that the layer does without.
    """

    shift: np.ndarray | None = None  # float32 [n_kv_heads, head_dim]
    scale: np.ndarray | None = None  # float32 [n_kv_heads, head_dim], positive
    rotate: bool = False
    permutation: np.ndarray | None = (
        None  # int32 [n_kv_heads, head_dim]: place i gets rotated channel permutation[h, i]
    )
    # float32 [n_kv_heads, head_dim, head_dim], zero on and below the diagonal: [h, c, j] times channel c's rounding
    # error is taken from channel j
    feedback: np.ndarray | None = None

    def tables(self) -> dict[str, np.ndarray]:
        """The arrays that are there, by their names in names.TRANSFORM_TABLES."""
        found = {table.name: getattr(self, table.name) for table in TRANSFORM_TABLES}
        return {name: values for name, values in found.items() if values is not None}


@dataclass(frozen=True, eq=False)
class Transforms:
    """The transforms of all layers: `rotate` for every layer, the arrays of Transform by name and layer.

    A layer without an array skips that step. Channels are in folded order.
    """

    rotate: bool = False
    tables: Mapping[str, Mapping[int, np.ndarray]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.rotate or any(self.tables.values())

    def layer(self, layer: int) -> Transform | None:
        """The transform of a layer, or None if no layer has one: with one, rounding is by least error."""
        if not self:
            return None
        found = {name: arrays[layer] for name, arrays in self.tables.items() if layer in arrays}
        return Transform(rotate=self.rotate, **found)


@dataclass(frozen=True, eq=False)
class KVPlan:
    """A plan and what it was made for."""

    name: str  # one of PLANS, or its steps joined by commas
    steps: tuple[str, ...]  # of STEPS, in the order applied
    row_order: str  # the stock row order that channel numbers refer to, see models/rope.py
    base_architecture: str  # general.architecture of the stock model
    weights_hash: str  # "sha256:<hex>" of the stock projections, see plan/rank.py
    rank: str | None = None  # one of names.RANKS: what the channels were sorted by; None: no order
    statistics: str | None = None  # in words, what it was made from: "weights", or a text
    # int32 [n_layers, n_kv_heads, head_dim]: order[l, h, i] is the stock channel that stands at place i; None: no order
    order: np.ndarray | None = None
    keys: Transforms = Transforms()
    values: Transforms = Transforms()
