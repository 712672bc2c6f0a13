"""Fixtures shared by all tests."""

import numpy as np
import pytest


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(20240331)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `level` runs once at every kernel level that this CPU supports."""
    if "level" in metafunc.fixturenames:
        from ksort_gguf import native

        metafunc.parametrize("level", native.available_levels(), indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest):
    """The name of the kernel level in use for the test's duration."""
    from ksort_gguf import native

    native.select_kernels(request.param)
    yield request.param
    native.select_kernels(None)
