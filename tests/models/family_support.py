"""Random tiny checkpoints that transformers makes, and what three programs compute of them."""

from pathlib import Path

import numpy as np
import torch
from checkpoint_support import write_sentencepiece

from ksort_gguf.api import convert
from ksort_gguf.cache.protocol import CacheOptions
from ksort_gguf.engine.load import LoadedModel, load_model
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.models.run_torch import Float32, TorchModel
from ksort_gguf.models.weights import load_weights

N_VOCAB = 320
TEXT_IDS = range(259, 310)  # tokens of whole characters: llama.cpp's server keeps back the others
IDS = np.random.default_rng(7).choice(TEXT_IDS, 60).tolist()
EXACT = CacheOptions(k_type="f32", v_type="f32", block_size=16, query_type="f32")
SIZES = {
    "vocab_size": N_VOCAB, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def write_random_checkpoint(directory: Path, config: object) -> torch.nn.Module:
    """A checkpoint of a transformers configuration with random weights and a tokenizer; returns the model.

    Every sixteenth channel of keys is an outlier, as in trained models. Gains and biases are random too.
    """
    import transformers

    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    heads = config.num_attention_heads, config.num_key_value_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.6 / parameter.shape[-1] ** 0.5)
            if name.endswith(("k_proj.weight", "k_norm.weight")):
                parameter[::16] *= 8
            elif name.endswith("qkv_proj.weight"):
                head_dim = len(parameter) // (heads[0] + 2 * heads[1])
                parameter[heads[0] * head_dim : sum(heads) * head_dim : 16] *= 8
        output = model.get_output_embeddings().weight  # only those tokens are ever the likeliest
        output[: TEXT_IDS.start] = output[TEXT_IDS.stop :] = 0
    model.save_pretrained(directory)
    write_sentencepiece(directory / "tokenizer.model", n_vocab=310)
    return model


def transformers_logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """float32 [n_tokens, n_vocab]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def load_converted(checkpoint: Path, outfile: Path, **options: str) -> LoadedModel:
    """The checkpoint as a GGUF with f32 weights, loaded on the CPU."""
    convert(checkpoint, outfile, outtype="f32", **options)
    return load_model(outfile, n_threads=2)


def native_logits(loaded: LoadedModel, ids: list[int], n_ctx: int = 128) -> np.ndarray:
    """float32 [n_tokens, n_vocab] of the CPU runner: a prompt, then tokens one by one."""
    context = loaded.backend.start(EXACT, n_ctx)
    half = len(ids) // 2
    logits = [context.forward(ids[:half], half), *(context.forward([token]) for token in ids[half:])]
    return torch.cat(logits).numpy()


def torch_logits(path: Path, ids: list[int], n_ctx: int = 128) -> np.ndarray:
    """float32 [n_tokens, n_vocab] of torch's interpreter, on the CPU in float32."""
    with open_gguf(path) as source:
        model = TorchModel(
            source.spec,
            load_weights(source),
            None,
            source.rope_factors,
            2,
            "cpu",
            use_graph=False,
            arithmetic=Float32(),
        )
        return model.start(EXACT, n_ctx).forward(ids, len(ids)).numpy()


def assert_computes_as_transformers(tmp_path: Path, config: object, n_ctx: int = 128) -> LoadedModel:
    """Both interpreters' logits against transformers', to 1e-4 of their spread.

    Returns the converted model, whose file is tmp_path / "stock.gguf"; the checkpoint is tmp_path / "checkpoint".
    """
    model = write_random_checkpoint(tmp_path / "checkpoint", config)
    expected = transformers_logits(model, IDS)
    loaded = load_converted(tmp_path / "checkpoint", tmp_path / "stock.gguf", plan="none")
    spread = float(expected.std())
    np.testing.assert_allclose(native_logits(loaded, IDS, n_ctx), expected, rtol=0, atol=1e-4 * spread)
    np.testing.assert_allclose(torch_logits(tmp_path / "stock.gguf", IDS, n_ctx), expected, rtol=0, atol=1e-4 * spread)
    return loaded


def assert_plan_helps(tmp_path: Path, calibrate: bool) -> list[str]:
    """A balanced plan of the checkpoint lowers BFP12's error, and the folded file runs; returns the plan's steps."""
    convert(
        tmp_path / "checkpoint",
        tmp_path / "folded.gguf",
        outtype="f32",
        calibrate=calibrate or None,
        calibrate_tokens=512,
        force=True,
    )
    plain, folded = load_model(tmp_path / "stock.gguf", n_threads=2), load_model(tmp_path / "folded.gguf", n_threads=2)
    exact = native_logits(plain, IDS)
    errors = []
    for loaded in (plain, folded):
        context = loaded.backend.start(loaded.cache_options("bfp12", "f32", exact_tail=0, exact_sinks=0), 128)
        errors.append(float(np.square(context.forward(IDS, len(IDS)).numpy() - exact).mean()))
    assert errors[1] < errors[0], errors
    return [] if folded.metadata.get("ksort.plan.steps") is None else list(folded.metadata["ksort.plan.steps"])
