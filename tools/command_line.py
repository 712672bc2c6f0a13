"""What the tools' command lines share."""

import argparse
import os
import sys
from collections.abc import Callable

from ksort_gguf.cli.flags import with_flags
from ksort_gguf.errors import KsortError


def run_tool(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parse `argv` (None: the process's) and run; returns the exit status: 1, with one line, for a KsortError."""
    try:
        run(parser.parse_args(argv))
    except KsortError as error:
        print(f"error: {with_flags(str(error))}", file=sys.stderr)
        return 1
    return 0


def counts(flag: str, text: str, lowest: int) -> list[int]:
    """The counts of "512,4096". Raises KsortError for anything else, and for one below `lowest`."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < lowest:
        raise KsortError(f"{flag} {text}: expected numbers of at least {lowest}, such as 512 or 512,4096")
    return numbers


def n_threads(wanted: int) -> int:
    """The threads that --threads asks for; 0: one for each CPU. Raises KsortError for a negative number."""
    if wanted < 0:
        raise KsortError(f"--threads {wanted} is negative: pass a count, or leave it out for all CPUs")
    return wanted or os.cpu_count() or 1
