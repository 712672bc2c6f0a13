"""Passkey retrieval: whether a model still finds a number hidden in a long text, by context length and key cache.

    python tools/passkey.py -m model.gguf -c 1024,2048,4096,8192 -ctk f16 bfp12

The test of "Landmark Attention" (Mohtashami & Jaggi, arXiv 2305.16300, section 4.2): filler text with a 5-digit pass
key at a random depth, and the question at the end, which the model continues greedily through the real packed cache.
The prompt is plain text for instruct models too: it ends with the answer's first words, where a chat template lets
small models answer with a remark instead.

Prints a Markdown table of accuracies, then one JSON line. The same seed gives the same prompts and answers.
"""

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command_line import counts, run_tool

from ksort_gguf.engine.load import LoadedModel, load_model
from ksort_gguf.engine.sampling import Sampler
from ksort_gguf.engine.session import Generator
from ksort_gguf.engine.tokenizer.tokenizer import Tokenizer
from ksort_gguf.errors import KsortError
from ksort_gguf.names import CACHE_TYPES, K_TYPES

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "What is the pass key? The pass key is"
N_ANSWER = 16  # tokens kept free for the answer: a space, five digits, and some that may come before them


@dataclass(frozen=True)
class Trial:
    """One hidden key."""

    depth: float  # share of the filler in front of the key
    key: int  # 10000 .. 99999

    def text(self, n_filler: int) -> str:
        """The prompt with `n_filler` characters of filler; the paper cuts it at any character, too."""
        filler = FILLER * (n_filler // len(FILLER) + 1)
        n_before = round(self.depth * n_filler)
        info = f"The pass key is {self.key}. Remember it. {self.key} is the pass key."
        return "\n".join((TASK, filler[:n_before], info, filler[: n_filler - n_before], QUESTION))


def draw_trials(seed: int, n_ctx: int, n_trials: int) -> list[Trial]:
    """The trials of one context length, by rising depth: each prompt then begins as the one before it up to its key."""
    random = np.random.default_rng([seed, n_ctx])
    depths, keys = random.random(n_trials), random.integers(10_000, 100_000, n_trials)
    return sorted((Trial(float(d), int(k)) for d, k in zip(depths, keys, strict=True)), key=lambda trial: trial.depth)


def prompt_ids(tokenizer: Tokenizer, trial: Trial, n_tokens: int) -> list[int]:
    """Token ids of the trial's prompt with as much filler as `n_tokens` tokens hold.

    Raises KsortError if the prompt takes more even without filler.
    """
    shortest = tokenizer.encode(trial.text(0))
    if len(shortest) > n_tokens:
        least = len(shortest) + N_ANSWER
        raise KsortError(f"-c {n_tokens + N_ANSWER}: the passkey prompt needs at least {least} tokens: raise it")
    fits, too_long = 0, len(FILLER)  # characters of filler
    ids = shortest
    while len(tokenizer.encode(trial.text(too_long))) <= n_tokens:
        too_long *= 2
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        tried = tokenizer.encode(trial.text(middle))
        if len(tried) <= n_tokens:
            fits, ids = middle, tried
        else:
            too_long = middle
    return ids


def answer(generator: Generator, tokenizer: Tokenizer, ids: list[int]) -> str:
    """The greedy continuation of the prompt `ids` until a number has ended, at most N_ANSWER tokens."""
    generator.set_prompt(ids)
    text, stream = "", tokenizer.stream()
    for token in generator.generate(N_ANSWER, tokenizer.eog_ids):
        text += stream.feed(token)
        if re.search(r"\d\D", text):
            break
    return text


def is_right(text: str, key: int) -> bool:
    """Whether the first number in an answer is the key."""
    number = re.search(r"\d+", text)
    return number is not None and number[0] == str(key)


def measure(loaded: LoadedModel, k_type: str, n_ctx: int, trials: list[Trial], prompts: list[list[int]]) -> dict:
    """Accuracy of one cache at one context length; `prompts` are the token ids of `trials`."""
    start = time.monotonic()
    generator = Generator(loaded.backend.start(loaded.cache_options(k_type), n_ctx), Sampler(temp=0))
    n_right = 0
    for trial, ids in zip(trials, prompts, strict=True):
        said = answer(generator, loaded.tokenizer, ids)
        n_right += is_right(said, trial.key)
        print(f"c={n_ctx} {k_type}, depth {trial.depth:.2f}: {trial.key} -> {said!r}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - start
    print(f"c={n_ctx} {k_type}: {n_right} of {len(trials)} right, {seconds:.1f} s", file=sys.stderr, flush=True)
    return {"n_ctx": n_ctx, "cache_type_k": k_type, "n_right": n_right, "n_trials": len(trials)}


def run(args: argparse.Namespace) -> None:
    """Measure every cache at every context, and print. Raises KsortError."""
    wanted = counts("-c", args.ctx_size, lowest=1)
    for flag, value, least in (("--trials", args.trials, 1), ("--seed", args.seed, 0), ("--threads", args.threads, 0)):
        if value < least:
            raise KsortError(f"{flag} {value} is too small: pass {least} or more")
    loaded = load_model(args.model, args.plan_file, args.threads)
    contexts = _that_fit(wanted, loaded.context(0))
    results = []
    for n_ctx in contexts:
        trials = draw_trials(args.seed, n_ctx, args.trials)
        prompts = [prompt_ids(loaded.tokenizer, trial, n_ctx - N_ANSWER) for trial in trials]
        results += [measure(loaded, k_type, n_ctx, trials, prompts) for k_type in args.cache_type_k]
    print(table(results))
    plan = None if args.plan_file is None else Path(args.plan_file).name
    print(json.dumps({"model": Path(args.model).name, "plan_file": plan, "seed": args.seed, "results": results}))


def _that_fit(contexts: list[int], longest: int) -> list[int]:
    """The `contexts` up to the model's own, `longest`. Raises KsortError if none is left."""
    for n_ctx in contexts:
        if n_ctx > longest:
            print(f"note: context {n_ctx} is left out: the model was made for {longest}", file=sys.stderr)
    kept = [n_ctx for n_ctx in contexts if n_ctx <= longest]
    if not kept:
        raise KsortError(f"-c: the model was made for contexts up to {longest}: ask for a smaller one")
    return kept


def table(results: list[dict]) -> str:
    """Markdown: a line a cache type, a column a context."""
    contexts = list(dict.fromkeys(result["n_ctx"] for result in results))
    cells = {(result["cache_type_k"], result["n_ctx"]): result for result in results}
    lines = [
        f"| K cache | {' | '.join(f'{n_ctx} tokens' for n_ctx in contexts)} |",
        f"|---|{'---:|' * len(contexts)}",
    ]
    for k_type in dict.fromkeys(result["cache_type_k"] for result in results):
        shares = (cells[k_type, n_ctx]["n_right"] / cells[k_type, n_ctx]["n_trials"] for n_ctx in contexts)
        lines.append(f"| {k_type} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="passkey.py", description="Passkey retrieval by context length and key cache."
    )
    parser.add_argument("-m", "--model", required=True, metavar="FILE", help="GGUF file, stock or folded")
    parser.add_argument(
        "-c",
        "--ctx-size",
        default="1024,2048,4096,8192",
        metavar="N,...",
        help="context lengths, prompt and answer together (default: %(default)s)",
    )
    parser.add_argument("--trials", type=int, default=10, metavar="N", help="keys a context (default: %(default)s)")
    parser.add_argument(
        "-ctk",
        "--cache-type-k",
        nargs="+",
        choices=K_TYPES,
        default=["f16", "bfp12"],
        metavar="TYPE",
        help=f"how keys are stored, one or more of {' '.join(CACHE_TYPES)} (default: f16 bfp12)",
    )
    parser.add_argument("--plan-file", metavar="FILE", help="KV plan to fold a stock GGUF with on load")
    parser.add_argument("-s", "--seed", type=int, default=0, help="of keys and depths (default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 for an error."""
    return run_tool(run, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
