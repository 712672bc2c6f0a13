"""Arguments that generate, chat and perplexity share, named as llama.cpp names them."""

import argparse
import sys
from typing import TYPE_CHECKING

from ksort_gguf.errors import KsortError
from ksort_gguf.names import BLOCK_SIZES, EXACT_SINKS, EXACT_TAIL, K_TYPES, QUERY_TYPES, V_TYPES

if TYPE_CHECKING:
    from ksort_gguf.cache.protocol import CacheOptions
    from ksort_gguf.engine.load import LoadedModel
    from ksort_gguf.engine.sampling import Sampler

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DEVICES = ("none", "cpu", "cuda")  # none: llama.cpp's word for the CPU alone


def add_model_arguments(parser: argparse.ArgumentParser, default_ctx: int) -> None:
    """-m and what decides how it runs."""
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file, stock or folded")
    parser.add_argument("--plan-file", metavar="FILE", help="KV plan for a stock GGUF")
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=default_ctx,
        metavar="N",
        help="context size in tokens, 0 for the model's own (default: %(default)s)",
    )
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    parser.add_argument(
        "-ctk",
        "--cache-type-k",
        choices=K_TYPES,
        help="how keys are stored (default: what the file declares; f16 for a stock file)",
    )
    parser.add_argument("-ctv", "--cache-type-v", choices=V_TYPES, help="how values are stored (default: f16)")
    parser.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        help="channels that share an exponent (default: what the file declares; 32)",
    )
    parser.add_argument(
        "--query-type",
        choices=QUERY_TYPES,
        help="what queries are rounded to (default: bfp16 beside BFP keys, f32 beside float keys)",
    )
    add_exact_arguments(parser)
    add_device_arguments(parser)


def add_exact_arguments(parser: argparse.ArgumentParser) -> None:
    """Tokens that are kept exactly beside packed caches."""
    beside = "beside a cache type of 4 bits or less, 0 beside others and on a GPU"
    parser.add_argument(
        "--cache-exact-tail",
        type=int,
        metavar="N",
        help=f"the newest N tokens are kept in f16, too, 0 for none (default: {EXACT_TAIL} {beside})",
    )
    parser.add_argument(
        "--cache-exact-sinks",
        type=int,
        metavar="S",
        help=f"the first S tokens are kept in f16, too, 0 for none (default: {EXACT_SINKS} {beside})",
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the model runs."""
    parser.add_argument(
        "--device",
        choices=_DEVICES,
        help="cuda: run on a GPU, which takes a CUDA build of torch, and ksort-gguf installed where nvcc was on PATH; "
        "none, cpu: run on the CPU (default, unless -ngl says otherwise)",
    )
    parser.add_argument(
        "-ngl",
        "--n-gpu-layers",
        "--gpu-layers",
        type=int,
        metavar="N",
        help="more than 0: as --device cuda with all layers, where a GPU can be used; 0: the CPU",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """llama.cpp's sampling flags and defaults."""
    parser.add_argument(
        "-n",
        "--predict",
        "--n-predict",
        type=int,
        default=-1,
        metavar="N",
        help="tokens to generate, -1 until the model ends or the context is full (default: %(default)s)",
    )
    parser.add_argument(
        "-s", "--seed", type=int, default=-1, help="random seed, -1 for a random one (default: %(default)s)"
    )
    parser.add_argument("--temp", type=float, default=0.8, help="temperature, 0 for greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=40, help="keep the k likeliest, 0 for all (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="keep this much probability (default: %(default)s)")
    parser.add_argument(
        "--min-p", type=float, default=0.05, help="drop tokens below this share of the likeliest (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat-penalty",
        type=float,
        default=1.0,
        help="penalty for repeated tokens, 1 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--repeat-last-n",
        type=int,
        default=64,
        help="tokens looked back at for the penalty, 0 off, -1 the context (default: %(default)s)",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")


def load(args: argparse.Namespace) -> "LoadedModel":
    """Load the model that `args` name where they say, after checking what argparse cannot."""
    device = _device(args)
    from ksort_gguf.engine.load import load_model

    return load_model(args.model, args.plan_file, args.threads, device)


def _device(args: argparse.Namespace) -> str:
    """Either "cpu" or "cuda". -ngl without a GPU is no error, as in llama.cpp: a note says why it is ignored."""
    n_layers = args.n_gpu_layers or 0
    if n_layers < 0:
        raise KsortError(f"-ngl {n_layers} is negative: pass 99 for the GPU, or 0 for the CPU")
    if args.device == "cuda" and args.n_gpu_layers == 0:
        raise KsortError("-ngl 0 keeps the model on the CPU, --device cuda does not: leave one of them out")
    if args.device is not None:
        return "cuda" if args.device == "cuda" else "cpu"
    if not n_layers:
        return "cpu"
    from ksort_gguf.cache.cuda_device import missing

    if what := missing():
        print(f"note: -ngl {n_layers} is ignored, the model runs on the CPU: {what}", file=sys.stderr)
    return "cpu" if what else "cuda"


def cache_options(args: argparse.Namespace, loaded: "LoadedModel") -> "CacheOptions":
    """The cache options that the file declares and `args` override."""
    return loaded.cache_options(
        args.cache_type_k,
        args.cache_type_v,
        args.block_size,
        args.query_type,
        args.cache_exact_tail,
        args.cache_exact_sinks,
    )


def make_sampler(args: argparse.Namespace) -> "Sampler":
    """A sampler as the flags say. Raises KsortError naming the flag that is out of range."""
    if args.predict < -1:
        raise KsortError(f"--predict {args.predict} is not a count: pass one, or -1 for no limit")
    from ksort_gguf.engine.sampling import Sampler

    return Sampler(
        temp=args.temp,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        seed=args.seed,
    )
