"""Converting: a source and a plan become a GGUF file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tqdm import tqdm

from ksort_gguf.container.gguf_writer import GgufOutput, check_output
from ksort_gguf.container.tensors import DENSE_TYPES, Tensor, is_finite
from ksort_gguf.container.values import Value, string, uint32
from ksort_gguf.kvplan import KVPlan, parse_plan
from ksort_gguf.models.open import open_model
from ksort_gguf.models.source import Source
from ksort_gguf.names import (
    CACHE_TYPES,
    DEFAULT_QUERY_TYPE,
    K_TYPES,
    QUERY_TYPES,
    Keys,
    check_block_size,
    check_name,
    default_block_size,
    default_k_type,
    format_version,
)
from ksort_gguf.plan.file import plan_tensors, plan_values, tensor_infos
from ksort_gguf.plan.fold import folded_tensors
from ksort_gguf.plan.make import Calibration, check_request, make_plan


@dataclass(frozen=True)
class Converted:
    """What convert() wrote, or would write."""

    path: Path
    architecture: str
    n_tensors: int
    n_bytes: int  # of tensor data
    plan: KVPlan | None
    notes: list[str]  # on steps left out because they would have raised the expected error
    cache_type_k: str
    block_size: int


def convert(
    source_path: Path,
    outfile: Path,
    *,
    outtype: str = "auto",
    plan: str = "balanced",
    rank: str | None = None,
    calibration: Calibration | None = None,
    cache_type_k: str | None = None,
    block_size: int | None = None,
    query_type: str = DEFAULT_QUERY_TYPE,
    model_name: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Converted:
    """Write `source_path` (a Hugging Face directory or a GGUF file) as a GGUF that declares its cache types.

    With plan "none" the result stays a stock file; with any other (see kvplan.parse_plan) it is a folded file,
    unless no step of the plan helps.
    `{ftype}` in `outfile` becomes the weight type. Reads a few tens of MB at a time; `calibration` needs one layer's
    weights and its hidden states. Shows progress where stderr is a terminal. Raises KsortError; whatever happens,
    `outfile` is complete, or as it was before.
    """
    check_request(plan, rank, calibration)
    if cache_type_k is not None:
        check_name("cache_type_k", cache_type_k, K_TYPES)
    check_name("query_type", query_type, QUERY_TYPES)
    with open_model(source_path, outtype, model_name) as source:
        source.refuse_folded("convert the stock model it was made from")
        declared = _declared(source.spec.min_head_dim, cache_type_k, block_size, query_type)
        path = output_path(outfile, source)
        check_output(path, force, source.files())
        made_plan: KVPlan | None = None
        notes: list[str] = []
        if parse_plan(plan)[1]:
            made, notes = make_plan(source, plan, rank=rank, calibration=calibration, block_size=declared.block_size)
            made_plan = made if made.steps else None
        values = output_values(source, made_plan, declared.values())
        if not dry_run:
            _write(path, source, made_plan, values, force)
        tables = plan_tensors(made_plan) if made_plan else {}
        return Converted(
            path=path,
            architecture=str(values["general.architecture"].decode()),
            n_tensors=len(source.tensors) + len(tables),
            n_bytes=sum(tensor.n_bytes for tensor in source.tensors.values()) + sum(t.nbytes for t in tables.values()),
            plan=made_plan,
            notes=notes,
            cache_type_k=declared.cache_type_k,
            block_size=declared.block_size,
        )


@dataclass(frozen=True)
class _Declared:
    """What the file says of its cache."""

    cache_type_k: str
    block_size: int
    query_type: str

    def values(self) -> dict[str, Value]:
        """The cache keys to write."""
        return {
            Keys.CACHE_TYPE_K: string(self.cache_type_k),
            Keys.BLOCK_SIZE: uint32(self.block_size),
            Keys.QUERY_TYPE: string(self.query_type),
        }


def _declared(head_dim: int, cache_type_k: str | None, block_size: int | None, query_type: str) -> _Declared:
    """What to declare; None chooses by `head_dim`. Raises KsortError for a block size that does not fit."""
    if cache_type_k is None:
        cache_type_k = default_k_type(head_dim)
    if block_size is None:
        block_size = default_block_size(head_dim)
    if CACHE_TYPES[cache_type_k].is_bfp or block_size != default_block_size(head_dim):
        check_block_size(block_size, head_dim)
    return _Declared(cache_type_k, block_size, query_type)


def output_path(outfile: Path, source: Source) -> Path:
    """`outfile` with llama.cpp's placeholders for the weight type filled in: {ftype}, {outtype}, and in capitals."""
    name = file_type_name(source)
    text = str(outfile)
    for placeholder in ("ftype", "outtype"):
        text = text.replace(f"{{{placeholder}}}", name).replace(f"{{{placeholder.upper()}}}", name.upper())
    return Path(text)


def file_type_name(source: Source) -> str:
    """The weight type as it stands in file names, such as "bf16" or "q4_k_m"."""
    file_type = source.metadata.get("general.file_type")
    if not isinstance(file_type, int):
        return "unknown"
    try:
        return gguf.LlamaFileType(file_type).name.split("_", 1)[-1].lower()
    except ValueError:
        return "unknown"


def output_values(source: Source, plan: KVPlan | None, declared: dict[str, Value]) -> dict[str, Value]:
    """The metadata to write: the source's, in its order and with its types, then ours.

    A folded file has its own architecture name, and the hyperparameter keys that go with it, so that other programs
    refuse it. `declared` holds the cache keys.
    """
    base = source.family.name
    values = {key: value for key, value in source.values.items() if not key.startswith(Keys.PREFIX)}
    if plan is None:
        return {**values, Keys.FORMAT_VERSION: uint32(format_version(())), **declared}
    folded = Keys.FOLDED_PREFIX + base
    values = {
        folded + key.removeprefix(base) if key.startswith(f"{base}.") else key: value for key, value in values.items()
    }
    return {**values, "general.architecture": string(folded), **plan_values(plan), **declared}


def _write(path: Path, source: Source, plan: KVPlan | None, values: dict[str, Value], force: bool) -> None:
    tables = plan_tensors(plan) if plan else {}
    tensors = folded_tensors(source, plan.order if plan else None)
    infos = [(tensor.name, tensor.shape, tensor.type) for tensor in tensors.values()] + tensor_infos(tables)
    n_bytes = sum(tensor.n_bytes for tensor in tensors.values())
    with (
        GgufOutput(path, values, infos, alignment=source.alignment, force=force) as output,
        tqdm(total=n_bytes, desc="writing", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for name, tensor in tensors.items():
            output.write_tensor(name, _counted(_finite_chunks(tensor), bar))
        for name, contents in tables.items():
            output.write_tensor(name, [np.ascontiguousarray(contents)])


def _finite_chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The bytes as they are; raises KsortError at NaN or infinity in a dense tensor."""
    for chunk in tensor.chunks():
        if tensor.type in DENSE_TYPES and not is_finite(chunk, tensor.type):
            raise tensor.non_finite()
        yield chunk


def _counted(chunks: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield chunk
        bar.update(chunk.nbytes)
