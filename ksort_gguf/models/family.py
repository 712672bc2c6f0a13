"""What a file of families/ declares: an architecture's spec from metadata, and how a checkpoint becomes its GGUF."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.models.keys import ModelKeys
from ksort_gguf.models.spec import ModelSpec

Shapes = Mapping[str, tuple[int, ...]]  # shape, rows first, of every tensor of a file by its GGUF name


@dataclass(frozen=True)
class Family:
    """One architecture. Both functions raise KsortError naming the file and the key that is wrong or not supported."""

    name: str  # general.architecture of a stock file
    hf_architectures: tuple[str, ...]  # entries of "architectures" in config.json
    # The spec of a file: reads all keys that count; optional tensors are those that the file has.
    spec: Callable[[ModelKeys, Shapes], ModelSpec]
    # Adds the hyperparameters of config.json to a writer, as llama.cpp's converter does, and returns tensors that a
    # GGUF file has and a checkpoint has not, float32 by name.
    add_config: Callable[[HfConfig, gguf.GGUFWriter], dict[str, np.ndarray]]

    @property
    def arch(self) -> gguf.MODEL_ARCH:
        """The gguf package's name of it."""
        return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
