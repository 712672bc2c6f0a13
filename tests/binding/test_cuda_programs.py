"""Builds libksort_cuda and its C++ test (tests/native/cuda_test.cu), and runs that where there is a GPU.

What needs no GPU: configuring without a CUDA compiler, and the header in C.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
C_TESTS = Path(__file__).parents[1] / "native"
MISSING = [tool for tool in ("cmake", "cc") if shutil.which(tool) is None]
SANITIZED_PROBLEMS = "5"  # every head dimension; compute-sanitizer takes about a hundred times as long

needs_cmake = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


def configure(source: Path, build: Path, *options: str, **run_options) -> subprocess.CompletedProcess:
    return run("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options, **run_options)


@pytest.fixture(scope="module")
def cuda_test(tmp_path_factory) -> Path:
    """The program cuda_test, freshly built, which takes minutes; skips where it could not run."""
    missing = [tool for tool in ("cmake", "cc", "nvcc", "nvidia-smi") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if "GPU" not in run("nvidia-smi", "-L").stdout:
        pytest.skip("needs a GPU: nvidia-smi lists none")
    build = tmp_path_factory.mktemp("cuda")
    configured = configure(C_TESTS, build, "-DKSORT_CUDA=ON")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = run("cmake", "--build", build, "--parallel", "2", "--target", "cuda_test")
    assert built.returncode == 0, built.stdout + built.stderr
    return build / "cuda_test"


def test_cuda_calls_agree_with_the_cpu(cuda_test):
    """Catches wrong bytes, sums, page arithmetic or masks of a kernel, and arguments that go unchecked."""
    done = run(cuda_test, "20240331", "120")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "captured steps" in done.stdout


@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_cuda_kernels_are_clean(cuda_test, tool):
    """Catches reads past an array or of a stale page, and shared memory that two threads use without a barrier."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer")
    done = run("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", cuda_test, "20240331", SANITIZED_PROBLEMS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "captured steps" in done.stdout


@needs_cmake
def test_a_machine_without_nvcc(tmp_path):
    """Catches a project that no longer configures where there is no CUDA compiler, or that leaves it out unasked."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cmake", "cc", "make", "ld", "as", "ar", "ranlib", "uname"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA")}
    environment["PATH"] = str(tools)
    hidden = "-DCMAKE_IGNORE_PREFIX_PATH=/usr/local;/usr/local/cuda;/opt/cuda"
    automatic = configure(NATIVE, tmp_path / "auto", hidden, env=environment)
    assert automatic.returncode == 0, automatic.stdout + automatic.stderr
    assert "libksort_cuda: not built: " in automatic.stdout
    wanted = configure(NATIVE, tmp_path / "on", hidden, "-DKSORT_CUDA=ON", env=environment)
    assert wanted.returncode != 0
    assert "libksort_cuda cannot be built" in wanted.stderr and "nvcc" in wanted.stderr


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_header_is_plain_c(tmp_path, compiler):
    """Catches a C++ or CUDA type in ksort_cuda.h: embedders include it from C, without CUDA's headers."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    source = tmp_path / "header.c"
    source.write_text('#include "ksort_cuda.h"\nint main(void) { return sizeof(ksort_cuda_attend_args) == 0; }\n')
    flags = ("-std=c11", "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only")
    done = run(compiler, *flags, "-I", NATIVE / "include", source)
    assert done.returncode == 0, done.stderr
