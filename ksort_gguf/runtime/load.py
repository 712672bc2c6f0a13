"""From a GGUF (and maybe a plan file) to a model that runs: the one place where the runner's defaults are decided."""

import os
from dataclasses import dataclass
from pathlib import Path

from ksort_gguf.cache_types import (
    CACHE_TYPES,
    DEFAULT_QUERY_TYPE,
    DEFAULT_V_TYPE,
    default_block_size,
    default_k_type,
)
from ksort_gguf.errors import KsortError
from ksort_gguf.plan.plan_file import check_plan, read_plan
from ksort_gguf.runtime.cuda_device import require_cuda
from ksort_gguf.runtime.cuda_model import CudaModel
from ksort_gguf.runtime.kv_cache import CacheOptions
from ksort_gguf.runtime.model import Model
from ksort_gguf.runtime.weights import load_weights
from ksort_gguf.sources.base import Source
from ksort_gguf.sources.gguf_file import open_gguf
from ksort_gguf.sources.typed_values import declared_cache
from ksort_gguf.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and the cache options its file declares."""

    path: Path
    model: Model | CudaModel
    tokenizer: Tokenizer
    metadata: dict[str, object]
    declared: CacheOptions

    def cache_options(
        self,
        k_type: str | None = None,
        v_type: str | None = None,
        block_size: int | None = None,
        query_type: str | None = None,
    ) -> CacheOptions:
        """The declared options with the given ones in their place.

        Float keys without a word about queries keep their queries in float, so that they serve as the exact baseline.
        """
        k_type = k_type or self.declared.k_type
        if query_type is None:
            query_type = self.declared.query_type if CACHE_TYPES[k_type].is_bfp else "f32"
        return CacheOptions(
            k_type=k_type,
            v_type=v_type or self.declared.v_type,
            block_size=block_size or self.declared.block_size,
            query_type=query_type,
        )

    def context(self, n_ctx: int) -> int:
        """`n_ctx`, or the context that the model was trained for where that is 0. Raises KsortError below 0."""
        if n_ctx < 0:
            raise KsortError(f"--ctx-size {n_ctx} is negative: pass a count, or 0 for the model's own")
        return n_ctx or self.model.geometry.context_length


def load_model(
    path: str | os.PathLike, plan_file: str | os.PathLike | None = None, n_threads: int = 0, device: str = "cpu"
) -> LoadedModel:
    """Open, fold where `plan_file` says so, and load to `device`, "cpu" or "cuda".

    `n_threads` 0 takes all the CPUs this process may use. Raises KsortError for files that cannot be run, and for a
    device that is not there.
    """
    if device == "cuda":
        require_cuda()
    source = open_gguf(path)
    try:
        plan = source.plan
        if plan_file is not None:
            plan = read_plan(plan_file)
            check_plan(plan, source, str(plan_file))
        fold_with = None if source.plan is not None else plan
        weights = load_weights(source, fold_with)
        runner = CudaModel if device == "cuda" else Model
        model = runner(weights, source.family, source.geometry, plan, n_threads or _n_cpus())
        tokenizer = Tokenizer.from_metadata(source.metadata, str(path))
        return LoadedModel(Path(path), model, tokenizer, source.metadata, _declared(source, planned=plan is not None))
    finally:
        source.close()


def _n_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _declared(source: Source, planned: bool) -> CacheOptions:
    """Cache options in the metadata. A stock file declares none: f16 keys, or BFP12 where a plan file is given."""
    head_dim = source.geometry.head_dim
    k_type, block_size, query_type = declared_cache(source.metadata, str(source.path))
    return CacheOptions(
        k_type=k_type or (default_k_type(head_dim) if planned else "f16"),
        v_type=DEFAULT_V_TYPE,
        block_size=block_size or default_block_size(head_dim),
        query_type=query_type or DEFAULT_QUERY_TYPE,
    )
