"""Tools import each other as scripts do, from their own folder; and the small random models that they are run on."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_support import LLAMA, random_weights, write_checkpoint, write_sentencepiece

from ksort_gguf.cli.main import main
from ksort_gguf.plan.convert import convert

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

N_VOCAB = 300
WORDS = "karaka lotilo miwomi nupenu serase katika lowolo mipemi "  # that the vocabulary was trained on


@pytest.fixture(autouse=True)
def one_torch_thread():
    """Models set torch's threads for the whole process: on small tensors more than one costs only time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_model():
    """write_model(folder, config, biases=False): a Hugging Face directory, folder/hf, and its folder/stock.gguf.

    Random weights, small enough that attention is soft and perplexity finite, and a vocabulary of N_VOCAB tokens.
    """

    def write(folder: Path, config: dict, biases: bool = False) -> Path:
        weights = random_weights(np.random.default_rng(3), biases=biases, n_vocab=N_VOCAB)
        weights = {name: values / 4 for name, values in weights.items()}
        directory = write_checkpoint(folder / "hf", {**config, "vocab_size": N_VOCAB}, weights)
        write_sentencepiece(directory / "tokenizer.model", N_VOCAB)
        return convert(directory, folder / "stock.gguf", plan="none", outtype="f16").path

    return write


@pytest.fixture(scope="session")
def folder(tmp_path_factory, write_model):
    """A folder with stock.gguf and folded.gguf of a model with a context of 1024, plan files and text.txt.

    Plan files: sorted.gguf and other/sorted.gguf of the order, steps.gguf of all steps, which folded.gguf has too.
    """
    folder = tmp_path_factory.mktemp("model")
    stock = write_model(folder, {**LLAMA, "max_position_embeddings": 1024})
    convert(stock, folder / "folded.gguf", plan="ksort,balanced")
    (folder / "other").mkdir()
    for name, plan in (("sorted", "ksort"), ("other/sorted", "ksort"), ("steps", "ksort,balanced")):
        assert main(["plan", str(stock), "--plan", plan, "--outfile", str(folder / f"{name}.gguf")]) == 0
    (folder / "text.txt").write_text(WORDS * 120)
    return folder
