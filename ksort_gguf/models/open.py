"""Opening whatever holds a model: a Hugging Face directory or a GGUF file."""

from pathlib import Path

from ksort_gguf.container.retype import OUTTYPES, RetypedTensor, stored_type
from ksort_gguf.container.tensors import DENSE_TYPES
from ksort_gguf.container.values import string, uint32
from ksort_gguf.errors import KsortError
from ksort_gguf.models.gguf_source import GgufSource, open_gguf
from ksort_gguf.models.source import Source


def open_model(path: Path, outtype: str = "auto", model_name: str | None = None) -> Source:
    """A model as the GGUF it is, or would be: see open_gguf and open_hf.

    outtype: "auto" keeps a GGUF's types and picks f16 or bf16 for a checkpoint; others also retype a dense GGUF.
    model_name: replaces general.name.
    Raises KsortError naming what is wrong.
    """
    path = Path(path)
    if outtype != "auto" and outtype not in OUTTYPES:
        raise KsortError(f"`outtype` {outtype} is not one of auto, {', '.join(OUTTYPES)}", field="outtype")
    if path.is_dir():
        from ksort_gguf.models.hf_source import open_hf

        return open_hf(path, outtype, model_name)
    source = open_gguf(path)
    try:
        if outtype != "auto":
            _retype(source, outtype)
        if model_name is not None:
            source.set_value("general.name", string(model_name))
    except BaseException:
        source.close()
        raise
    return source


def _retype(source: GgufSource, outtype: str) -> None:
    for name, tensor in source.tensors.items():
        if tensor.type not in DENSE_TYPES:
            raise KsortError(
                f"`outtype` {outtype}: {source.path} is quantized (tensor {name} is {tensor.type.name}) and is never "
                "re-quantized: leave `outtype` at auto, or start from the original weights",
                field="outtype",
            )
        wanted = stored_type(name, tensor.shape, outtype)
        if tensor.type != wanted:
            source.tensors[name] = RetypedTensor(tensor, wanted)
    source.set_value("general.file_type", uint32(OUTTYPES[outtype][1]))
