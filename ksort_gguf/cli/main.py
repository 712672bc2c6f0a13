"""The command line: one subcommand a file in commands/. User errors become one line and a non-zero exit."""

import argparse
import logging
import os
import signal
import sys
from typing import NoReturn

from ksort_gguf import __version__
from ksort_gguf.binding.files import cuda_build
from ksort_gguf.cli import bench, chat, convert, demo, generate, inspect, perplexity, plan
from ksort_gguf.cli.flags import with_flags
from ksort_gguf.errors import KsortError

_COMMANDS = (convert, plan, inspect, generate, chat, perplexity, bench, demo)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all our errors are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole parser; `run` of the parsed arguments is the chosen command's function."""
    parser = _Parser(
        prog="ksort-gguf",
        description="Convert models for, and run them with, a 4-bit block floating point key and value cache.",
    )
    version = " ".join(f"ksort-gguf {__version__} {cuda_build()}".split())
    parser.add_argument("--version", action="version", version=version, help="the version, and what was built for GPUs")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.configure_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error, 130 when interrupted (2 is argparse's own)."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that half-written files are removed
    _log_to_stderr(getattr(args, "verbose", False))
    try:
        args.run(args)
        sys.stdout.flush()
    except KsortError as error:
        return _fail(with_flags(str(error)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        return _fail("out of memory: use a smaller model or context (-c)")
    except KeyboardInterrupt:
        return 130
    return 0


def _log_to_stderr(verbose: bool) -> None:
    """Warnings of the package (and of the gguf package) to stderr, or with `verbose` their notes too."""
    level = logging.INFO if verbose else logging.WARNING
    # force: what was there before, in a process that calls main() twice, may write to a stderr that is gone
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", force=True)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1
