"""--device and -ngl: what they say where there is no GPU, and that nothing else changes there."""

import numpy as np
import pytest
import torch
from checkpoint_support import LLAMA, random_weights, write_checkpoint

from ksort_gguf.binding import cuda, ffi, files
from ksort_gguf.cache import cuda_device
from ksort_gguf.cli.main import main
from ksort_gguf.errors import KsortError
from ksort_gguf.plan.convert import convert

HAS_GPU = cuda_device.missing() is None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model, stock."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint = write_checkpoint(folder / "hf", LLAMA, random_weights(np.random.default_rng(3)))
    return convert(checkpoint, folder / "stock.gguf", plan="none").path


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    """Catches one message for different causes, which sends the user to mend the wrong one."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build of torch" in cuda_device.missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu128")
    assert "2.8" in cuda_device.missing()
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in cuda_device.missing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(files.CUDA_LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(files, "package_folders", lambda: [tmp_path])
    monkeypatch.setattr(cuda, "loaded", ffi.Binding)  # not one that is loaded already
    assert "nvcc" in cuda_device.missing()
    with pytest.raises(KsortError, match=r"^`device` cuda: .*libksort_cuda"):
        cuda_device.require_cuda()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-ngl", "-1"], "-ngl -1"),
        (["-ngl", "0", "--device", "cuda"], "-ngl 0"),
        (["--device", "cuda0"], "--device"),
        pytest.param(["--device", "cuda"], "--device cuda: ", marks=pytest.mark.skipif(HAS_GPU, reason="has a GPU")),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat", "perplexity", "bench"])
def test_flags_end_in_one_line(model, capsys, tmp_path, command, arguments, words):
    """Catches a command without the flag, and a run on the CPU that claims to be one on the GPU."""
    text = {"generate": ["-p", "x"], "perplexity": ["-f", str(tmp_path)]}.get(command, [])
    try:
        status = main([command, "-m", str(model), *text, *arguments])
    except SystemExit as exit:  # argparse
        status = exit.code
    (line,) = capsys.readouterr().err.splitlines()
    assert status and line.startswith("error: ") and words in line


@pytest.mark.skipif(HAS_GPU, reason="has a GPU")
@pytest.mark.parametrize("arguments", [["-ngl", "99"], ["-ngl", "0"], ["--device", "none", "-ngl", "99"], []])
def test_ngl_without_a_gpu_runs_on_the_cpu(model, capsys, arguments):
    """Catches llama.cpp command lines that stop working, or that ignore the flag silently."""
    assert main(["bench", "-m", str(model), "-p", "4", "-n", "0", "-r", "1", "-o", "jsonl", *arguments]) == 0
    captured = capsys.readouterr()
    assert '"test": "pp4"' in captured.out
    notes = [line for line in captured.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == (arguments == ["-ngl", "99"])
    assert all("-ngl 99 is ignored" in note and "torch" in note for note in notes)


def test_help_says_what_cuda_takes(capsys):
    """Catches a flag that one can only learn about by failing."""
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--device {none,cpu,cuda}" in text and "CUDA build of torch" in text and "nvcc" in text
