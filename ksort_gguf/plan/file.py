"""Plans in GGUF: as a plan file beside a stock model, and inside a folded file (FORMAT.md, 'GGUF')."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np

from ksort_gguf.container.gguf_reader import open_container
from ksort_gguf.container.gguf_writer import GgufOutput
from ksort_gguf.container.tensors import Tensor
from ksort_gguf.container.values import Value, string, strings, uint32
from ksort_gguf.errors import PlanError
from ksort_gguf.kvplan import KVPlan, Transforms
from ksort_gguf.models.rope import ROW_ORDERS
from ksort_gguf.models.source import Source
from ksort_gguf.names import RANKS, STEPS, TRANSFORM_TABLES, Keys, Table, format_version
from ksort_gguf.plan.rank import weights_hash

_GGML = {"int32": gguf.GGMLQuantizationType.I32, "float32": gguf.GGMLQuantizationType.F32}
_STORED = {"int32": "<i4", "float32": "<f4"}
_ORDER = STEPS["order"].tables[0]
_AGAIN = "make the file again"


def plan_values(plan: KVPlan) -> dict[str, Value]:
    """The metadata of a plan, for a plan file or a folded file."""
    values = {
        Keys.FORMAT_VERSION: uint32(format_version(plan.steps)),
        Keys.BASE_ARCHITECTURE: string(plan.base_architecture),
        Keys.PLAN_NAME: string(plan.name),
        Keys.PLAN_STEPS: strings(plan.steps),
        Keys.PLAN_ROW_ORDER: string(plan.row_order),
        Keys.PLAN_WEIGHTS_HASH: string(plan.weights_hash),
    }
    for key, text in ((Keys.PLAN_RANK, plan.rank), (Keys.PLAN_STATISTICS, plan.statistics)):
        if text is not None:
            values[key] = string(text)
    return values


def plan_tensors(plan: KVPlan) -> dict[str, np.ndarray]:
    """Name and contents, int32 or float32, of a plan's tensors: orders, then the tables of keys and of values."""
    return {
        _tensor_name(layer, table, prefix): values.astype(_STORED[table.dtype])
        for layer, table, prefix, values in _arrays(plan)
    }


def _arrays(plan: KVPlan) -> Iterator[tuple[int, Table, str, np.ndarray]]:
    """Layer, table, prefix of its name and contents of all arrays of a plan."""
    for layer, order in enumerate(() if plan.order is None else plan.order):
        yield layer, _ORDER, "", order
    for prefix, transforms in (("", plan.keys), (Keys.VALUE_PREFIX, plan.values)):
        for table in TRANSFORM_TABLES:
            for layer, values in transforms.tables.get(table.name, {}).items():
                yield layer, table, prefix, values


def _tensor_name(layer: int, table: Table, prefix: str = "") -> str:
    return Keys.TABLE_TENSOR.format(layer=layer, table=prefix + table.stored)


def tensor_infos(tensors: Mapping[str, np.ndarray]) -> list[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]]:
    """Name, shape and type of plan_tensors' tensors, for GgufOutput."""
    return [(name, values.shape, _GGML[values.dtype.name]) for name, values in tensors.items()]


def write_plan(path: Path, plan: KVPlan, force: bool = False) -> None:
    """Write a plan file, complete or not at all. Raises KsortError on I/O errors and if it exists without `force`."""
    values = {
        "general.architecture": string(plan.base_architecture),
        "general.type": string(Keys.PLAN_FILE_TYPE),
        **plan_values(plan),
    }
    tensors = plan_tensors(plan)
    with GgufOutput(Path(path), values, tensor_infos(tensors), force=force) as output:
        for name, contents in tensors.items():
            output.write_tensor(name, [np.ascontiguousarray(contents)])


def is_plan_file(path: Path) -> bool:
    """Whether a GGUF file is a plan file. Raises KsortError if it is no GGUF at all."""
    container = open_container(Path(path))
    container.file.close()
    kind = container.values.get("general.type")
    return kind is not None and kind.decode() == Keys.PLAN_FILE_TYPE


def read_plan(path: Path) -> KVPlan:
    """Read a plan file. Raises PlanError naming the file if it is none, damaged, or of a newer version."""
    container = open_container(Path(path))
    with container.file:
        metadata = {key: value.decode() for key, value in container.values.items() if not key.startswith("tokenizer.")}
        if metadata.get("general.type") != Keys.PLAN_FILE_TYPE:
            raise PlanError(f"{path}: is not a plan file (general.type is not {Keys.PLAN_FILE_TYPE!r})")
        plan = _plan(metadata, container.tensors, str(path))
    if plan is None:
        raise PlanError(f"{path}: holds no plan (key {Keys.PLAN_NAME} is missing): make it again")
    return plan


def folded_plan(source: Source) -> KVPlan | None:
    """The plan inside a folded file; None for a stock one. Raises PlanError naming the file for a plan that it cannot
    have been folded with."""
    if not source.is_folded:
        return None
    path, spec = source.path, source.spec
    tensors = {name: tensor for name, tensor in source.tensors.items() if name.startswith(Keys.PREFIX)}
    plan = _plan(source.metadata, tensors, str(path))
    if plan is None:
        raise PlanError(f"{path}: is folded, but key {Keys.PLAN_NAME} is missing: convert it again")
    for key, found, due in (
        (Keys.BASE_ARCHITECTURE, plan.base_architecture, spec.architecture),
        (Keys.PLAN_ROW_ORDER, plan.row_order, spec.row_order),
    ):
        if found != due:
            raise PlanError(f"{path}: key {key} is {found!r}, but {spec.architecture} has {due!r}: convert it again")
    check_plan_fits(plan, source, str(path))
    return plan


def _plan(metadata: Mapping[str, object], tensors: Mapping[str, Tensor], file: str) -> KVPlan | None:
    """The plan in a plan file or folded file, or None if there is no plan. Raises PlanError naming `file`."""
    if Keys.PLAN_NAME not in metadata:
        return None

    def text(key: str) -> str:
        value = metadata.get(key)
        if not isinstance(value, str):
            raise PlanError(f"{file}: key {key} is {value!r}, expected a string: {_AGAIN}")
        return value

    if Keys.FORMAT_VERSION not in metadata:
        raise PlanError(f"{file}: key {Keys.FORMAT_VERSION} is missing: {_AGAIN}")
    steps = metadata.get(Keys.PLAN_STEPS)
    if not isinstance(steps, list) or not all(isinstance(step, str) and step in STEPS for step in steps):
        raise PlanError(f"{file}: plan steps {steps!r} are not known (known: {', '.join(STEPS)}): update ksort-gguf")
    for key, known in ((Keys.PLAN_ROW_ORDER, ROW_ORDERS), *([(Keys.PLAN_RANK, RANKS)] if "order" in steps else [])):
        if text(key) not in known:
            raise PlanError(f"{file}: key {key} is {text(key)!r}, which is not known: update ksort-gguf")
    tables = _Tables(tensors, file)
    rotate, stored = "rotate" in steps, [t for name in steps if not STEPS[name].folded for t in STEPS[name].tables]
    plan = KVPlan(
        name=text(Keys.PLAN_NAME),
        steps=tuple(steps),
        row_order=text(Keys.PLAN_ROW_ORDER),
        base_architecture=text(Keys.BASE_ARCHITECTURE),
        weights_hash=text(Keys.PLAN_WEIGHTS_HASH),
        rank=text(Keys.PLAN_RANK) if "order" in steps else None,
        statistics=text(Keys.PLAN_STATISTICS) if Keys.PLAN_STATISTICS in metadata else None,
        order=tables.order() if "order" in steps else None,
        keys=Transforms(rotate, {table.name: tables.by_layer(table) for table in stored}),
        values=Transforms(rotate, {table.name: tables.by_layer(table, Keys.VALUE_PREFIX) for table in stored}),
    )
    tables.refuse_unread()
    return plan


class _Tables:
    """A plan's tensors in a file; raises PlanError naming it where values make no sense."""

    def __init__(self, tensors: Mapping[str, Tensor], file: str):
        self._tensors, self._file, self._read = tensors, file, set[str]()

    def by_layer(self, table: Table, prefix: str = "") -> dict[int, np.ndarray]:
        """A table's arrays by layer."""
        pattern = re.compile(re.escape(_tensor_name(0, table, prefix)).replace("0", r"(\d{1,4})", 1))
        matches = ((pattern.fullmatch(name), tensor) for name, tensor in self._tensors.items())
        return {int(match[1]): self._values(table, tensor) for match, tensor in matches if match}

    def order(self) -> np.ndarray:
        """int32 [n_layers, n_kv_heads, head_dim]."""
        found = self.by_layer(_ORDER)
        if not found or sorted(found) != list(range(len(found))) or len({order.shape for order in found.values()}) > 1:
            name = _tensor_name(0, _ORDER).replace("0", "N")
            raise PlanError(f"{self._file}: order tensors ({name}) are missing or differ in shape: {_AGAIN}")
        return np.stack([found[layer] for layer in range(len(found))])

    def refuse_unread(self) -> None:
        """Raise PlanError for a tensor that no step of the plan has."""
        for name in self._tensors:
            if name not in self._read:
                raise PlanError(f"{self._file}: tensor {name} belongs to no step of the plan: update ksort-gguf")

    def _values(self, table: Table, tensor: Tensor) -> np.ndarray:
        self._read.add(tensor.name)
        if tensor.type != _GGML[table.dtype] or len(tensor.shape) != (3 if table.square else 2):
            raise PlanError(f"{self._file}: tensor {tensor.name} is not a table of {_GGML[table.dtype].name}: {_AGAIN}")
        is_int = table.dtype == "int32"
        values = tensor.read().view("<i4").reshape(tensor.shape) if is_int else tensor.read_finite_f32()
        wrong = _WRONG[table.check](values)
        if wrong:
            raise PlanError(f"{self._file}: tensor {tensor.name} {wrong}: {_AGAIN}")
        return values


def _not_a_permutation(values: np.ndarray) -> str:
    in_order = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    is_one = np.array_equal(np.sort(values, axis=1), in_order)
    return "" if is_one else "is not a permutation of each head's channels"


_WRONG = {  # what is wrong with a table's values, by names.Table.check
    "finite": lambda values: "",  # found as it is read
    "positive": lambda values: "" if (values > 0).all() else "holds a scale that is not positive",
    "permutation": _not_a_permutation,
}


def check_plan_fits(plan: KVPlan, source: Source, file: str) -> None:
    """Raise PlanError, naming `file` (the plan's), unless the plan's arrays have the shapes of the model's layers."""
    attentions = source.spec.attentions
    if plan.order is not None and len(plan.order) != len(attentions):
        raise PlanError(
            f"{file}: orders of {len(plan.order)} layers do not fit {source.path} with {len(attentions)}: "
            "make the plan again"
        )
    for layer, table, prefix, values in _arrays(plan):
        wanted = None
        if layer < len(attentions):
            wanted = table.shape(attentions[layer].n_kv_heads, attentions[layer].head_dim)
        if values.shape != wanted:
            raise PlanError(
                f"{file}: tensor {_tensor_name(layer, table, prefix)} of shape {values.shape} does not fit "
                f"{source.path}, whose {len(attentions)} layers need {wanted}: make the plan again"
            )


def check_plan(plan: KVPlan, source: Source, file: str = "plan") -> None:
    """Raise PlanError, naming `file` (the plan's) and the model, unless `plan` was made for these stock weights.

    Compares the architecture, the row order, the shape, and the hash of the projections, which reads all of them once.
    """
    spec = source.spec
    if plan.base_architecture != spec.architecture:
        raise PlanError(
            f"{file}: plan is for architecture {plan.base_architecture!r}, but {source.path} is {spec.architecture!r}"
        )
    source.refuse_folded("use the plan with the stock GGUF it was made for")
    if plan.row_order != spec.row_order:
        raise PlanError(f"{file}: plan is for row order {plan.row_order!r}, but {source.path} has {spec.row_order!r}")
    check_plan_fits(plan, source, file)
    actual = weights_hash(source)
    if plan.weights_hash != actual:
        raise PlanError(
            f"{file}: plan was made for weights {plan.weights_hash}, but {source.path} has {actual}: make a plan for it"
        )
