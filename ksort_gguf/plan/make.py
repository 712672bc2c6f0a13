"""Making a plan for a stock model: its steps, from text or from the weights alone, checked layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ksort_gguf.errors import KsortError, PlanError
from ksort_gguf.kvplan import KVPlan, Transform, Transforms, has_run_time_steps, parse_plan
from ksort_gguf.models.source import Source
from ksort_gguf.models.spec import Attention
from ksort_gguf.names import (
    DEFAULT_BLOCK_TYPE,
    DEFAULT_RANK,
    RANKS,
    RUN_TIME_STEPS,
    VALUE_STEPS,
    check_block_size,
    default_block_size,
)
from ksort_gguf.plan.balance import key_transform, value_metric, value_transform
from ksort_gguf.plan.choose import HARM, NO_GAIN, Trial, best_transform, checked_order
from ksort_gguf.plan.moments import MAX_POSITIONS, LayerMoments
from ksort_gguf.plan.rank import layer_order, weights_hash
from ksort_gguf.plan.weight_moments import moments_of_weights


@dataclass(frozen=True)
class Calibration:
    """Text that a plan is made from.

    tokenize(source, window): token ids of the text in windows of `window` tokens, or raises KsortError. n_tokens: the
    most that is used.
    """

    tokenize: Callable[[Source, int, int], Sequence[Sequence[int]]]
    n_tokens: int


def make_plan(
    source: Source,
    plan: str = "balanced",
    *,
    rank: str | None = None,
    calibration: Calibration | None = None,
    block_size: int | None = None,
) -> tuple[KVPlan, list[str]]:
    """A plan for a stock model, and notes on what was left out because it would have raised the expected error: at
    worst everything, and the plan has no steps. A note also says where a plan hardly helps.

    plan: as parse_plan takes it, not "none". rank: for the step order (None: DEFAULT_RANK). Without `calibration` the
    weights alone are used. `block_size` is what the check assumes (default: as default_block_size). Shows progress
    where stderr is a terminal. Deterministic.
    Raises KsortError as check_request, and for a block size that does not fit, a folded model, one whose attention a
    step would change, text that is too short, missing, misshapen or non-finite tensors, and weights that overflow.
    """
    check_request(plan, rank, calibration)
    name, steps = parse_plan(plan)
    rank = rank or DEFAULT_RANK
    default = default_block_size(source.spec.min_head_dim)
    if block_size not in (None, default):  # the default is larger than the smallest heads, which take no blocks
        check_block_size(block_size or 0, source.spec.min_head_dim)
    source.refuse_folded("make a plan from the stock model")
    notes = []
    if "order" in steps and (reason := why_unsorted(source)):
        notes.append(f"the plan is left without order: {reason}")
        name, steps = parse_plan(",".join(step for step in steps if step != "order") or "none")
    digest = weights_hash(source)
    maker = _Maker(source, steps, rank, calibration, block_size or default)
    statistics = maker.run() if steps else None
    for left_out in (("rotate",), RUN_TIME_STEPS, ("order",)):
        if steps and maker.key_error > 1 and set(left_out) & set(steps):
            dropped = ", ".join(step for step in steps if step in left_out)
            notes.append(f"the plan is left without {dropped}: it would raise the expected error")
            name, steps = parse_plan(",".join(step for step in steps if step not in left_out) or "none")
            maker = _Maker(source, steps, rank, calibration, maker.block_size)
            statistics = maker.run() if steps else None
    if steps and maker.key_error > NO_GAIN:
        better = "" if calibration else "add `calibrate`, which says it better, or "
        notes.append(
            f"the plan hardly helps, its expected error is {maker.key_error:.1%} of that without one: "
            f"{better}compare both by `ksort-gguf perplexity`"
        )
    values = maker.values.result("rotate" in steps)
    if values and maker.value_error > 1:
        notes.append("values are left without a plan: it would raise the expected error")
        values = Transforms()
    made = KVPlan(
        name=name,
        steps=steps,
        row_order=source.spec.row_order,
        base_architecture=source.spec.architecture,
        weights_hash=digest,
        rank=rank if "order" in steps else None,
        statistics=statistics,
        order=np.stack(maker.orders) if "order" in steps else None,
        keys=maker.keys.result("rotate" in steps),
        values=values,
    )
    return made, notes + maker.notes


def check_request(plan: str, rank: str | None, calibration: Calibration | None) -> None:
    """Raise PlanError for unknown names, a rank or a calibration that `plan` has no use for, and no tokens at all."""
    _, steps = parse_plan(plan)
    if rank is not None and rank not in RANKS:
        raise PlanError(f"`rank` {rank} is not one of {', '.join(RANKS)}", field="rank")
    if rank is not None and "order" not in steps:
        raise PlanError(
            f"`rank` {rank}: plan {plan} does not sort: add the step order to `plan`, or leave `rank` out", field="rank"
        )
    if calibration is not None and not steps:
        raise PlanError(
            f"`calibrate`: plan {plan} has nothing to calibrate: name a plan or some steps with `plan`",
            field="calibrate",
        )
    if calibration is not None and calibration.n_tokens < 1:
        raise PlanError(
            f"`calibrate_tokens` {calibration.n_tokens} is not positive: pass a count of tokens",
            field="calibrate_tokens",
        )


def why_unsorted(source: Source) -> str | None:
    """Why the step order cannot be folded into this model, or None where it can: it must not change its attention."""
    for attention in source.spec.attentions:
        for norm in (attention.q_norm, attention.k_norm):
            if norm is not None:
                return f"it cannot be folded past the gain {norm.gain}, which all heads share"
    return None


class _Tables:
    """The tables of Transforms while layers come in."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[int, np.ndarray]] = {}

    def add(self, layer: int, transform: Transform) -> None:
        for name, values in transform.tables().items():
            self._tables.setdefault(name, {})[layer] = values

    def result(self, rotate: bool) -> Transforms:
        return Transforms(rotate, self._tables)


class _Maker:
    """Orders and transforms of all layers, one after another."""

    def __init__(
        self, source: Source, steps: tuple[str, ...], rank: str, calibration: Calibration | None, block_size: int
    ):
        self._source, self._steps, self._rank, self._calibration = source, steps, rank, calibration
        self.block_size = block_size
        self._checked_type = "bfp12" if "order" in steps else DEFAULT_BLOCK_TYPE  # sorting is for shared exponents
        self.orders: list[np.ndarray] = []
        self.keys, self.values = _Tables(), _Tables()
        self._notes: list[str] = []
        self._unsorted: list[str] = []  # key heads, as layer.head
        self._key_errors: list[float] = []
        self._value_errors: list[float] = []

    @property
    def key_error(self) -> float:
        """The expected error of scores over all layers, 1 being that without a plan."""
        return float(np.mean(self._key_errors))

    @property
    def value_error(self) -> float:
        """The same of what values add to the hidden state."""
        return float(np.mean(self._value_errors)) if self._value_errors else 1.0

    @property
    def notes(self) -> list[str]:
        """What was left out of single layers and heads."""
        if not self._unsorted:
            return self._notes
        count = f"{len(self._unsorted)} of {sum(map(len, self.orders))}"
        heads = " ".join(self._unsorted)
        note = f"{count} key heads are left unsorted: the expected error is smaller so (layer.head: {heads})"
        return [note, *self._notes]

    def run(self) -> str:
        """Make all layers. Returns what they were made from, for KPlan.statistics."""
        spec = self._source.spec
        if self._calibration is None:
            with tqdm(total=spec.n_layers, desc="planning", unit="layer", disable=None) as bar:
                moments_of_weights(self._source, self.add, bar.update)
            return "weights"
        from ksort_gguf.plan.text_moments import moments_of_text  # torch comes with it

        n_tokens = self._calibration.n_tokens
        window = min(spec.context_length, MAX_POSITIONS, n_tokens)
        windows = self._calibration.tokenize(self._source, n_tokens, window)
        with tqdm(total=spec.n_layers * len(windows), desc="calibrating", unit="step", disable=None) as bar:
            moments_of_text(self._source, windows, self.add, bar.update)
        return f"text of {len(windows) * window} tokens in windows of {window}"

    def add(self, layer: int, moments: LayerMoments) -> None:
        """Make a layer from its moments. Raises KsortError where they are not finite."""
        if not moments.is_finite():
            raise KsortError(
                f"{self._source.path}: layer {layer}: queries, keys or values are too large for float32: "
                "the weights are damaged, get the model again"
            )
        trial = Trial(moments.keys, moments.q_second, self._checked_type, self.block_size)
        order = self._order(layer, moments, trial) if "order" in self._steps else None
        transform = None
        if has_run_time_steps(self._steps):
            transform, left_out = best_transform(
                trial, order, self._steps, lambda steps: key_transform(moments, steps, order)
            )
            self._note_left_out(layer, "keys", left_out)
            self.keys.add(layer, transform)
        self._key_errors.append(trial.relative_error(order, transform))
        if steps := tuple(step for step in self._steps if step in VALUE_STEPS):
            self._add_values(layer, moments, steps)

    def _order(self, layer: int, moments: LayerMoments, trial: Trial) -> np.ndarray:
        ranked = layer_order(self._source, layer, self._rank, moments)
        order, harmed = checked_order(trial, ranked, HARM["text" if self._calibration else "weights"])
        self.orders.append(order)
        self._unsorted += [f"{layer}.{head}" for head in harmed]
        return order

    def _add_values(self, layer: int, moments: LayerMoments, steps: tuple[str, ...]) -> None:
        metric = value_metric(*_output_weight(self._source, self._source.spec.attentions[layer]))
        trial = Trial(moments.values, metric, self._checked_type, self.block_size)
        transform, left_out = best_transform(trial, None, steps, lambda steps: value_transform(moments, metric, steps))
        self._note_left_out(layer, "values", left_out)
        self.values.add(layer, transform)
        self._value_errors.append(trial.relative_error(None, transform))

    def _note_left_out(self, layer: int, what: str, steps: list[str]) -> None:
        if steps:
            self._notes.append(
                f"layer {layer}, {what}: left without {', '.join(steps)}: the expected error is smaller so"
            )


def _output_weight(source: Source, attention: Attention) -> tuple[np.ndarray, int, int]:
    """Wo, float32 [n_embd, n_heads * head_dim], the number of KV heads, and the head dimension."""
    return source.tensor(attention.output.weight).read_finite_f32(), attention.n_kv_heads, attention.head_dim
