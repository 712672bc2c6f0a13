"""The public functions: load a model, convert one, make a KV plan. What is heavy is imported where it is used."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ksort_gguf.errors import PlanError
from ksort_gguf.kvplan import KVPlan, parse_plan
from ksort_gguf.names import CALIBRATE_TOKENS, DEFAULT_QUERY_TYPE

if TYPE_CHECKING:
    from ksort_gguf.engine.llm import LLM
    from ksort_gguf.plan.convert import Converted
    from ksort_gguf.plan.make import Calibration

StrPath = str | os.PathLike[str]


def load(
    path: StrPath, *, plan: StrPath | KVPlan | None = None, cache_type_k: str | None = None,
    cache_type_v: str | None = None, block_size: int | None = None, query_type: str | None = None,
    cache_exact_tail: int | None = None, cache_exact_sinks: int | None = None, device: str = "cpu", n_ctx: int = 0,
    n_threads: int = 0,
) -> "LLM":  # fmt: skip
    """A GGUF file, stock or folded, as a model that runs.

    plan: a plan file or a KVPlan made for this file; or the name of a plan, such as "balanced", which is then made from
    the weights. cache_type_k, cache_type_v: how keys and values are stored, of f32 f16 bf16 bfp16 bfp14 bfp12
    sbfp12 sbfp11 (default: what the file declares; else f16, but sbfp12 keys where there is a plan). block_size:
    channels that share a scale. query_type: what queries are rounded to, bfp16 beside keys in blocks. cache_exact_tail,
    cache_exact_sinks: how many of the newest and of the first tokens are kept in f16 beside types in blocks (default:
    128 and 4 beside types of 4 bits or less on the CPU, else 0). device: "cpu" or "cuda". n_ctx: tokens of a context,
    0 for what the model was trained for. n_threads: CPU threads, 0 for all.
    Raises KsortError (errors.py) naming the file, key or argument.
    """
    from ksort_gguf.engine.llm import LLM
    from ksort_gguf.engine.load import load_model

    if isinstance(plan, str) and _is_plan_name(plan):
        plan = make_plan(path, plan=plan) if parse_plan(plan)[1] else None
    loaded = load_model(path, plan, n_threads, device)
    options = loaded.cache_options(
        cache_type_k, cache_type_v, block_size, query_type, cache_exact_tail, cache_exact_sinks
    )
    return LLM(loaded, options, loaded.context(n_ctx))


def convert(
    source: StrPath, outfile: StrPath, *, plan: str = "balanced", calibrate: bool | StrPath | None = None,
    calibrate_tokens: int = CALIBRATE_TOKENS, rank: str | None = None, outtype: str = "auto",
    cache_type_k: str | None = None, block_size: int | None = None, query_type: str = DEFAULT_QUERY_TYPE,
    model_name: str | None = None, force: bool = False,
) -> "Converted":  # fmt: skip
    """Write a Hugging Face directory or a GGUF file as a GGUF that declares its cache types; `ksort-gguf convert`.

    plan: "balanced", "ksort" (the paper's sorting alone), "none" (a stock file), or steps joined by commas. calibrate:
    a text file to make it from, True for Python's own documentation; else the weights alone are used. rank: what the
    step order sorts by. outtype: auto f32 f16 bf16 q8_0. "{ftype}" in `outfile` becomes the weight type. model_name:
    general.name of the result. force: overwrite `outfile`.
    Raises KsortError; whatever happens, `outfile` is complete, or as it was before.
    """
    from ksort_gguf.plan import convert as conversion

    return conversion.convert(
        Path(source), Path(outfile), outtype=outtype, plan=plan, rank=rank,
        calibration=_calibration(calibrate, calibrate_tokens), cache_type_k=cache_type_k, block_size=block_size,
        query_type=query_type, model_name=model_name, force=force,
    )  # fmt: skip


def make_plan(
    model: StrPath, outfile: StrPath | None = None, *, plan: str = "balanced",
    calibrate: bool | StrPath | None = None, calibrate_tokens: int = CALIBRATE_TOKENS, rank: str | None = None,
    block_size: int | None = None, force: bool = False,
) -> KVPlan:  # fmt: skip
    """The KV plan of a stock GGUF or a Hugging Face directory, written to `outfile` too if that is given.

    Arguments as convert's; block_size: what the plan is tried with. Raises KsortError; PlanError if no step of the plan
    lowers the expected error.
    """
    from ksort_gguf.container.gguf_writer import check_output
    from ksort_gguf.models.open import open_model
    from ksort_gguf.plan import make
    from ksort_gguf.plan.file import write_plan

    if not parse_plan(plan)[1]:
        raise PlanError(f"`plan` {plan}: there is nothing to make: name a plan or some steps", field="plan")
    with open_model(Path(model)) as source:
        if outfile is not None:
            check_output(Path(outfile), force, source.files())
        calibration = _calibration(calibrate, calibrate_tokens)
        made, _ = make.make_plan(source, plan, rank=rank, calibration=calibration, block_size=block_size)
    if not made.steps:
        raise PlanError(f"{model}: no step of `plan` {plan} lowers the expected error", field="plan")
    if outfile is not None:
        write_plan(Path(outfile), made, force)
    return made


def read_plan(path: StrPath) -> KVPlan:
    """A plan file. Raises KsortError naming the file if it is none, damaged, or of a newer version."""
    from ksort_gguf.plan import file

    return file.read_plan(Path(path))


def _calibration(calibrate: bool | StrPath | None, n_tokens: int) -> "Calibration | None":
    from ksort_gguf.engine.calibration import calibration

    if calibrate is None or calibrate is False:
        return None
    return calibration(None if calibrate is True else Path(calibrate), n_tokens)


def _is_plan_name(text: str) -> bool:
    try:
        parse_plan(text)
    except PlanError:
        return False
    return True
