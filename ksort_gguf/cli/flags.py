"""What the command line calls the arguments that errors name in backticks."""

import re

_FLAGS = {
    "calibrate": "--calibrate",
    "calibrate_tokens": "--calibrate-tokens",
    "block_size": "--block-size",
    "cache_exact_sinks": "--cache-exact-sinks",
    "cache_exact_tail": "--cache-exact-tail",
    "cache_type_k": "--cache-type-k",
    "cache_type_v": "--cache-type-v",
    "chat_template": "--chat-template",
    "chat_template_file": "--chat-template-file",
    "chunks": "--chunks",
    "device": "--device",
    "force": "--force",
    "kl_divergence_base": "--kl-divergence-base",
    "min_p": "--min-p",
    "n_ctx": "--ctx-size",
    "n_predict": "--predict",
    "n_threads": "--threads",
    "outfile": "--outfile",
    "outtype": "--outtype",
    "plan": "--plan",
    "plan_file": "--plan-file",
    "prompt": "--prompt",
    "query_type": "--query-type",
    "rank": "--rank",
    "repeat_last_n": "--repeat-last-n",
    "repeat_penalty": "--repeat-penalty",
    "seed": "--seed",
    "temp": "--temp",
    "top_p": "--top-p",
}


def with_flags(text: str) -> str:
    """An error's text with flags in the place of `arguments`."""
    return re.sub(r"`(\w+)`", lambda match: _FLAGS.get(match[1], match[0]), text)
