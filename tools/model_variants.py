"""One model and the same model under K plans: only what a plan changes exists more than once."""

import dataclasses
import sys
from pathlib import Path

import torch

from ksort_gguf.errors import KsortError
from ksort_gguf.families.rope import RopeTables, folded_tables, stock_tables
from ksort_gguf.plan.calibrate import default_text
from ksort_gguf.plan.fold import fold_rows
from ksort_gguf.plan.kplan import KPlan, Transforms, parse_plan
from ksort_gguf.plan.make import Calibration, make_plan
from ksort_gguf.plan.plan_file import check_plan, read_plan
from ksort_gguf.runtime.model import Model
from ksort_gguf.runtime.weights import LayerWeights, ModelWeights, load_weights
from ksort_gguf.sources.gguf_file import open_gguf
from ksort_gguf.tokenizer.tokenizer import Tokenizer


def parse_made_plan(name: str) -> tuple[str, bool]:
    """What `order+shift:text` means: a plan for make_plan, and whether it is made from text. Raises KsortError."""
    steps, _, source = name.partition(":")
    plan = steps.replace("+", ",")
    if source not in ("", "text") or not parse_plan(plan)[1]:
        raise KsortError(f"plan {name!r} is not a plan with an optional :text behind it: see cache_rows.py")
    return plan, bool(source)


class ModelVariants:
    """A GGUF as it is, and under plans: plan files, by name without ending, and plans made here (parse_made_plan).

    Weights are read once; a plan's model has q and k projections of its own and shares everything else.
    Raises KsortError for files that cannot be run, plans of other weights, and two plan files of one name.
    """

    def __init__(self, path: str, plan_files: list[str], n_threads: int):
        source = open_gguf(path)
        try:
            self.plans = _read_plans(plan_files, source)
            self.family, self.geometry, self._file_plan = source.family, source.geometry, source.plan
            self._weights = load_weights(source, None)
            self.tokenizer = Tokenizer.from_metadata(source.metadata, path)
        finally:
            source.close()
        self._path, self._n_threads = path, n_threads
        self._planned: dict[str | None, tuple[ModelWeights, KPlan | None]] = {None: (self._weights, self._file_plan)}
        self._models: dict[tuple[str | None, bool], Model] = {}

    @property
    def is_folded(self) -> bool:
        """Whether the file holds a plan of its own."""
        return self._file_plan is not None

    @property
    def n_vocab(self) -> int:
        return self._weights.output.shape[0]

    def model(self, plan: str | None = None, run_time_steps: bool = True) -> Model:
        """The model as the file is, or under a plan; without its run-time steps, only folded by its order."""
        key = plan, run_time_steps
        if key not in self._models:
            weights, k_plan = self._under(plan)
            if not run_time_steps:
                k_plan = dataclasses.replace(k_plan, keys=Transforms(), values=Transforms())
            self._models[key] = Model(weights, self.family, self.geometry, k_plan, self._n_threads)
        return self._models[key]

    def plan_of(self, plan: str | None) -> KPlan | None:
        """A plan by its name, or the file's own."""
        return self._under(plan)[1]

    def _under(self, plan: str | None) -> tuple[ModelWeights, KPlan | None]:
        """The weights folded by a plan, and the plan."""
        if plan not in self._planned:
            k_plan = self.plans[plan] if plan in self.plans else _make_plan(self._path, plan)
            layers = [_folded(w, k_plan, layer, self.geometry) for layer, w in enumerate(self._weights.layers)]
            self._planned[plan] = dataclasses.replace(self._weights, layers=layers), k_plan
        return self._planned[plan]

    def rope_tables(self, layer: int) -> RopeTables:
        """RoPE tables of a layer of the model as the file is."""
        stock = stock_tables(self.geometry.head_dim, self.geometry.n_rot, self.family.row_order)
        if self._file_plan is None or self._file_plan.order is None:
            return stock
        return folded_tables(stock, self._file_plan.order[layer])


def _make_plan(path: str, name: str) -> KPlan:
    plan, from_text = parse_made_plan(name)
    with open_gguf(path) as source:
        made, notes = make_plan(source, plan, calibration=Calibration(default_text()) if from_text else None)
    for note in notes:
        print(f"note: {name}: {note}", file=sys.stderr)
    return made


def _read_plans(plan_files: list[str], source) -> dict[str, KPlan]:
    plans = {}
    for file in plan_files:
        name = Path(file).stem
        if name in plans:
            raise KsortError(f"--plan-file {file}: another plan file is called {name!r} too: rename one")
        plans[name] = read_plan(file)
        check_plan(plans[name], source, file)
    if plans and source.plan is not None:
        raise KsortError(f"{source.path}: is folded already: give the stock file beside --plan-file")
    return plans


def _folded(weights: LayerWeights, plan: KPlan, layer: int, geometry) -> LayerWeights:
    """A layer's weights with q and k rows in the plan's order."""
    if plan.order is None:
        return weights
    qkv = _fold_q_and_k(weights.qkv, plan.order[layer], geometry)
    bias = None if weights.qkv_bias is None else _fold_q_and_k(weights.qkv_bias, plan.order[layer], geometry)
    return dataclasses.replace(weights, qkv=qkv, qkv_bias=bias)


def _fold_q_and_k(qkv: torch.Tensor, order, geometry) -> torch.Tensor:
    """`qkv` [(n_heads + 2 n_kv_heads) * head_dim, ...] with q and k rows folded by `order` [n_kv_heads, head_dim]."""
    g, folded = geometry, qkv.clone()
    for first, n_heads in ((0, g.n_heads), (g.n_heads * g.head_dim, g.n_kv_heads)):
        rows = folded[first : first + n_heads * g.head_dim]
        raw = fold_rows(rows.view(torch.uint8).numpy().reshape(-1), tuple(rows.shape), order, n_heads)
        rows.copy_(torch.from_numpy(raw).view(rows.dtype).view(rows.shape))
    return folded
