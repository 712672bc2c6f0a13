"""Damaged GGUF files and Hugging Face checkpoints for the readers: each must be read, or refused with a KsortError.

    python tests/fuzz/fuzz_readers.py --seconds 60

Any other exception, more than MEMORY_BYTES of memory, or an input that takes longer than INPUT_SECONDS is a failure: it
is printed with its number, and `--seed S --replay NUMBER` makes the same input again.
"""

import argparse
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

from inputs import Inputs

from ksort_gguf.checkpoint.safetensors import Checkpoint
from ksort_gguf.container.gguf_reader import open_container
from ksort_gguf.errors import KsortError
from ksort_gguf.models.open import open_model

MEMORY_BYTES = 8 << 30  # of address space
INPUT_SECONDS = 10
ROWS = 4  # read of every tensor that opens


def read_all(path: Path) -> None:
    """All that the readers offer: every value, some rows of every tensor, and the file as a model."""
    if path.is_dir():
        checkpoint = Checkpoint(path)
        try:
            read_tensors(checkpoint.tensors)
        finally:
            checkpoint.close()
    else:
        container = open_container(path)
        try:
            for value in container.values.values():
                value.decode()
            read_tensors(container.tensors)
        finally:
            container.file.close()
    source = open_model(path)
    try:
        read_tensors(source.tensors)
    finally:
        source.close()


def read_tensors(tensors: dict) -> None:
    """The first rows of each."""
    for tensor in tensors.values():
        if tensor.shape:
            tensor.read_rows(0, min(ROWS, tensor.shape[0]))


def fails(path: Path, number: int) -> bool:
    """Read one input; whether that was a failure, which is printed."""
    start = time.monotonic()
    try:
        read_all(path)
    except KsortError:
        pass
    except Exception:
        print(f"input {number}:\n{traceback.format_exc()}", file=sys.stderr)
        return True
    if time.monotonic() - start > INPUT_SECONDS:
        print(f"input {number}: took {time.monotonic() - start:.0f} s", file=sys.stderr)
        return True
    return False


def main(argv: list[str] | None = None) -> int:
    """Exit status: 1 if any input failed."""
    parser = argparse.ArgumentParser(description="Read damaged model files; any exception but KsortError is a failure.")
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="default: %(default)s")
    parser.add_argument("--inputs", type=int, metavar="N", help="stop after so many (default: only by time)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="read this input alone")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder), args.seed)
        for path in inputs.valid():
            read_all(path)  # or damage would be all that is tested
        if args.replay is not None:
            return int(fails(inputs.make(args.replay), args.replay))
        n_failed, number, end = 0, 0, time.monotonic() + args.seconds
        while time.monotonic() < end and (args.inputs is None or number < args.inputs):
            n_failed += fails(inputs.make(number), number)
            number += 1
    print(f"fuzz_readers: seed {args.seed}, {number} inputs, {n_failed} failures")
    return int(n_failed > 0)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.exit(main())
