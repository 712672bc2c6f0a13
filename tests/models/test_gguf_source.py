"""GGUF files as models: what cannot run is refused when it is opened."""

import struct
from pathlib import Path

import gguf
import pytest
from checkpoint_support import LLAMA, random_weights, write_checkpoint

from ksort_gguf.container.gguf_writer import GgufOutput
from ksort_gguf.container.values import encode, string, uint32
from ksort_gguf.errors import KsortError
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.models.open import open_model
from ksort_gguf.plan.convert import convert

_Value = gguf.GGUFValueType


@pytest.fixture
def stock_gguf(tmp_path: Path, rng) -> Path:
    directory = write_checkpoint(tmp_path / "llama", LLAMA, random_weights(rng))
    return convert(directory, tmp_path / "stock.gguf", plan="none", outtype="f32", block_size=16).path


def test_newer_ksort_version_names_both_numbers(stock_gguf: Path):
    """Catches a reader that runs files of a later format as if they were today's."""
    data = stock_gguf.read_bytes()
    key = b"ksort.format_version" + struct.pack("<I", _Value.UINT32)
    stock_gguf.write_bytes(data.replace(key + struct.pack("<I", 1), key + struct.pack("<I", 9)))
    with pytest.raises(KsortError, match=r"format_version is 9, newer than 2"):
        open_gguf(stock_gguf)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.architecture": string("gpt2")}, "'gpt2' is not supported"),
        ({"general.type": string("kplan")}, "plan file, not a model"),
        ({"general.type": string("adapter")}, "'adapter'"),
        ({"split.count": uint32(2)}, "one part of a split model"),
        ({"llama.expert_count": uint32(8)}, "expert_count is 8, which is not supported"),
        ({"llama.rope.scaling.type": string("yarn")}, "'yarn' is not supported"),
        ({"llama.attention.layer_norm_rms_epsilon": string("x")}, "rms_epsilon is 'x'"),
        ({"general.architecture": string("ksort-llama")}, r"missing key ksort-llama\."),
        ({"llama.block_count": uint32(2**32 - 1)}, "at most 1024"),
        ({"llama.rope.freq_base": encode(0.0, _Value.FLOAT32)}, r"rope\.freq_base is 0"),
        ({"llama.attention.sliding_window": encode(float("nan"), _Value.FLOAT32)}, "sliding_window is nan"),
        ({"ksort.format_version": string("1")}, "format_version is '1', expected an integer"),
    ],
)
def test_models_that_cannot_run_are_refused(stock_gguf: Path, tmp_path: Path, values: dict, message: str):
    """Catches files that open without complaint and fail, or answer nonsense, much later."""
    with open_gguf(stock_gguf) as source, GgufOutput(tmp_path / "o.gguf", {**source.values, **values}, []):
        pass
    with pytest.raises(KsortError, match=rf"o\.gguf: .*{message}"):
        open_gguf(tmp_path / "o.gguf")


def test_quantized_gguf_is_never_requantized(stock_gguf: Path, tmp_path: Path):
    """Catches `outtype` expanding or re-rounding quantized weights."""
    convert(stock_gguf, tmp_path / "q.gguf", plan="none", outtype="q8_0")
    with pytest.raises(KsortError, match=r"`outtype` f16: .* never re-quantized"):
        open_model(tmp_path / "q.gguf", "f16")
