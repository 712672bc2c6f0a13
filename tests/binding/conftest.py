"""Tests of the binding run at every kernel level that this CPU supports."""

import pytest

from ksort_gguf.binding import levels


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `level` runs once at each of them."""
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", levels.available_levels(), indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest):
    """The name of the kernel level in use for the test's duration."""
    levels.select_kernels(request.param)
    yield request.param
    levels.select_kernels(None)
