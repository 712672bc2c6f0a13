"""Builds the C tests (tests/native) with sanitizers and runs them: guard pages, fuzzed arguments, pool, the example."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "native"
SCRIPT = Path(__file__).parent / "native" / "run_sanitized.sh"
MISSING = [tool for tool in ("bash", "cmake", "make", "cc") if shutil.which(tool) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_sanitized_c_programs(tmp_path):
    """Catches reads and writes past any buffer, undefined behaviour, data races, and unchecked arguments."""
    environment = {name: value for name, value in os.environ.items() if name != "KSORT_KERNELS"}
    run = subprocess.run([SCRIPT, tmp_path / "build", "60"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("guard_pages: 60 problems") >= 1
    assert "pool_race: 60 steps" in run.stdout


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_builds_without_warnings(tmp_path, compiler):
    """Catches what only one compiler accepts, such as __builtin_cpu_supports("f16c"), which clang 14 does not know."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    options = [f"-DCMAKE_C_COMPILER={compiler}", "-DCMAKE_C_FLAGS=-Werror", "-DKSORT_CUDA=OFF"]
    configure = ["cmake", "-S", NATIVE, "-B", tmp_path, *options]
    for command in (configure, ["cmake", "--build", tmp_path, "--parallel"]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_readme_shows_the_example_that_is_run():
    """Catches an example in native/README.md that no longer compiles: it must be the file that the script runs."""
    example = (NATIVE / "examples" / "attend.c").read_text()
    assert f"```c\n{example}```" in (NATIVE / "README.md").read_text()
