"""A Hugging Face checkpoint as the stock GGUF that llama.cpp's converter would make of it."""

import logging
from pathlib import Path

import gguf
import numpy as np

from ksort_gguf.checkpoint.config import HfConfig
from ksort_gguf.checkpoint.safetensors import Checkpoint
from ksort_gguf.checkpoint.vocab import add_vocabulary
from ksort_gguf.container.retype import OUTTYPES, ArrayTensor, ReorderedTensor, RetypedTensor, stored_type
from ksort_gguf.container.tensors import Tensor
from ksort_gguf.container.values import Value, encode
from ksort_gguf.errors import KsortError, UnsupportedModelError
from ksort_gguf.models.families import family_of_hf
from ksort_gguf.models.family import Family
from ksort_gguf.models.keys import ModelKeys
from ksort_gguf.models.known_keys import Effect, config_key_effect
from ksort_gguf.models.rope import HF_ROW_ORDER, row_map
from ksort_gguf.models.source import Source
from ksort_gguf.models.spec import ModelSpec

_LOG = logging.getLogger(__name__)
_COMPUTED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")  # buffers, not weights
_VOCABULARY_KEYS = ("vocab_size", "tie_word_embeddings")  # read below


class HfSource(Source):
    """A Hugging Face directory; closing it closes its shards."""

    def __init__(self, directory: Path, config: HfConfig, checkpoint: Checkpoint, outtype: str, model_name: str | None):
        if outtype == "auto":
            outtype = _auto_outtype(checkpoint)
        family = family_of_hf(config.architecture, str(config.path))
        writer = gguf.GGUFWriter(None, family.name)  # it never writes: names and types of values are llama.cpp's
        writer.add_type("model")
        made = family.add_config(config, writer)
        for key in _VOCABULARY_KEYS:
            config.ignore(key)
        config.refuse_unread(lambda key, value: config_key_effect(key, value) is Effect.COMPUTES)
        unread = config.unread().items()
        if unknown := [key for key, value in unread if config_key_effect(key, value) is Effect.UNKNOWN]:
            _LOG.warning("%s: unknown keys are ignored: %s", config.path, ", ".join(unknown))
        tensors = _renamed(family, config, checkpoint, made, str(directory))
        spec = family.spec(_keys(writer, family, directory), {name: t.shape for name, t in tensors.items()})
        _check_projections(spec, tensors, config)
        head_maps = _head_maps(spec)
        tensors = {name: _stored(tensor, head_maps.get(name), outtype) for name, tensor in tensors.items()}
        values = _values(writer, family, directory, config, tensors, outtype, model_name)
        self._checkpoint = checkpoint
        super().__init__(directory, family, values, tensors)
        n_vocab = config.count("vocab_size")
        if self.spec.n_vocab != n_vocab:
            raise KsortError(f"{config.path}: vocab_size is {n_vocab}, but the embedding has {self.spec.n_vocab} rows")
        if not config.is_tied:
            self.tensor("output.weight")

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


def _renamed(
    family: Family, config: HfConfig, checkpoint: Checkpoint, made: dict[str, np.ndarray], file: str
) -> dict[str, Tensor]:
    """Tensors under GGUF names, as the checkpoint has them, and those that config.json makes."""
    name_map = gguf.get_tensor_name_map(family.arch, config.n_layers)
    tensors: dict[str, Tensor] = {name: ArrayTensor(file, name, values) for name, values in made.items()}
    for hf_name, tensor in checkpoint.tensors.items():
        if hf_name.endswith(_COMPUTED) or (hf_name == "lm_head.weight" and config.is_tied):
            continue
        name = name_map.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {hf_name} has no place in a {family.name} model: not supported"
            )
        tensors[name] = _Renamed(tensor, name)
    return tensors


class _Renamed(Tensor):
    """A tensor under its GGUF name. Messages keep the name that the checkpoint has."""

    def __init__(self, base: Tensor, name: str):
        super().__init__(base.file, name, base.shape, base.type)
        self._base, self.original_name = base, base.name

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        return self._base.read_rows(start, stop)

    def non_finite(self) -> KsortError:
        return self._base.non_finite()


def _keys(writer: gguf.GGUFWriter, family: Family, directory: Path) -> ModelKeys:
    values = {key: entry.value for key, entry in writer.kv_data[0].items()}
    return ModelKeys({"general.architecture": family.name, **values}, str(directory / "config.json"))


def _check_projections(spec: ModelSpec, tensors: dict[str, Tensor], config: HfConfig) -> None:
    """Name, as the checkpoint does, a tensor that the spec lacks, or a q or k projection of other heads."""
    used = spec.tensors()
    head_dims = {name: a.head_dim for a in spec.attentions for p in (a.q, a.k) for name in (p.weight, p.bias) if name}
    for name, tensor in tensors.items():
        original = tensor.original_name if isinstance(tensor, _Renamed) else name
        if name not in used:
            raise UnsupportedModelError(
                f"{tensor.file}: tensor {original} has no place in a {spec.architecture} model: not supported"
            )
        if name in head_dims and tensor.shape[0] != used[name][0]:
            raise KsortError(
                f"{tensor.file}: tensor {original} has {tensor.shape[0]} rows, but {config.path.name} says "
                f"{used[name][0] // head_dims[name]} heads of {head_dims[name]}"
            )


def _head_maps(spec: ModelSpec) -> dict[str, np.ndarray]:
    """For q and k tensors whose rows stand in another order in GGUF: which row of a head goes to each place."""
    maps: dict[str, np.ndarray] = {}
    if spec.row_order != HF_ROW_ORDER:
        for a in spec.attentions:
            n_rot = a.head_dim if a.rope is None else a.rope.n_rot
            head_map = row_map(a.head_dim, n_rot, HF_ROW_ORDER, spec.row_order)
            maps |= {name: head_map for p in (a.q, a.k) for name in (p.weight, p.bias) if name is not None}
    return maps


def _stored(tensor: Tensor, head_map: np.ndarray | None, outtype: str) -> Tensor:
    """A tensor with its rows in the order, and its values in the type, that the GGUF file has."""
    if head_map is not None:
        tensor = ReorderedTensor(tensor, head_map)
    wanted = stored_type(tensor.name, tensor.shape, outtype)
    return tensor if tensor.type == wanted else RetypedTensor(tensor, wanted)


def _values(
    writer: gguf.GGUFWriter, family: Family, directory: Path, config: HfConfig, tensors: dict[str, Tensor],
    outtype: str, model_name: str | None,
) -> dict[str, Value]:  # fmt: skip
    """All metadata: what the family added, what is known of the model, and its vocabulary."""
    for tensor in tensors.values():
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    general = gguf.GGUFWriter(None, family.name)
    general.tensors = writer.tensors
    general.add_type("model")
    _add_general(general, directory, model_name)
    writer.add_file_type(OUTTYPES[outtype][1])
    add_vocabulary(writer, directory, config.count("vocab_size"), is_llama=family.name == "llama")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    entries = {**general.kv_data[0], **writer.kv_data[0]}
    return {key: _encode(entry) for key, entry in entries.items()}


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
