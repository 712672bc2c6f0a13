"""What the tools' command lines share."""

import argparse
import sys
from collections.abc import Callable

from ksort_gguf.errors import KsortError


def run_tool(run: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Parse `argv` (None: the process's) and run; returns the exit status: 1, with one line, for a KsortError."""
    try:
        run(parser.parse_args(argv))
    except KsortError as error:
        print(f"error: {error}", file=sys.stderr)
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
