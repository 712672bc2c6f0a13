"""Finding, loading and checking the library: one clear line for whatever can be wrong with an installation."""

import os
import subprocess
import sys

import _cffi_backend
import numpy as np
import pytest
from native_support import new_cache, rope_for

from ksort_gguf.binding import cpu, files, levels, status
from ksort_gguf.binding.ffi import Binding, _declared, loaded
from ksort_gguf.errors import DeviceError, KsortError

LIBRARIES = {  # and the variables that name another build of them
    "ksort": files.LIBRARY_VARIABLE,
    "ksort_run": files.RUN_LIBRARY_VARIABLE,
    "ksort_cuda": files.CUDA_LIBRARY_VARIABLE,
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_missing_override(monkeypatch, tmp_path, name):
    """Catches a variable that names no file, or names another library's, and is silently ignored."""
    monkeypatch.setenv(LIBRARIES[name], str(tmp_path / "none.so"))
    with pytest.raises(KsortError, match=rf"{LIBRARIES[name]}=.*none\.so"):
        Binding(name)


@pytest.mark.parametrize("name", ["ksort", "ksort_run"])
def test_missing_library_says_how_to_install(monkeypatch, tmp_path, name):
    """Catches a bare OSError from an installation without the compiled library."""
    monkeypatch.delenv(LIBRARIES[name], raising=False)
    monkeypatch.setattr(files, "package_folders", lambda: [tmp_path])
    with pytest.raises(KsortError, match=rf"lib{name}.*pip install"):
        Binding(name)


def test_missing_cuda_library_says_what_the_build_did(monkeypatch, tmp_path):
    """Catches advice to install what is installed: the build left CUDA out, and wrote down why."""
    monkeypatch.delenv(files.CUDA_LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(files, "package_folders", lambda: [tmp_path])
    with pytest.raises(DeviceError, match="libksort_cuda: not built"):
        files.library_path("ksort_cuda")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "ksort_build.txt").write_text("libksort_cuda was left out: no GPU here\n")
    with pytest.raises(DeviceError, match=r"left out: no GPU here$"):
        files.library_path("ksort_cuda")


@pytest.mark.parametrize("name", LIBRARIES)
def test_not_a_library(monkeypatch, tmp_path, name):
    """Catches a traceback for a library of another machine, or a damaged one."""
    (tmp_path / "lib.so").write_bytes(b"not an ELF file")
    monkeypatch.setenv(LIBRARIES[name], str(tmp_path / "lib.so"))
    with pytest.raises(KsortError, match="cannot be loaded"):
        Binding(name)


@pytest.mark.parametrize("name", LIBRARIES)
def test_another_library(monkeypatch, name):
    """Catches an AttributeError for a variable that names a library, but not the right one."""
    monkeypatch.setenv(LIBRARIES[name], _cffi_backend.__file__)
    with pytest.raises(KsortError, match="cannot be loaded"):
        Binding(name)


@pytest.mark.parametrize("name", ["ksort", "ksort_run"])
def test_other_abi_version(monkeypatch, name):
    """Catches an old library beside a newer header: structs would be misread."""
    built = getattr(loaded(name).lib, f"{name}_abi_version")()
    header = files.header_text().replace(
        f"#define {name.upper()}_ABI_VERSION {built}\n", f"#define {name.upper()}_ABI_VERSION {built + 1}\n"
    )
    monkeypatch.setattr(files, "header_text", lambda: header)
    _declared.cache_clear()
    try:
        with pytest.raises(KsortError, match=f"ABI version {built}, but this package needs {built + 1}"):
            Binding(name)
    finally:
        _declared.cache_clear()


def test_missing_headers(monkeypatch, tmp_path):
    """Catches a library beside no header, which would end in an AttributeError of cffi."""
    monkeypatch.setattr(files, "package_folders", lambda: [tmp_path])
    monkeypatch.setattr(files, "_SOURCE_HEADERS", ())
    with pytest.raises(KsortError, match=r"ksort\.h: the native header is missing"):
        files.header_text()


def in_a_new_process(code: str, level: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, status.KERNELS_VARIABLE: level}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_unknown_kernel_level_in_the_environment():
    """Catches a silent fall back to another level than the one that was asked for."""
    code = "from ksort_gguf.binding import cpu, levels; print(cpu.tile_bytes('bfp12', 64, 32)); levels.kernels()"
    run = in_a_new_process(code, "sse9")
    assert run.returncode == 1
    assert run.stdout.strip() == str(cpu.tile_bytes("bfp12", 64, 32))
    assert "KSORT_KERNELS=sse9" in run.stderr


def test_kernel_level_from_the_environment():
    """Catches KSORT_KERNELS not being read, by either library: CI would test one level several times."""
    code = "from ksort_gguf.binding import levels, run; run.Pool(1); print(levels.kernels())"
    assert in_a_new_process(code, "scalar").stdout.strip() == "scalar"


def test_select_kernels_refuses_unknown():
    """Catches a benchmark that silently measures another level."""
    with pytest.raises(ValueError, match="sse9"):
        levels.select_kernels("sse9")


def test_available_levels_keep_the_level_in_use():
    """Catches a query that changes what it asks about."""
    levels.select_kernels("scalar")
    try:
        available = levels.available_levels()
        assert levels.kernels() == "scalar"
    finally:
        levels.select_kernels(None)
    assert available[0] == "scalar"
    assert levels.kernels() == available[-1]


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 32), (3, 2, 30)])
def test_wrong_shapes_are_refused(shape):
    """Catches arrays read out of bounds: C sees only a pointer."""
    cache, _ = new_cache("bfp12", 32, 16, 2, 64)
    with pytest.raises(ValueError, match="expected"):
        cache.pack(np.zeros(shape, np.float32), 0)


def test_wrong_rope_shapes_are_refused(rng):
    """Catches tables of another head count, or cos rows of fewer tokens, read out of bounds."""
    cache, _ = new_cache("bfp12", 32, 16, 2, 64)
    x = np.zeros((3, 2, 32), np.float32)
    _, other_heads = rope_for(rng, 1, 32, 32, "half", 3)
    with pytest.raises(ValueError, match="RoPE table"):
        cache.pack(x, 0, **other_heads)
    _, fewer_tokens = rope_for(rng, 2, 32, 32, "half", 2)
    with pytest.raises(ValueError, match="cos"):
        cache.pack(x, 0, **fewer_tokens)
