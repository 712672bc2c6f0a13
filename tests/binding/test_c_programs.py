"""Builds libksort and the C tests (tests/native) and runs them: guard pages, fuzzed arguments, pool, install."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1] / "native"
NATIVE = Path(__file__).parents[2] / "native"


def run(*command, **options) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "KSORT_KERNELS"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """A folder whose `library` is a build of all of native/ but CUDA, without a warning; what configuring printed too.

    `library` is where run_install.sh builds, so that nothing is compiled twice. -O1 still warns of flow.
    """
    folder = tmp_path_factory.mktemp("build")
    options = ["-DCMAKE_C_FLAGS=-Werror -O1", "-DCMAKE_BUILD_TYPE=Debug", "-DKSORT_CUDA=OFF"]
    configured = run("cmake", "-S", NATIVE, "-B", folder / "library", *options)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    (folder / "configured.txt").write_text(configured.stdout)
    built = run("cmake", "--build", folder / "library", "--parallel", "2")
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@needs("bash", "cmake", "make", "cc")
def test_sanitized_c_programs(tmp_path):
    """Catches reads and writes past any buffer, undefined behaviour, data races, and unchecked arguments."""
    done = run(TESTS / "run_sanitized.sh", tmp_path / "build", "40")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("guard_pages: 40 problems") >= 1
    assert "pool_race: 40 steps" in done.stdout


@needs("cmake", "make", "clang")
def test_clang_builds_without_warnings(tmp_path):
    """Catches what only one compiler accepts, such as __builtin_cpu_supports("f16c"), which clang 14 does not know.

    The fixture `build` is the other compiler's.
    """
    options = ["-DCMAKE_C_COMPILER=clang", "-DCMAKE_C_FLAGS=-Werror", "-DCMAKE_BUILD_TYPE=Debug", "-DKSORT_CUDA=OFF"]
    for command in (("-S", NATIVE, "-B", tmp_path, *options), ("--build", tmp_path, "--parallel", "2")):
        done = run("cmake", *command)
        assert done.returncode == 0, done.stdout + done.stderr


@needs("cmake", "cc")
def test_builds_without_cuda(build, tmp_path):
    """Catches a build that asks for CUDA although it is turned off: no CUDA file may be compiled or installed."""
    assert "CUDA compiler" not in (build / "configured.txt").read_text()
    installed = run("cmake", "--install", build / "library", "--prefix", tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    names = {path.name for path in tmp_path.rglob("*")}
    assert "libksort.so" in names
    assert not [name for name in names if "cuda" in name]


@needs("bash", "cmake", "make", "cc", "pkg-config")
def test_an_outside_program_builds_against_an_installed_prefix(build):
    """Catches a header, a version or a flag that pkg-config or find_package gives wrongly, and a prefix that cannot be
    moved, or that holds the private libksort_run."""
    done = run(TESTS / "run_install.sh", build)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run_install.sh: passed" in done.stdout


def test_readme_shows_the_example_that_is_run():
    """Catches an example in native/README.md that no longer compiles: it must be the file that the scripts run."""
    example = (NATIVE / "examples" / "attend.c").read_text()
    assert f"```c\n{example}```" in (NATIVE / "README.md").read_text()
