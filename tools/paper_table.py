"""The table of the K-sort paper ("Accurate Block Quantization in LLMs with Outliers", arXiv 2403.20137) for any model.

    python tools/paper_table.py -m model.gguf -f wiki.test.raw

BFP12 keys and BFP16 queries in blocks of 128, 64 and 32, with channels in stock order and K-sorted by the norms of Wk's
rows, as in the paper; beside its perplexities (Llama2-7B: f16 9.4881, K-sorted 10.0861, 9.6061 and 9.5196) the KL
divergence against f16 keys. Values are f16; all of it runs through the real packed cache, by llama-perplexity's
protocol. With --plot: channel norms before and after sorting, and the divergence that each layer's keys cause alone.

Prints a Markdown table, then one JSON line.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import paper_plots
from command_line import n_threads, run_tool
from model_variants import ModelVariants

from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.cache.protocol import Attention, CacheOptions, Context
from ksort_gguf.errors import KsortError
from ksort_gguf.eval.compare import Comparison
from ksort_gguf.eval.kld_statistics import KldStatistics
from ksort_gguf.eval.perplexity import forward_of, tokenize_file
from ksort_gguf.kvplan import KVPlan
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.models.run_native import NativeModel
from ksort_gguf.models.source import Source
from ksort_gguf.names import CACHE_TYPES
from ksort_gguf.plan.convert import convert
from ksort_gguf.plan.file import write_plan
from ksort_gguf.plan.make import why_unsorted
from ksort_gguf.plan.rank import key_energies, key_projection, weights_hash

BLOCK_SIZES = (128, 64, 32)  # the paper's
F16 = CacheOptions("f16", "f16", min(BLOCK_SIZES), "f32")  # the exact baseline: queries as they are


@dataclass(frozen=True)
class VariantResults:
    """Half of the table: the model in stock order, or K-sorted."""

    by_block_size: dict[int, dict[str, float]]  # ppl, ppl_error, mean_kld, mean_kld_error
    kld_by_layer: list[float]  # mean KLD with only that layer's keys in BFP12; empty where not asked for


class Meter:
    """Scores caches against the stock model with f16 keys, with a line of progress each."""

    def __init__(self, comparison: Comparison, n_ctx: int):
        self._comparison, self._n_ctx = comparison, n_ctx

    def base(self, model: NativeModel) -> dict[str, float]:
        """Perplexity of the stock model with f16 keys, which all others are compared with."""
        start = time.monotonic()
        result = self._comparison.base(forward_of(model.start(F16, self._n_ctx)))
        _progress(f"f16 keys: PPL {result.ppl:.4f}", start)
        return {"ppl": result.ppl, "ppl_error": result.error}

    def variant(self, model: NativeModel, name: str, block_sizes: tuple[int, ...], by_layer: bool) -> VariantResults:
        """All measurements of the model in one order, `name`; by layer, in the smallest of the block sizes."""
        by_block_size = {}
        for block_size in block_sizes:
            statistics = self._against_base(
                model.start(bfp12(block_size), self._n_ctx), f"{name}, blocks of {block_size}"
            )
            ppl, kld = statistics.ppl(), statistics.mean_kld()
            by_block_size[block_size] = {
                "ppl": ppl.value,
                "ppl_error": ppl.error,
                "mean_kld": kld.value,
                "mean_kld_error": kld.error,
            }
        contexts = one_layer_contexts(model, min(block_sizes), self._n_ctx) if by_layer else ()
        kld_by_layer = [
            self._against_base(context, f"{name}, only layer {layer}").mean_kld().value
            for layer, context in enumerate(contexts)
        ]
        return VariantResults(by_block_size, kld_by_layer)

    def _against_base(self, context: Context, label: str) -> KldStatistics:
        start = time.monotonic()
        statistics = self._comparison.against_base(forward_of(context))
        _progress(f"{label}: PPL {statistics.ppl().value:.4f}, KLD {statistics.mean_kld().value:.5f}", start)
        return statistics


def _progress(text: str, start: float) -> None:
    print(f"{text} ({time.monotonic() - start:.1f} s)", file=sys.stderr, flush=True)


def bfp12(block_size: int) -> CacheOptions:
    """The paper's cache."""
    return CacheOptions("bfp12", "f16", block_size, "bfp16")


class OneLayer:
    """cache.protocol.Attention that is `one` in a layer and `others` elsewhere."""

    def __init__(self, layer: int, one: Attention, others: Attention):
        self._layer, self._one, self._others = layer, one, others

    def bound(self, n_tokens: int) -> int:
        """See Attention."""
        return n_tokens

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """See Attention."""
        self._one.begin(n_tokens, n_slots)
        self._others.begin(n_tokens, n_slots)

    def run(self, layer: int, qkv: FloatRows, out: FloatRows) -> None:
        """See Attention."""
        (self._one if layer == self._layer else self._others).run(layer, qkv, out)


def one_layer_contexts(model: NativeModel, block_size: int, n_ctx: int) -> Iterator[Context]:
    """For each layer, the model whose keys are BFP12 in that layer and f16 in all others, in real packed caches."""
    exact, coarse = model.start(F16, n_ctx), model.start(bfp12(block_size), n_ctx)
    for layer in range(model.spec.n_layers):
        yield model.start_with(exact.cache, OneLayer(layer, coarse.attention, exact.attention))


def run(args: argparse.Namespace) -> None:
    """Measure, draw where --plot asks for it, and print. Raises KsortError."""
    threads = n_threads(args.threads)
    plot_folder = None if args.plot is None else paper_plots.prepare(args.plot)
    with tempfile.TemporaryDirectory() as folder:
        stock_path = stock_gguf(Path(args.model), Path(folder))
        plan_path = Path(folder) / "ksort.gguf"
        head_dim = paper_head_dim(stock_path)
        block_sizes = tuple(size for size in BLOCK_SIZES if size <= head_dim)
        plots = [] if plot_folder is None else [plot_folder / "channel_norms.png", plot_folder / "kld_by_layer.png"]
        write_k_sort(stock_path, plan_path, plots[0] if plots else None)
        variants = ModelVariants(stock_path, [str(plan_path)], threads)
        tokens = tokenize_file(args.file, variants.tokenizer)
        comparison = Comparison(tokens, args.ctx_size, variants.spec.n_vocab, variants.bos_id, args.chunks)
        with comparison:
            meter = Meter(comparison, args.ctx_size)
            base = meter.base(variants.model())
            unsorted = meter.variant(variants.model(), "unsorted", block_sizes, by_layer=bool(plots))
            k_sorted = meter.variant(variants.model(plan_path.stem), "K-sorted", block_sizes, by_layer=bool(plots))
    if plots:
        paper_plots.draw_kld_by_layer(unsorted.kld_by_layer, k_sorted.kld_by_layer, min(block_sizes), plots[1])
    print(table(base, unsorted, k_sorted, head_dim))
    summary = {"model": Path(args.model).name, "text": Path(args.file).name, "n_ctx": args.ctx_size}
    summary |= {"n_chunks": comparison.n_chunks, "f16": base}
    summary |= {"unsorted": asdict(unsorted), "k_sorted": asdict(k_sorted)}
    print(json.dumps({**summary, "plots": [str(path) for path in plots]}))


def stock_gguf(model: Path, folder: Path) -> Path:
    """`model`, or the stock GGUF of a Hugging Face directory, written to `folder`."""
    if not model.is_dir():
        return model
    return convert(model, folder / "stock.gguf", plan="none").path


def paper_head_dim(stock_path: Path) -> int:
    """The head dimension. Raises KsortError for a folded file, and for heads that the paper's blocks do not fit."""
    with open_gguf(stock_path) as source:
        source.refuse_folded("give the stock model it was made from")
        if reason := why_unsorted(source):
            raise KsortError(f"{stock_path}: K-sort does not fit this model: {reason}")
        head_dims = {attention.head_dim for attention in source.spec.attentions}
    if len(head_dims) > 1:
        raise KsortError(f"{stock_path}: has heads of {sorted(head_dims)} channels, the table is for heads of one size")
    (head_dim,) = head_dims
    if head_dim < min(BLOCK_SIZES):
        raise KsortError(f"{stock_path}: has heads of {head_dim} channels, too few for blocks of {min(BLOCK_SIZES)}")
    return head_dim


def paper_plan(source: Source) -> tuple[KVPlan, np.ndarray]:
    """Every head sorted by row norm, also those that `ksort-gguf plan` would leave unsorted, and the rows' norms.

    Norms: float64 [n_layers, n_kv_heads, head_dim].
    """
    layers = enumerate(source.spec.attentions)
    energies = np.stack([key_energies(source, i, "weight-norm", *key_projection(source, a)) for i, a in layers])
    plan = KVPlan(
        name="ksort",
        steps=("order",),
        row_order=source.spec.row_order,
        base_architecture=source.spec.architecture,
        weights_hash=weights_hash(source),
        rank="weight-norm",
        order=np.argsort(-energies, axis=2, kind="stable").astype(np.int32),
    )
    return plan, np.sqrt(energies)


def write_k_sort(stock_path: Path, plan_path: Path, plot_path: Path | None) -> None:
    """Write the paper's plan as a plan file; with `plot_path`, draw what it does to the channels' norms."""
    with open_gguf(stock_path) as source:
        plan, norms = paper_plan(source)
    write_plan(plan_path, plan)
    if plot_path is not None and plan.order is not None:
        paper_plots.draw_channel_norms(norms, plan.order, min(BLOCK_SIZES), plot_path)


def table(base: dict[str, float], unsorted: VariantResults, k_sorted: VariantResults, head_dim: int) -> str:
    """Markdown: a line a block size, stock and sorted side by side."""
    lines = [
        "| BFP12 keys | bits per value | unsorted: PPL | to f16 | mean KLD | K-sorted: PPL | to f16 | mean KLD |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        f"| none: f16 | 16.00 | {base['ppl']:.4f} ± {base['ppl_error']:.4f} | | | | | |",
    ]
    for block_size in unsorted.by_block_size:
        cells = [
            f"blocks of {block_size}",
            f"{CACHE_TYPES['bfp12'].bits_per_value(head_dim, block_size):.2f}",
            *_cells(unsorted.by_block_size[block_size], base["ppl"]),
            *_cells(k_sorted.by_block_size[block_size], base["ppl"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    too_large = [str(size) for size in BLOCK_SIZES if size > head_dim]
    if too_large:
        lines.append(f"\nBlocks of {' and '.join(too_large)} do not fit this model's heads of {head_dim} channels.")
    if head_dim in unsorted.by_block_size:
        lines.append(f"\nA block of {head_dim} is a whole head: its order changes nothing.")
    return "\n".join(lines)


def _cells(result: dict[str, float], base_ppl: float) -> list[str]:
    """PPL, its change to f16 keys, and mean KLD."""
    return [
        f"{result['ppl']:.4f} ± {result['ppl_error']:.4f}",
        f"{100 * (result['ppl'] / base_ppl - 1):+.2f}%",
        f"{result['mean_kld']:.5f} ± {result['mean_kld_error']:.5f}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="paper_table.py", description="The K-sort paper's table for any model.")
    parser.add_argument(
        "-m", "--model", required=True, metavar="FILE", help="stock GGUF file or Hugging Face directory"
    )
    parser.add_argument("-f", "--file", required=True, metavar="FILE", help="text to score (UTF-8)")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=8, metavar="N", help="chunks scored (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--plot", metavar="FOLDER", help="draw channel norms and KLD by layer there, as PNG")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the large base file is removed
    return run_tool(run, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
