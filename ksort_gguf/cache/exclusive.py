"""Refusing what two threads do to one context at the same time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ksort_gguf.errors import BusyError


@contextmanager
def exclusive(lock: threading.Lock) -> Iterator[None]:
    """Hold `lock`, or raise BusyError where another thread has it."""
    if not lock.acquire(blocking=False):
        raise BusyError("this context is in use by another thread: start one for each thread")
    try:
        yield
    finally:
        lock.release()
