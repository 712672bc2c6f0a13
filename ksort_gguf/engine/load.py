"""From a GGUF (and maybe a plan) to a model that runs: the one place where the runner's defaults are decided."""

import os
from dataclasses import dataclass
from pathlib import Path

from ksort_gguf.cache.exact import exact_rows
from ksort_gguf.cache.protocol import Backend, CacheOptions
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer
from ksort_gguf.errors import ContextError, DeviceError, KsortError
from ksort_gguf.kvplan import KVPlan
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.models.run_native import NativeModel
from ksort_gguf.models.source import Source
from ksort_gguf.models.weights import load_weights
from ksort_gguf.names import (
    CACHE_TYPES,
    DEFAULT_QUERY_TYPE,
    DEFAULT_V_TYPE,
    K_TYPES,
    QUERY_TYPES,
    V_TYPES,
    check_name,
    default_block_size,
    default_k_type,
)
from ksort_gguf.plan.file import check_plan, folded_plan, read_plan
from ksort_gguf.plan.fold import folded_tensors

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and the cache options its file declares."""

    path: Path
    backend: Backend
    tokenizer: Tokenizer
    metadata: dict[str, object]
    declared: CacheOptions

    def cache_options(
        self,
        k_type: str | None = None,
        v_type: str | None = None,
        block_size: int | None = None,
        query_type: str | None = None,
        exact_tail: int | None = None,
        exact_sinks: int | None = None,
    ) -> CacheOptions:
        """The declared options with the given ones in their place. Raises CacheTypeError for what does not fit.

        exact_tail, exact_sinks: None for cache.exact's defaults, or for 0 where the device has no exact rows. Float
        keys without a word about queries keep their queries in float, so that they serve as the exact baseline.
        """
        k_type, v_type = k_type or self.declared.k_type, v_type or self.declared.v_type
        check_name("cache_type_k", k_type, K_TYPES)
        check_name("cache_type_v", v_type, V_TYPES)
        if query_type is None:
            query_type = self.declared.query_type if CACHE_TYPES[k_type].is_bfp else "f32"
        check_name("query_type", query_type, QUERY_TYPES)
        if not self.backend.has_exact_rows:
            exact_tail, exact_sinks = exact_tail or 0, exact_sinks or 0
        exact = exact_rows(k_type, v_type, exact_tail, exact_sinks)
        return CacheOptions(k_type, v_type, block_size or self.declared.block_size, query_type, *exact)

    def context(self, n_ctx: int) -> int:
        """`n_ctx`, or the context that the model was trained for where that is 0. Raises ContextError below 0."""
        if n_ctx < 0:
            raise ContextError(f"`n_ctx` {n_ctx} is negative: pass a count, or 0 for the model's own", field="n_ctx")
        return n_ctx or self.backend.spec.context_length


def load_model(
    path: str | os.PathLike,
    plan: str | os.PathLike | KVPlan | None = None,
    n_threads: int = 0,
    device: str = "cpu",
) -> LoadedModel:
    """Open, fold where `plan` (a plan file, or a plan made for this model) says so, and load to `device`.

    `n_threads` 0 takes all the CPUs this process may use. Raises KsortError for files that cannot be run, and
    DeviceError for a device that is not there.
    """
    if n_threads < 0:
        raise KsortError(
            f"`n_threads` {n_threads} is negative: pass a count, or leave it out for all CPUs", field="n_threads"
        )
    if device not in DEVICES:
        raise DeviceError(f"`device` {device} is not one of {', '.join(DEVICES)}", field="device")
    if device == "cuda":
        from ksort_gguf.cache.cuda_device import require_cuda

        require_cuda()
    with open_gguf(Path(path)) as source:
        inside = folded_plan(source)
        if plan is not None:
            name = "`plan`" if isinstance(plan, KVPlan) else str(plan)
            plan = plan if isinstance(plan, KVPlan) else read_plan(Path(plan))
            check_plan(plan, source, name)
        declared = _declared(source, planned=inside is not None or plan is not None)
        if plan is not None:
            source.tensors = dict(folded_tensors(source, plan.order))
        backend = _backend(source, inside or plan, n_threads or _n_cpus(), device)
        tokenizer = Tokenizer.from_metadata(source.metadata, str(path))
        return LoadedModel(Path(path), backend, tokenizer, source.metadata, declared)


def _backend(source: Source, plan: KVPlan | None, n_threads: int, device: str) -> Backend:
    weights = load_weights(source)
    if device == "cpu":
        return NativeModel(source.spec, weights, plan, source.rope_factors, n_threads)
    from ksort_gguf.models.run_torch import TorchModel

    return TorchModel(source.spec, weights, plan, source.rope_factors, n_threads, device)


def _n_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _declared(source: Source, planned: bool) -> CacheOptions:
    """Cache options in the metadata. A stock file declares none: f16 keys, or BFP12 where there is a plan."""
    head_dim = source.spec.min_head_dim
    k_type, block_size, query_type = source.declared_cache()
    return CacheOptions(
        k_type=k_type or (default_k_type(head_dim) if planned else "f16"),
        v_type=DEFAULT_V_TYPE,
        block_size=block_size or default_block_size(head_dim),
        query_type=query_type or DEFAULT_QUERY_TYPE,
    )
