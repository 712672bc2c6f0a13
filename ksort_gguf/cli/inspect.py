"""`ksort-gguf inspect`: what is in a model or plan file, and what a token costs in the cache."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ksort_gguf.names import (
    BLOCK_SIZES,
    CACHE_TYPES,
    DEFAULT_QUERY_TYPE,
    EXACT_SINKS,
    EXACT_TAIL,
    TILE_TOKENS,
    default_block_size,
)

if TYPE_CHECKING:
    from ksort_gguf.cli.arguments import Subparsers
    from ksort_gguf.kvplan import KVPlan
    from ksort_gguf.models.source import Source
    from ksort_gguf.models.spec import ModelSpec


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what is in a model or plan file",
        description="Show architecture, weight types, plan, cache types, cache bytes a token, and for each layer what "
        "the order of keys does: spread (largest / median channel norm of a head) and crest (largest / RMS norm of a "
        "block) before and after sorting. A stock model is shown with the order it would get.",
    )
    parser.add_argument("file", metavar="FILE", help="GGUF model, plan file or Hugging Face directory")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    report = inspect(Path(args.file))
    print(json.dumps(report) if args.json else _text(report))


def inspect(path: Path) -> dict:
    """A report on a model or plan file, as JSON types. Raises KsortError."""
    from ksort_gguf.models.open import open_model
    from ksort_gguf.plan.file import is_plan_file, read_plan

    if path.is_file() and is_plan_file(path):
        plan = read_plan(path)
        return {"file": str(path), "kind": "plan", "architecture": plan.base_architecture, "plan": _plan_report(plan)}
    with open_model(path) as source:
        return _model_report(path, source)


def _model_report(path: Path, source: "Source") -> dict:
    from ksort_gguf.plan.file import folded_plan
    from ksort_gguf.plan.statistics import layer_statistics

    spec, metadata, plan = source.spec, source.metadata, folded_plan(source)
    k_type, block_size, query_type = source.declared_cache()
    declared = {"k_type": k_type, "block_size": block_size, "query_type": query_type or DEFAULT_QUERY_TYPE}
    block_size = block_size or default_block_size(spec.min_head_dim)
    kind = "checkpoint" if path.is_dir() else "folded" if plan else "stock"
    return {
        "file": str(path),
        "kind": kind,
        "architecture": metadata["general.architecture"],
        "name": metadata.get("general.name"),
        "geometry": _geometry(spec),
        "weights": _weight_report(source),
        "plan": _plan_report(plan) if plan else None,
        "cache": declared if k_type else None,
        "block_size": block_size,
        "cache_bytes_per_token": _cache_bytes(spec, block_size),
        "exact_rows": _exact_rows(spec),
        "layers": [vars(layer) for layer in layer_statistics(source, plan, block_size)],
    }


def _geometry(spec: "ModelSpec") -> dict:
    """Sizes of a model; those of heads are of its first layer, and a list where layers differ."""

    def of_layers(values: list) -> object:
        return values[0] if len(set(values)) == 1 else values

    a = spec.attentions
    return {
        "n_layers": spec.n_layers,
        "n_embd": spec.n_embd,
        "n_heads": of_layers([x.n_heads for x in a]),
        "n_kv_heads": of_layers([x.n_kv_heads for x in a]),
        "head_dim": of_layers([x.head_dim for x in a]),
        "n_rot": of_layers([0 if x.rope is None else x.rope.n_rot for x in a]),
        "rope_base": of_layers([None if x.rope is None else x.rope.base for x in a]),
        "window": of_layers([x.window for x in a]),
        "context_length": spec.context_length,
        "rms_epsilon": spec.output_norm.epsilon,
    }


def _weight_report(source: "Source") -> dict:
    """For each tensor type, the number of tensors and their bytes."""
    types: dict[str, dict[str, int]] = {}
    for tensor in source.tensors.values():
        entry = types.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.n_bytes
    return types


def _plan_report(plan: "KVPlan") -> dict:
    return {
        "name": plan.name,
        "steps": list(plan.steps),
        "rank": plan.rank,
        "statistics": plan.statistics,
        "row_order": plan.row_order,
        "base_architecture": plan.base_architecture,
        "weights_hash": plan.weights_hash,
    }


def _cache_bytes(spec: "ModelSpec", block_size: int) -> dict:
    """For each cache type, bytes a token of all layers' keys, and of all layers' values."""
    report = {}
    for name, cache_type in CACHE_TYPES.items():
        if cache_type.is_bfp and block_size > spec.min_head_dim:
            continue
        n_bytes = sum(a.n_kv_heads * cache_type.tile_bytes(a.head_dim, block_size) for a in spec.attentions)
        report[name] = {"k": n_bytes / TILE_TOKENS, "v": n_bytes / TILE_TOKENS}
    return report


def _exact_rows(spec: "ModelSpec") -> dict:
    """What lies beside keys, and beside values, of a small type unless told otherwise: bytes a context, all layers."""
    from ksort_gguf.cache.exact import ring_tiles

    n_tiles = 1 + ring_tiles(EXACT_TAIL, spec.context_length)
    f16 = CACHE_TYPES["f16"]
    n_bytes = n_tiles * sum(a.n_kv_heads * f16.tile_bytes(a.head_dim, BLOCK_SIZES[0]) for a in spec.attentions)
    types = [name for name, cache_type in CACHE_TYPES.items() if cache_type.is_small]
    return {"types": types, "tail": EXACT_TAIL, "sinks": EXACT_SINKS, "k_bytes": n_bytes, "v_bytes": n_bytes}


def _text(report: dict) -> str:
    lines = [f"{report['file']}: {report['kind']}, architecture {report['architecture']}"]
    if report.get("name"):
        lines.append(f"name: {report['name']}")
    plan = report["plan"]
    if plan:
        parts = [f"plan: {plan['name']}", f"steps {' '.join(plan['steps'])}"]
        parts += [f"ranked by {plan['rank']}"] if plan["rank"] else []
        parts += [f"made from {plan['statistics']}"] if plan["statistics"] else []
        parts += [f"row order {plan['row_order']}", f"made for {plan['weights_hash']}"]
        lines.append(", ".join(parts))
    else:
        lines.append("plan: none")
    if report["kind"] != "plan":
        lines += _model_text(report)
    return "\n".join(lines)


def _model_text(report: dict) -> list[str]:
    geometry, cache = report["geometry"], report["cache"]
    lines = [
        f"heads: {geometry['n_layers']} layers, {geometry['n_heads']} query heads, {geometry['n_kv_heads']} key heads "
        f"of {geometry['head_dim']} channels ({geometry['n_rot']} rotated), context {geometry['context_length']}"
    ]
    if cache:
        lines.append(
            f"cache: declared {cache['k_type']} keys in blocks of {cache['block_size']}, {cache['query_type']} queries"
        )
    else:
        lines.append("cache: nothing declared")
    lines += ["", "weights     tensors       MB"]
    lines += [
        f"{name:<10} {entry['tensors']:>8} {entry['bytes'] / 1e6:>8.1f}" for name, entry in report["weights"].items()
    ]
    lines += ["", f"cache bytes a token, all layers, blocks of {report['block_size']}:", "type           keys   values"]
    for name, entry in report["cache_bytes_per_token"].items():
        lines.append(f"{name:<10} {entry['k']:>8.0f} {entry['v']:>8.0f}")
    exact = report["exact_rows"]
    lines += [
        f"and beside {', '.join(exact['types'])} {exact['k_bytes']} bytes a context, of keys and of values each: the "
        f"newest {exact['tail']} and the first {exact['sinks']} tokens in f16"
    ]
    sorted_heading = "crest sorted" if report["plan"] and report["plan"]["rank"] else "crest if sorted"
    lines += ["", f"layer   spread   crest stock   {sorted_heading}"]
    for layer, entry in enumerate(report["layers"]):
        crests = f"{entry['crest_stock']:>13.3f} {entry['crest_sorted']:>{len(sorted_heading) + 2}.3f}"
        lines.append(f"{layer:>5} {entry['spread']:>8.2f} {crests}")
    return lines
