"""A tiny model with a vocabulary and a chat template that every command runs, and files that differ a little."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from checkpoint_support import LLAMA, N_LAYERS, random_weights, write_checkpoint, write_sentencepiece

from ksort_gguf.api import convert
from ksort_gguf.container.gguf_writer import GgufOutput
from ksort_gguf.container.values import Value, encode, string
from ksort_gguf.models.gguf_source import open_gguf

N_VOCAB = 300
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
TEXT = "karaka lotilo miwomi nupenu serase katika lowolo mipemi "  # words that the vocabulary was made for
_KINDS = ((bool, gguf.GGUFValueType.BOOL), (int, gguf.GGUFValueType.INT32), (float, gguf.GGUFValueType.FLOAT32))


def write_tiny_checkpoint(directory: Path) -> Path:
    """A random Llama of 2 layers, 4 query and 2 KV heads of 32 channels, context 128; some keys are large."""
    weights = random_weights(np.random.default_rng(5), n_vocab=N_VOCAB)
    weights = {name: w / 8 if w.ndim == 2 else w for name, w in weights.items()}
    for layer in range(N_LAYERS):
        weights[f"model.layers.{layer}.self_attn.k_proj.weight"][::8] *= 8
    write_checkpoint(directory, {**LLAMA, "vocab_size": N_VOCAB}, weights)
    write_sentencepiece(directory / "tokenizer.model", N_VOCAB)
    return directory


def write_tiny_gguf(path: Path) -> Path:
    """The same as a stock GGUF with a chat template; its checkpoint stays beside it."""
    checkpoint = write_tiny_checkpoint(path.parent / "checkpoint")
    convert(checkpoint, path.with_suffix(".plain"), plan="none", outtype="f32")
    return rewrite(path.with_suffix(".plain"), path, {"tokenizer.chat_template": TEMPLATE})


def rewrite(
    source: Path, target: Path, values: Mapping[str, object] | None = None, tensors: tuple[str, ...] = ()
) -> Path:
    """`source` with more metadata, plain values by whole keys, and more tensors, small and of ones."""
    with open_gguf(source) as model:
        infos = [(t.name, t.shape, t.type) for t in model.tensors.values()]
        infos += [(name, (32,), gguf.GGMLQuantizationType.F32) for name in tensors]
        added = {key: as_gguf(value) for key, value in (values or {}).items()}
        with GgufOutput(target, {**model.values, **added}, infos, force=True) as output:
            for name, tensor in model.tensors.items():
                output.write_tensor(name, tensor.chunks())
            for name in tensors:
                output.write_tensor(name, [np.ones(32, np.float32)])
    return target


def as_gguf(value: object) -> Value:
    """A plain value, or a list of them, in the GGUF type that holds it."""
    if isinstance(value, str):
        return string(value)
    is_list = isinstance(value, list)
    kind = next(kind for python, kind in _KINDS if isinstance(value[0] if is_list else value, python))
    return encode(value, gguf.GGUFValueType.ARRAY, kind) if is_list else encode(value, kind)
