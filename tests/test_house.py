"""The rules of the house that a program can hold (ARCHITECTURE.md)."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ksort_gguf"
ROOMS = (  # from the bottom: a file imports its own row and earlier ones
    ("names", "errors"),
    ("kvplan", "reference", "reference_blocks", "reference_exact"),
    ("container",),
    ("checkpoint",),
    ("binding",),
    ("cache",),
    ("models",),
    ("plan",),
    ("engine",),
    ("eval",),
    ("integrations",),
    ("api", "__init__"),
    ("cli", "__main__"),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
METADATA_KEY = re.compile(r"ksort\.(?!h$)")  # all but the header ksort.h
MAX_LINES = 300
CODE = (".c", ".cpp", ".cu", ".cuh", ".h", ".inc", ".py")
TOP_LEVEL = {
    "CHANGELOG.md", "LICENSE", "README.md", "ksort_gguf", "native", "pyproject.toml", "tests", "tools",
}  # fmt: skip


def module_files() -> dict[str, Path]:
    """Every file of the package by its module's name."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = module_files()


def imported_names(path: Path) -> list[str]:
    """The full names that a file imports, anywhere in it, those under TYPE_CHECKING too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute, so that they can be read"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def package_imports(module: str) -> set[str]:
    """The modules of the package that `module` imports: of `from a.b import c`, a.b.c where that is one, else a.b."""
    found = {name if name in FILES else name.rpartition(".")[0] for name in imported_names(FILES[module])}
    return {name for name in found if name in FILES and name != module}


def room(module: str) -> str:
    """The first name below the package."""
    return [*module.split("."), "__init__"][1]


IMPORTS = {module: package_imports(module) for module in FILES}


def test_no_import_runs_up():
    """Catches a lower room that learns of a higher one, also for a type alone."""
    assert len(FILES) > 50
    unknown = {room(module) for module in FILES} - LEVELS.keys()
    assert not unknown, f"rooms without a place in the house: {unknown}"
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if LEVELS[room(other)] > LEVELS[room(module)]
    ]
    assert not upward, upward


def test_no_circle_of_files():
    """Catches two files of a room that need each other."""
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(IMPORTS[module]):
                walk(other, (*path, module))
            done.add(module)

    for module in FILES:
        walk(module, ())


def test_one_file_knows_cffi():
    """Catches C objects made outside of the binding."""
    users = {module for module, path in FILES.items() if any(n.split(".")[0] == "cffi" for n in imported_names(path))}
    assert users == {"ksort_gguf.binding.ffi"}


def test_one_file_spells_metadata_keys():
    """Catches a key spelled beside names.Keys, which a later version of the format would miss."""
    spelled = {
        module
        for module, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and METADATA_KEY.match(node.value)
    }
    assert spelled == {"ksort_gguf.names"}


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import ksort_gguf", {"torch", "gguf", "numpy", "safetensors", "transformers"}),
        ("import ksort_gguf.cli.main", {"torch", "gguf", "numpy", "safetensors", "transformers"}),
        ("from ksort_gguf import convert; import ksort_gguf.plan.convert", {"torch", "transformers"}),
    ],
)
def test_imports_stay_cheap(statement: str, forbidden: set[str]):
    """Catches seconds of start-up for a program that only asks for --help, and torch where nothing is computed."""
    code = f"{statement}\nimport sys\nprint(*sorted({forbidden!r} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def tracked_files() -> list[Path]:
    """What git knows of, relative to the root; skips the test where this is no checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [Path(path) for path in listed.stdout.split("\0") if path]
    if listed.returncode or Path("pyproject.toml") not in paths:
        pytest.skip("not a git checkout")
    return paths


def test_files_are_short():
    """Catches files that no one reads to the end."""
    lengths = {
        str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for path in tracked_files()
        if path.suffix in CODE and (ROOT / path).is_file()
    }
    assert len(lengths) > 100
    too_long = {path: n for path, n in lengths.items() if n > MAX_LINES}
    assert not too_long, too_long


def test_top_level_is_the_layouts():
    """Catches scratch files and new folders beside the house."""
    entries = {path.parts[0] for path in tracked_files()}
    assert {entry for entry in entries if not entry.startswith(".")} == TOP_LEVEL
