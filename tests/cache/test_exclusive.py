"""One context, one thread at a time."""

import threading

import pytest

from ksort_gguf.cache.exclusive import exclusive
from ksort_gguf.errors import BusyError, KsortError


def test_another_thread_is_refused_and_does_not_wait():
    """Catches a second thread that waits, or that walks into the first one's step."""
    lock, found = threading.Lock(), []

    def other():
        try:
            with exclusive(lock):
                found.append("inside")
        except BusyError as error:
            found.append(error)

    with exclusive(lock):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert isinstance(found[0], KsortError) and "another thread" in str(found[0])
    other()
    assert found[1] == "inside"


def test_an_error_gives_the_context_back():
    """Catches a context that is busy for ever after a step that failed."""
    lock = threading.Lock()
    with pytest.raises(ZeroDivisionError), exclusive(lock):
        raise ZeroDivisionError
    with exclusive(lock):
        pass
    with exclusive(lock), pytest.raises(BusyError), exclusive(lock):
        pass
    assert not lock.locked()
