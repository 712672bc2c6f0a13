"""One model and the same model under KV plans: only what a plan changes exists more than once."""

import dataclasses
import sys
from pathlib import Path

from ksort_gguf.cache.protocol import CacheOptions, LayerPlan
from ksort_gguf.engine.calibration import calibration
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer
from ksort_gguf.errors import KsortError
from ksort_gguf.kvplan import KVPlan, Transforms, parse_plan
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.models.layers import LayerPlans
from ksort_gguf.models.run_native import NativeModel
from ksort_gguf.models.source import Source
from ksort_gguf.models.weights import ModelWeights, WeightReader, load_weights
from ksort_gguf.plan.file import check_plan, folded_plan, read_plan
from ksort_gguf.plan.fold import folded_tensors
from ksort_gguf.plan.make import make_plan


def parse_made_plan(name: str) -> tuple[str, bool]:
    """What `order+shift:text` means: a plan for make_plan, and whether it is made from text. Raises KsortError."""
    steps, _, source = name.partition(":")
    plan = steps.replace("+", ",")
    if source not in ("", "text") or not parse_plan(plan)[1]:
        raise KsortError(f"plan {name!r} is not a plan with an optional :text behind it: see cache_rows.py")
    return plan, bool(source)


class ModelVariants:
    """A GGUF as it is, and under plans: plan files, by name without ending, and plans made here (parse_made_plan).

    A plan's model has q, k and v projections of its own and shares everything else.
    Raises KsortError for files that cannot be run, plans of other weights, and two plan files of one name.
    """

    def __init__(self, path: str | Path, plan_files: list[str], n_threads: int):
        self._path, self._n_threads = Path(path), n_threads
        with open_gguf(self._path) as source:
            self.plans = _read_plans(plan_files, source)
            self.spec, file_plan = source.spec, folded_plan(source)
            self._weights = load_weights(source)
            self._stock_layers = LayerPlans(source.spec, file_plan, source.rope_factors)
            self.tokenizer = Tokenizer.from_metadata(source.metadata, str(path))
        self.is_folded = file_plan is not None
        self._planned: dict[str | None, tuple[ModelWeights, KVPlan | None]] = {None: (self._weights, file_plan)}
        self._models: dict[tuple[str | None, bool], NativeModel] = {}

    @property
    def bos_id(self) -> int | None:
        """What a text begins with; None where the tokenizer adds nothing."""
        return self.tokenizer.bos_id if self.tokenizer.add_bos else None

    def model(self, plan: str | None = None, run_time_steps: bool = True) -> NativeModel:
        """The model as the file is, or under a plan; without its run-time steps, only folded by its order."""
        key = plan, run_time_steps
        if key not in self._models:
            weights, kv_plan = self._under(plan)
            if kv_plan is not None and not run_time_steps:
                kv_plan = dataclasses.replace(kv_plan, keys=Transforms(), values=Transforms())
            with open_gguf(self._path) as source:
                self._models[key] = NativeModel(self.spec, weights, kv_plan, source.rope_factors, self._n_threads)
        return self._models[key]

    def plan_of(self, plan: str | None) -> KVPlan | None:
        """A plan by its name, or the file's own."""
        return self._under(plan)[1]

    def layers(self, n_ctx: int) -> list[LayerPlan]:
        """The layers of the model as the file is, in float: for attention of one's own in contexts of `n_ctx`."""
        return self._stock_layers.layers(CacheOptions("f32", "f32", 32, "f32"), n_ctx)

    def _under(self, plan: str | None) -> tuple[ModelWeights, KVPlan | None]:
        """The weights folded by a plan, and the plan."""
        if plan not in self._planned:
            assert plan is not None  # the file's own is there from the start
            with open_gguf(self._path) as source:
                kv_plan = self.plans[plan] if plan in self.plans else _make_plan(source, plan)
                self._planned[plan] = self._folded(source, kv_plan), kv_plan
        return self._planned[plan]

    def _folded(self, source: Source, plan: KVPlan) -> ModelWeights:
        """The model's weights with q and k rows in the plan's order."""
        if plan.order is None:
            return self._weights
        source.tensors = dict(folded_tensors(source, plan.order))
        reader, blocks = WeightReader(source), []
        for block, weights in zip(self.spec.blocks, self._weights.blocks, strict=True):
            own = reader.block(block)
            blocks.append(dataclasses.replace(weights, qkv=own.qkv, qkv_bias=own.qkv_bias))
        return dataclasses.replace(self._weights, blocks=blocks)


def _make_plan(source: Source, name: str) -> KVPlan:
    plan, from_text = parse_made_plan(name)
    made, notes = make_plan(source, plan, calibration=calibration() if from_text else None)
    for note in notes:
        print(f"note: {name}: {note}", file=sys.stderr)
    return made


def _read_plans(plan_files: list[str], source: Source) -> dict[str, KVPlan]:
    plans: dict[str, KVPlan] = {}
    for file in plan_files:
        name = Path(file).stem
        if name in plans:
            raise KsortError(f"--plan-file {file}: another plan file is called {name!r} too: rename one")
        plans[name] = read_plan(Path(file))
        check_plan(plans[name], source, file)
    if plans:
        source.refuse_folded("give the stock file beside --plan-file")
    return plans
