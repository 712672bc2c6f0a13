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
import torch
from command_line import run_tool

from ksort_gguf.cache_types import CACHE_TYPES
from ksort_gguf.convert import convert
from ksort_gguf.errors import KsortError
from ksort_gguf.plan.kplan import KPlan
from ksort_gguf.plan.plan_file import write_plan
from ksort_gguf.plan.rank import layer_order, weight_energies, weights_hash
from ksort_gguf.runtime import perplexity as protocol
from ksort_gguf.runtime.kld import Base, BaseWriter
from ksort_gguf.runtime.kld_statistics import KldStatistics
from ksort_gguf.runtime.kv_cache import CacheOptions, KVCache
from ksort_gguf.runtime.load import LoadedModel, load_model
from ksort_gguf.runtime.model import N_UBATCH, Model
from ksort_gguf.sources.gguf_file import open_gguf

BLOCK_SIZES = (128, 64, 32)  # the paper's


class Meter:
    """Scores caches on the first chunks of a text, against the stock model with f16 keys."""

    def __init__(self, loaded: LoadedModel, text: str, n_ctx: int, chunks: int, base_path: Path):
        """`base_path` is written by `measure_base`. Raises KsortError for a text that cannot be scored."""
        tokens = protocol.tokenize_file(text, loaded.tokenizer)
        self.n_ctx, self.n_chunks = n_ctx, protocol.count_chunks(len(tokens), n_ctx, chunks)
        self._tokens = tokens[: self.n_chunks * n_ctx]
        self._n_vocab, self._base_path = loaded.model.n_vocab, base_path
        self._bos_id = loaded.tokenizer.bos_id if loaded.tokenizer.add_bos else None

    def measure_base(self, loaded: LoadedModel) -> dict:
        """Perplexity of the stock model with f16 keys; keeps its log-probabilities for `compare`."""
        start = time.monotonic()
        forward = protocol.forward_of(loaded.model.start(f16_options(loaded), self.n_ctx))
        with BaseWriter(self._base_path, self.n_ctx, self._n_vocab, self._tokens) as writer:
            result = protocol.perplexity(forward, self._tokens, self.n_ctx, -1, self._bos_id, base_writer=writer)
        _progress(f"f16 keys: PPL {result.ppl:.4f}", start)
        return {"ppl": result.ppl, "ppl_error": result.error}

    def compare(self, forward: protocol.Forward, label: str) -> KldStatistics:
        """How `forward` differs from the base; `label` is for the progress line."""
        start = time.monotonic()
        with Base(self._base_path, self._n_vocab) as base:
            statistics = protocol.kl_divergence(forward, base, self._bos_id)
        _progress(f"{label}: PPL {statistics.ppl().value:.4f}, KLD {statistics.mean_kld().value:.5f}", start)
        return statistics


def _progress(text: str, start: float) -> None:
    print(f"{text} ({time.monotonic() - start:.1f} s)", file=sys.stderr, flush=True)


def f16_options(loaded: LoadedModel) -> CacheOptions:
    """The exact baseline: f16 keys, queries as they are."""
    return loaded.cache_options("f16", v_type="f16", query_type="f32")


def bfp12_options(loaded: LoadedModel, block_size: int) -> CacheOptions:
    """The paper's cache."""
    return loaded.cache_options("bfp12", v_type="f16", block_size=block_size, query_type="bfp16")


@dataclass(frozen=True)
class VariantResults:
    """Half of the table: the model in stock order, or K-sorted."""

    by_block_size: dict[int, dict[str, float]]  # ppl, ppl_error, mean_kld, mean_kld_error
    kld_by_layer: list[float]  # mean KLD with only that layer's keys in BFP12; empty where not asked for


def measure_variant(
    meter: Meter, loaded: LoadedModel, name: str, block_sizes: tuple[int, ...], by_layer: bool
) -> VariantResults:
    """All measurements of the model in one order, `name`; by layer, in the smallest of the block sizes."""
    by_block_size = {}
    for block_size in block_sizes:
        sequence = loaded.model.start(bfp12_options(loaded, block_size), meter.n_ctx)
        statistics = meter.compare(protocol.forward_of(sequence), f"{name}, blocks of {block_size}")
        ppl, kld = statistics.ppl(), statistics.mean_kld()
        by_block_size[block_size] = {
            "ppl": ppl.value,
            "ppl_error": ppl.error,
            "mean_kld": kld.value,
            "mean_kld_error": kld.error,
        }
    forwards = one_layer_forwards(loaded, min(block_sizes), meter.n_ctx) if by_layer else ()
    kld_by_layer = [
        meter.compare(forward, f"{name}, only layer {layer}").mean_kld().value for layer, forward in enumerate(forwards)
    ]
    return VariantResults(by_block_size, kld_by_layer)


def one_layer_forwards(loaded: LoadedModel, block_size: int, n_ctx: int) -> Iterator[protocol.Forward]:
    """For each layer, the model whose keys are BFP12 in that layer and f16 in all others, in real packed caches."""
    model = loaded.model
    options = f16_options(loaded), bfp12_options(loaded, block_size)
    f16, bfp12 = (model.layer_steps(KVCache(model.geometry, each, n_ctx)) for each in options)
    for layer in range(model.geometry.n_layers):
        yield _forward_through(model, [*f16[:layer], bfp12[layer], *f16[layer + 1 :]])


def _forward_through(model: Model, steps: list) -> protocol.Forward:
    """A model whose layers pack and attend with `steps`."""

    @torch.inference_mode()
    def forward(tokens: list[int], first_logit: int) -> torch.Tensor:
        parts = torch.tensor(tokens).split(N_UBATCH)
        hidden = [model.run_layers(part, steps, i * N_UBATCH) for i, part in enumerate(parts)]
        return model.logits(torch.cat(hidden)[first_logit:])

    return forward


def run(args: argparse.Namespace) -> None:
    """Measure, draw where --plot asks for it, and print. Raises KsortError."""
    if args.threads < 0:
        raise KsortError(f"--threads {args.threads} is negative: pass a count, or leave it out for all CPUs")
    plot_folder = None if args.plot is None else paper_plots.prepare(args.plot)
    with tempfile.TemporaryDirectory() as folder:
        stock_path = stock_gguf(Path(args.model), Path(folder))
        plan_path = Path(folder) / "ksort.gguf"
        block_sizes = fitting_block_sizes(stock_path)
        plots = [] if plot_folder is None else [plot_folder / "channel_norms.png", plot_folder / "kld_by_layer.png"]
        write_k_sort(stock_path, plan_path, plots[0] if plots else None)
        loaded = load_model(stock_path, n_threads=args.threads)
        meter = Meter(loaded, args.file, args.ctx_size, args.chunks, Path(folder) / "base")
        base = meter.measure_base(loaded)
        unsorted = measure_variant(meter, loaded, "unsorted", block_sizes, by_layer=bool(plots))
        del loaded  # or a large model would be in memory twice
        loaded = load_model(stock_path, plan_path, args.threads)
        k_sorted = measure_variant(meter, loaded, "K-sorted", block_sizes, by_layer=bool(plots))
    if plots:
        paper_plots.draw_kld_by_layer(unsorted.kld_by_layer, k_sorted.kld_by_layer, min(block_sizes), plots[1])
    print(table(base, unsorted, k_sorted, loaded.model.geometry.head_dim))
    summary = {"model": Path(args.model).name, "text": Path(args.file).name, "n_ctx": meter.n_ctx}
    summary |= {"n_chunks": meter.n_chunks, "f16": base, "unsorted": asdict(unsorted), "k_sorted": asdict(k_sorted)}
    print(json.dumps({**summary, "plots": [str(path) for path in plots]}))


def stock_gguf(model: Path, folder: Path) -> Path:
    """`model`, or the stock GGUF of a Hugging Face directory, written to `folder`."""
    if not model.is_dir():
        return model
    return convert(model, folder / "stock.gguf", plan="none").path


def fitting_block_sizes(stock_path: Path) -> tuple[int, ...]:
    """The paper's block sizes that the model's heads can hold. Raises KsortError if none, or for a folded file."""
    with open_gguf(stock_path) as source:
        if source.plan is not None:
            raise KsortError(f"{stock_path}: is folded already: give the stock model it was made from")
        head_dim = source.geometry.head_dim
    sizes = tuple(size for size in BLOCK_SIZES if size <= head_dim)
    if not sizes:
        raise KsortError(f"{stock_path}: has heads of {head_dim} channels, too few for blocks of {min(BLOCK_SIZES)}")
    return sizes


def paper_plan(source) -> KPlan:
    """Every head sorted by row norm, also those that `ksort-gguf plan` would leave unsorted."""
    layers = range(source.geometry.n_layers)
    return KPlan(
        name="ksort",
        steps=("order",),
        row_order=source.family.row_order,
        base_architecture=source.family.name,
        weights_hash=weights_hash(source),
        rank="weight-norm",
        order=np.stack([layer_order(source, layer, "weight-norm") for layer in layers]),
    )


def write_k_sort(stock_path: Path, plan_path: Path, plot_path: Path | None) -> None:
    """Write the paper's plan as a plan file; with `plot_path`, draw what it does to the channels' norms."""
    with open_gguf(stock_path) as source:
        plan = paper_plan(source)
        write_plan(plan_path, plan)
        if plot_path is None:
            return
        weights = (source.tensor(source.family.k_tensors(layer)[0]) for layer in range(source.geometry.n_layers))
        norms = np.sqrt([weight_energies(weight.read_finite_f32(), source.geometry) for weight in weights])
        paper_plots.draw_channel_norms(norms, plan.order, min(BLOCK_SIZES), plot_path)


def table(base: dict[str, float], unsorted: VariantResults, k_sorted: VariantResults, head_dim: int) -> str:
    """Markdown: a line a block size, stock and sorted side by side."""
    lines = [
        "| BFP12 keys | bits a value | unsorted: PPL | to f16 | mean KLD | K-sorted: PPL | to f16 | mean KLD |",
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
