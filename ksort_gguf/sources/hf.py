"""A Hugging Face checkpoint as the stock GGUF that llama.cpp's converter would make of it."""

import logging
from pathlib import Path

import gguf
import numpy as np

from ksort_gguf.errors import KsortError
from ksort_gguf.families.rope import row_map
from ksort_gguf.sources.base import Source, Tensor
from ksort_gguf.sources.gguf_values import Value, encode
from ksort_gguf.sources.hf_config import HfConfig
from ksort_gguf.sources.hf_vocab import add_vocabulary
from ksort_gguf.sources.retype import OUTTYPES, ArrayTensor, ReorderedTensor, RetypedTensor, stored_type
from ksort_gguf.sources.safetensors_file import Checkpoint

_LOG = logging.getLogger(__name__)
_COMPUTED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # buffers, not weights
_ROPE_FREQS = "rope_freqs.weight"


class HfSource(Source):
    """A Hugging Face directory; closing it closes its shards."""

    def __init__(self, directory: Path, config: HfConfig, checkpoint: Checkpoint, outtype: str, model_name: str | None):
        if outtype == "auto":
            outtype = _auto_outtype(checkpoint)
        tensors = _stock_tensors(config, checkpoint, outtype, str(directory))
        values = _stock_values(directory, config, tensors, outtype, model_name)
        super().__init__(directory, config.family, values, tensors)
        self._checkpoint = checkpoint
        self.check_complete()
        if not config.is_tied:
            self.tensor("output.weight")
        n_vocab, rows = config.count("vocab_size"), self.tensor("token_embd.weight").shape[0]
        if rows != n_vocab:
            raise KsortError(f"{config.path}: vocab_size is {n_vocab}, but the embedding has {rows} rows")

    def close(self) -> None:
        self._checkpoint.close()


def open_hf(directory: Path, outtype: str = "auto", model_name: str | None = None) -> HfSource:
    """Open a checkpoint in `directory` (config.json, safetensors, tokenizer). Nothing but headers is read.

    outtype: f32, f16, bf16, q8_0, or auto: the 16-bit type of the first weight matrix that has one, else f16.
    model_name: general.name, instead of what the model card and the directory say.
    Raises KsortError naming the file, and the key or tensor, that is wrong or not supported.
    """
    directory = Path(directory)
    config = HfConfig(directory / "config.json")
    checkpoint = Checkpoint(directory)
    try:
        return HfSource(directory, config, checkpoint, outtype, model_name)
    except BaseException:
        checkpoint.close()
        raise


def _auto_outtype(checkpoint: Checkpoint) -> str:
    """llama.cpp's guess. config.json's dtype is not asked, since it is wrong in some models."""
    names = {gguf.GGMLQuantizationType.BF16: "bf16", gguf.GGMLQuantizationType.F16: "f16"}
    found = (names[t.type] for t in checkpoint.tensors.values() if len(t.shape) > 1 and t.type in names)
    return next(found, "f16")


def _stock_tensors(config: HfConfig, checkpoint: Checkpoint, outtype: str, file: str) -> dict[str, Tensor]:
    """Tensors under GGUF names, rows reordered and types converted as they are read."""
    family, n_layers = config.family, config.n_layers
    name_map = gguf.get_tensor_name_map(family.arch, n_layers)
    allowed = {*family.required_tensors(n_layers), *family.optional_tensors(n_layers)}
    reordered = _reordered_names(config)
    tensors: dict[str, Tensor] = {}
    factors = config.rope_factors()
    if factors is not None:
        tensors[_ROPE_FREQS] = ArrayTensor(file, _ROPE_FREQS, factors)
    for hf_name, tensor in checkpoint.tensors.items():
        if hf_name.endswith(_COMPUTED) or (hf_name == "lm_head.weight" and config.is_tied):
            continue
        name = name_map.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name not in allowed:
            raise KsortError(f"{tensor.file}: tensor {hf_name} has no place in a {family.name} model: not supported")
        if name in reordered:
            _check_heads(tensor, hf_name, *reordered[name])
            tensor = ReorderedTensor(tensor, reordered[name][0])
        wanted = stored_type(name, tensor.shape, outtype)
        tensors[name] = _Renamed(tensor if tensor.type == wanted else RetypedTensor(tensor, wanted), name)
    return tensors


class _Renamed(Tensor):
    """A tensor under its GGUF name. Messages keep the name that the checkpoint has."""

    def __init__(self, base: Tensor, name: str):
        super().__init__(base.file, name, base.shape, base.type)
        self._base = base

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._base.read_rows(start, stop)

    def non_finite(self) -> KsortError:
        return self._base.non_finite()


def _reordered_names(config: HfConfig) -> dict[str, tuple[np.ndarray, int]]:
    """For the q and k tensors whose rows stand in another order in GGUF: head map [head_dim] and number of heads."""
    family = config.family
    if family.row_order == family.hf_row_order:
        return {}
    head_map = row_map(config.head_dim, config.n_rot, family.hf_row_order, family.row_order)
    n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
    names = {}
    for layer in range(config.n_layers):
        names |= dict.fromkeys(family.q_tensors(layer), (head_map, n_heads))
        names |= dict.fromkeys(family.k_tensors(layer), (head_map, n_kv_heads))
    return names


def _check_heads(tensor: Tensor, hf_name: str, head_map: np.ndarray, n_heads: int) -> None:
    if tensor.shape[0] != n_heads * len(head_map):
        raise KsortError(
            f"{tensor.file}: tensor {hf_name} has {tensor.shape[0]} rows, but config.json says {n_heads} heads of "
            f"{len(head_map)}"
        )


def _stock_values(
    directory: Path, config: HfConfig, tensors: dict[str, Tensor], outtype: str, model_name: str | None
) -> dict[str, Value]:
    """All metadata, collected by a GGUFWriter that never writes, so that names and types are llama.cpp's."""
    writer = gguf.GGUFWriter(None, config.family.name)
    for tensor in tensors.values():
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    writer.add_type("model")
    _add_general(writer, directory, model_name)
    config.add_hyperparameters(writer)
    writer.add_file_type(OUTTYPES[outtype][1])
    add_vocabulary(writer, directory, config.count("vocab_size"), is_llama=config.family.name == "llama")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return {key: _encode(entry) for key, entry in writer.kv_data[0].items()}


def _encode(entry: gguf.GGUFValue) -> Value:
    element_type = entry.sub_type
    if entry.type == gguf.GGUFValueType.ARRAY and element_type is None:
        element_type = gguf.GGUFValueType.get_type(entry.value[0])
    return encode(entry.value, entry.type, element_type)


def _add_general(writer: gguf.GGUFWriter, directory: Path, model_name: str | None) -> None:
    """general.* keys from the model card, the directory's name and the number of parameters."""
    total, shared, expert, n_experts = writer.get_total_parameter_count()
    resolved = directory.resolve()
    try:
        metadata = gguf.Metadata.load(None, resolved, model_name, total)
    except Exception as error:  # a model card is free text: whatever its YAML does must not stop a conversion
        _LOG.warning("%s: the model card is not understood (%s): ignored", directory, " ".join(str(error).split()))
        metadata = gguf.Metadata(name=model_name)
    metadata.name = metadata.name or resolved.name
    if metadata.size_label is None and total > 0:
        metadata.size_label = gguf.size_label(total, shared, expert, n_experts)
    metadata.set_gguf_meta_model(writer)
