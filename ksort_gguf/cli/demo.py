"""`ksort-gguf demo`: the whole path on a small real model, in a minute or two."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ksort_gguf.cli.arguments import Subparsers
    from ksort_gguf.engine.load import LoadedModel

_N_CTX = 512
_N_CHUNKS = 4
_PROMPT = "A key cache stores"
_N_PREDICT = 32
_WITH_EXACT = "... and exact rows"  # the newest 128 tokens and the first 4, as by default


def configure_parser(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "demo",
        help="convert, run and measure a small model",
        description="Downloads SmolLM2-135M (93 MB, once), converts it, generates text, and measures seven caches.",
    )
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from ksort_gguf.cli.demo_model import demo_model
    from ksort_gguf.engine.load import load_model
    from ksort_gguf.plan.convert import convert

    stock_path = demo_model()
    folded_path, sorted_path = stock_path.with_suffix(".ksort.gguf"), stock_path.with_suffix(".sorted.gguf")
    convert(stock_path, folded_path, force=True)
    print(f"{stock_path}\n  -> {folded_path} (balanced plan, SBFP12 key cache declared)\n")
    balanced = load_model(folded_path, n_threads=args.threads)
    _generate(balanced)
    stock = load_model(stock_path, n_threads=args.threads)
    convert(stock_path, sorted_path, plan="ksort", force=True)
    k_sorted = load_model(sorted_path, n_threads=args.threads)
    _measure(
        [
            ("f16 K, f16 V", stock, "f16", "f16"),
            ("BFP12 K, unsorted", stock, "bfp12", "f16"),
            ("BFP12 K, K-sort", k_sorted, "bfp12", "f16"),
            ("BFP12 K, balanced", balanced, "bfp12", "f16"),
            ("SBFP12 K, balanced", balanced, "sbfp12", "f16"),
            ("SBFP12 K and V", balanced, "sbfp12", "sbfp12"),
            (_WITH_EXACT, balanced, "sbfp12", "sbfp12"),
        ]
    )


def _generate(loaded: "LoadedModel") -> None:
    """A greedy continuation of the prompt, streamed, and what it took."""
    from ksort_gguf.engine.sampling import Sampler
    from ksort_gguf.engine.session import Generator

    generator = Generator(loaded.backend.start(loaded.cache_options(), _N_CTX), Sampler(temp=0))
    generator.set_prompt(loaded.tokenizer.encode(_PROMPT))
    stream = loaded.tokenizer.stream()
    print(_PROMPT, end="", flush=True)
    for token in generator.generate(_N_PREDICT):
        print(stream.feed(token), end="", flush=True)
    print(f"{stream.flush()}\n\n{generator.report()}\n")


def _measure(caches: list[tuple[str, "LoadedModel", str, str]]) -> None:
    """Perplexity, KL divergence to the first cache, and bytes, of (label, model, K type, V type) caches on one text."""
    from ksort_gguf.engine.calibration import default_text
    from ksort_gguf.eval.compare import Comparison
    from ksort_gguf.eval.perplexity import forward_of

    tokenizer, n_vocab = caches[0][1].tokenizer, caches[0][1].backend.n_vocab
    tokens = tokenizer.encode(default_text(), parse_special=False)
    print(f"Python's own documentation, {_N_CHUNKS} chunks of {_N_CTX} tokens:\n")
    print(f"{'cache':<20}{'PPL':>9}{'mean KLD':>11}{'bits per value':>16}{'bytes at ' + str(_N_CTX):>15}")
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    with Comparison(tokens, _N_CTX, n_vocab, bos_id, _N_CHUNKS) as comparison:
        for row, (label, loaded, k_type, v_type) in enumerate(caches):
            n_exact = None if label == _WITH_EXACT else 0  # the default, or the types alone
            options = loaded.cache_options(k_type, v_type, exact_tail=n_exact, exact_sinks=n_exact)
            context = loaded.backend.start(options, _N_CTX)
            forward = forward_of(context)
            if row == 0:
                ppl, kld = comparison.base(forward).ppl, "-"
            else:
                statistics = comparison.against_base(forward)
                ppl, kld = statistics.ppl().value, f"{statistics.mean_kld().value:.4f}"
            n_bytes = context.cache.k_bytes() + context.cache.v_bytes()
            n_values = (
                2 * context.cache.n_tokens * sum(a.n_kv_heads * a.head_dim for a in loaded.backend.spec.attentions)
            )
            print(f"{label:<20}{ppl:>9.3f}{kld:>11}{n_bytes * 8 / n_values:>16.2f}{n_bytes:>15,}", flush=True)
