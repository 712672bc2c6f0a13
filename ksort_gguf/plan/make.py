"""Making a plan for a stock model: its steps, from text or from the weights alone, checked layer by layer."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ksort_gguf.cache_types import CALIBRATE_TOKENS, DEFAULT_RANK, RANKS, check_block_size, default_block_size
from ksort_gguf.errors import KsortError
from ksort_gguf.plan.balance import key_transform, value_metric, value_transform
from ksort_gguf.plan.calibrate import calibration_windows
from ksort_gguf.plan.choose import HARM, NO_GAIN, Trial, best_transform, checked_order
from ksort_gguf.plan.kplan import RUN_TIME_STEPS, VALUE_STEPS, KPlan, Transform, Transforms, parse_plan
from ksort_gguf.plan.moments import LayerMoments, moments_of_text
from ksort_gguf.plan.rank import layer_order, weights_hash
from ksort_gguf.plan.weight_moments import MAX_POSITIONS, moments_of_weights
from ksort_gguf.sources.base import Source


@dataclass(frozen=True)
class Calibration:
    """Text that a plan is made from, and how many of its tokens are used."""

    text: str
    n_tokens: int = CALIBRATE_TOKENS


def make_plan(
    source: Source,
    plan: str = "balanced",
    *,
    rank: str | None = None,
    calibration: Calibration | None = None,
    block_size: int | None = None,
) -> tuple[KPlan, list[str]]:
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
    default = default_block_size(source.geometry.head_dim)
    if block_size not in (None, default):  # the default is larger than the smallest heads, which take no blocks
        check_block_size(block_size, source.geometry.head_dim)
    if source.plan is not None:
        raise KsortError(f"{source.path}: is folded already: make a plan from the stock model")
    check_invariance(source, steps)
    digest = weights_hash(source)
    maker = _Maker(source, steps, rank, calibration, block_size or default)
    statistics = maker.run()
    notes = []
    for left_out in (("rotate",), RUN_TIME_STEPS, ("order",)):
        if maker.key_error > 1 and set(left_out) & set(steps):
            dropped = ", ".join(step for step in steps if step in left_out)
            notes.append(f"the plan is left without {dropped}: it would raise the expected error")
            name, steps = parse_plan(",".join(step for step in steps if step not in left_out) or "none")
            maker = _Maker(source, steps, rank, calibration, maker.block_size)
            statistics = maker.run()
    if steps and maker.key_error > NO_GAIN:
        better = "" if calibration else "add --calibrate, which tells better, or "
        notes.append(
            f"the plan hardly helps, its expected error is {maker.key_error:.1%} of that without one: "
            f"{better}compare both by `ksort-gguf perplexity`"
        )
    values = maker.values.result("rotate" in steps)
    if values and maker.value_error > 1:
        notes.append("values are left without a plan: it would raise the expected error")
        values = Transforms()
    made = KPlan(
        name=name,
        steps=steps,
        row_order=source.family.row_order,
        base_architecture=source.family.name,
        weights_hash=digest,
        rank=rank if "order" in steps else None,
        statistics=statistics,
        order=np.stack(maker.orders) if "order" in steps else None,
        keys=maker.keys.result("rotate" in steps),
        values=values,
    )
    return made, notes + maker.notes


def check_request(plan: str, rank: str | None, calibration: Calibration | None) -> None:
    """Raise KsortError for unknown names, a rank or a calibration that `plan` has no use for, and no tokens at all."""
    _, steps = parse_plan(plan)
    if rank is not None and rank not in RANKS:
        raise KsortError(f"--rank {rank} is not one of {', '.join(RANKS)}")
    if rank is not None and "order" not in steps:
        raise KsortError(f"--rank {rank}: plan {plan} does not sort: add the step order to --plan, or leave --rank out")
    if calibration is not None and not steps:
        raise KsortError(f"--calibrate: plan {plan} has nothing to calibrate: name a plan or some steps with --plan")
    if calibration is not None and calibration.n_tokens < 1:
        raise KsortError(f"--calibrate-tokens {calibration.n_tokens} is not positive: pass a count of tokens")


def check_invariance(source: Source, steps: tuple[str, ...]) -> None:
    """Raise KsortError if one of `steps` would change what the model's attention computes."""
    architecture = source.metadata["general.architecture"]
    capping = source.metadata.get(f"{architecture}.attn_logit_softcapping")
    sinks = next((name for name in source.tensors if "attn_sinks" in name), None)
    for reason in (capping and "its attention scores are soft-capped", sinks and f"it has attention sinks ({sinks})"):
        if reason and "shift" in steps:
            raise KsortError(f"{source.path}: the step shift would change its attention: {reason}: leave shift out")
    normed = next((name for name in source.tensors if "attn_k_norm" in name or "attn_q_norm" in name), None)
    if normed and "order" in steps:
        raise KsortError(f"{source.path}: the step order cannot be folded past the tensor {normed}: leave order out")


class _Tables:
    """The tables of Transforms while layers come in."""

    def __init__(self):
        self._tables = {"shift": {}, "scale": {}, "sequence": {}, "feedback": {}}

    def add(self, layer: int, transform: Transform) -> None:
        for name, table in self._tables.items():
            if (values := getattr(transform, name)) is not None:
                table[layer] = values

    def result(self, rotate: bool) -> Transforms:
        return Transforms(rotate, **self._tables)


class _Maker:
    """Orders and transforms of all layers, one after another."""

    def __init__(
        self, source: Source, steps: tuple[str, ...], rank: str, calibration: Calibration | None, block_size: int
    ):
        self._source, self._steps, self._rank, self._calibration = source, steps, rank, calibration
        self.block_size = block_size
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
        count = f"{len(self._unsorted)} of {self._source.geometry.n_kv_heads * len(self.orders)}"
        heads = " ".join(self._unsorted)
        note = f"{count} key heads are left unsorted: the expected error is smaller so (layer.head: {heads})"
        return [note, *self._notes]

    def run(self) -> str:
        """Make all layers. Returns what they were made from, for KPlan.statistics."""
        g = self._source.geometry
        if self._calibration is None:
            with tqdm(total=g.n_layers, desc="planning", unit="layer", disable=None) as bar:
                moments_of_weights(self._source, self.add, bar.update)
            return "weights"
        text, n_tokens = self._calibration.text, self._calibration.n_tokens
        window = min(g.context_length, MAX_POSITIONS, n_tokens)
        windows = calibration_windows(self._source.metadata, str(self._source.path), text, n_tokens, window)
        with tqdm(total=g.n_layers * len(windows), desc="calibrating", unit="step", disable=None) as bar:
            moments_of_text(self._source, windows, self.add, bar.update)
        return f"text of {len(windows) * window} tokens in windows of {window}"

    def add(self, layer: int, moments: LayerMoments) -> None:
        """Make a layer from its moments. Raises KsortError where they are not finite."""
        if not moments.is_finite():
            raise KsortError(
                f"{self._source.path}: layer {layer}: queries, keys or values are too large for float32: "
                "the weights are damaged, get the model again"
            )
        trial = Trial(moments.keys, moments.q_second, self.block_size)
        order = self._order(layer, moments, trial) if "order" in self._steps else None
        transform = None
        if set(self._steps) & set(RUN_TIME_STEPS):
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
        g = self._source.geometry
        output = self._source.tensor(f"blk.{layer}.attn_output.weight").read_finite_f32()
        metric = value_metric(output, g.n_kv_heads, g.head_dim)
        trial = Trial(moments.values, metric, self.block_size)
        transform, left_out = best_transform(trial, None, steps, lambda steps: value_transform(moments, metric, steps))
        self._note_left_out(layer, "values", left_out)
        self.values.add(layer, transform)
        self._value_errors.append(trial.relative_error(None, transform))

    def _note_left_out(self, layer: int, what: str, steps: list[str]) -> None:
        if steps:
            self._notes.append(
                f"layer {layer}, {what}: left without {', '.join(steps)}: the expected error is smaller so"
            )
