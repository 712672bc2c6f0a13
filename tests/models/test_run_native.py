"""The runner against transformers, on random tiny models that transformers made."""

import functools

import numpy as np
import pytest
import torch
import transformers

from ksort_gguf.engine.load import load_model
from ksort_gguf.engine.sampling import Sampler
from ksort_gguf.engine.session import Generator
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.plan.convert import convert
from ksort_gguf.plan.file import folded_plan, write_plan
from ksort_gguf.plan.make import make_plan

SHAPE = dict(
    vocab_size=97,
    hidden_size=96,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.15,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama-tied-head-dim-20": lambda: transformers.LlamaConfig(**SHAPE, head_dim=20, tie_word_embeddings=True),
    "llama3-scaling": lambda: transformers.LlamaConfig(**SHAPE, head_dim=32, rope_parameters=LLAMA3_SCALING),
    "llama-biases": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True),
    "mistral-window": lambda: transformers.MistralConfig(**{**SHAPE, "sliding_window": 24}),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
}
EXACT = dict(k_type="f32", v_type="f32")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    """(directory, model) of a random model with biases that are not zero, saved by transformers."""
    torch.manual_seed(7)
    config = MODELS[request.param]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 2)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return directory, model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 97, (150,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def expected(checkpoint, tokens):
    with torch.inference_mode():
        return checkpoint[1](torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    """A function of a plan's name: the checkpoint converted with it, once."""
    folder = tmp_path_factory.mktemp("converted")

    @functools.cache
    def convert_once(plan: str):
        return convert(checkpoint[0], folder / f"{plan}.gguf", outtype="f32", plan=plan, block_size=16).path

    return convert_once


def run(path, tokens, n_ctx=256, **options):
    loaded = load_model(path, options.pop("plan_file", None), n_threads=2)
    context = loaded.backend.start(loaded.cache_options(**options), n_ctx)
    return context.forward(tokens, n_logits=len(tokens))


@pytest.mark.parametrize("plan", ["none", "ksort", "balanced"])
def test_logits_equal_transformers(converted, tokens, expected, plan):
    """Would catch a wrong row order, RoPE table, head grouping, bias fold, window or norm, stock and folded."""
    out = converted(plan)
    torch.testing.assert_close(run(out, tokens, **EXACT), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_effective_norm_and_plan_file_equal_transformers(converted, tokens, expected, tmp_path):
    """Would catch a fold on load that differs from the converter's."""
    stock, plan_file = converted("none"), tmp_path / "plan.gguf"
    source = open_gguf(stock)
    write_plan(plan_file, make_plan(source, "ksort", rank="effective-norm")[0])
    source.close()
    logits = run(stock, tokens, plan_file=plan_file, **EXACT)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


def one_by_one(path, tokens, **options):
    loaded = load_model(path, n_threads=1)
    context = loaded.backend.start(loaded.cache_options(**options), 256)
    return torch.cat([context.forward([token]) for token in tokens])


def test_one_token_at_a_time_equals_all_at_once(converted, tokens):
    """Would catch a decode path whose positions, mask or packing differ from the prompt's."""
    out = converted("balanced")
    single, at_once = one_by_one(out, tokens, **EXACT), run(out, tokens, **EXACT)
    torch.testing.assert_close(single, at_once, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("n_logits", [1, 70, 150])
def test_logits_do_not_depend_on_the_ubatch(converted, tokens, monkeypatch, n_logits):
    """Would catch logits of the wrong rows where the asked-for tokens lie in several ubatches."""
    out = converted("balanced")
    whole = run(out, tokens, **EXACT)[-n_logits:]
    monkeypatch.setattr("ksort_gguf.models.run_native.N_UBATCH", 64)
    loaded = load_model(out, n_threads=2)
    cut = loaded.backend.start(loaded.cache_options(**EXACT), 256).forward(tokens, n_logits)
    torch.testing.assert_close(cut, whole, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("types", [{"k_type": "bfp12"}, {"k_type": "f32", "v_type": "bfp12"}])
def test_packed_tokens_one_by_one_equal_many(converted, tokens, types):
    """Would catch packing that depends on how many tokens come together; float noise may still flip some roundings."""
    out = converted("balanced")
    single, at_once = one_by_one(out, tokens, **types), run(out, tokens, **types)
    assert (single - at_once).abs().mean() < 0.01 * at_once.std()


@pytest.mark.parametrize("plan", ["none", "ksort", "balanced", "ksort,balanced"])
@pytest.mark.parametrize("types", [{"k_type": "bfp16"}, {"k_type": "f32", "v_type": "bfp16"}])
def test_packed_caches_are_close_to_float_ones(converted, tokens, plan, types):
    """Would catch queries or outputs that do not undo what was done to keys or values, and values that are turned as
    keys are: either costs everything, 8 bits about a fiftieth."""
    out = converted(plan)
    exact, packed = run(out, tokens, **EXACT), run(out, tokens, **{"v_type": "f32", **types})
    assert 0 < (packed - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("types", [{"k_type": "bfp12", "v_type": "f32"}, {"k_type": "f32", "v_type": "bfp12"}])
def test_balanced_caches_are_closer(converted, tokens, types):
    """Would catch transforms that are consistent and useless: they run, and lose what the plan is for."""
    errors = []
    for plan in ("none", "balanced"):
        out, alone = converted(plan), {**types, "exact_tail": 0, "exact_sinks": 0}
        errors.append((run(out, tokens, **alone) - run(out, tokens, **EXACT)).square().mean())
    assert errors[1] < errors[0]


def test_layers_get_their_own_tables(converted, monkeypatch):
    """Would catch tables of another layer, keys' tables given to values, and float caches that are transformed."""
    out = converted("balanced")
    given = []
    monkeypatch.setattr("ksort_gguf.cache.cpu.LayerStep", lambda *_, **options: given.append(options))
    loaded = load_model(out, n_threads=1)
    with open_gguf(out) as source:
        plan = folded_plan(source)
    for k_type, v_type in (("bfp12", "bfp14"), ("bfp16", "f16"), ("f32", "bfp12")):
        given.clear()
        loaded.backend.start(loaded.cache_options(k_type, v_type), 64)
        assert len(given) == SHAPE["num_hidden_layers"]
        for layer, options in enumerate(given):
            for part, name, tables in (("k_transform", k_type, plan.keys), ("v_transform", v_type, plan.values)):
                if not name.startswith("bfp"):
                    assert options[part] is None
                    continue
                assert (options[part].shift is None) == (part == "v_transform")
                assert np.array_equal(options[part].scale, tables.tables["scale"][layer])
                assert np.array_equal(options[part].feedback, tables.tables["feedback"][layer])


def test_plan_file_runs_as_the_folded_file(converted, tokens, tmp_path):
    """Would catch tables that a plan file loses on the way to the cache."""
    folded, stock, plan_file = converted("ksort,balanced"), converted("none"), tmp_path / "plan.gguf"
    with open_gguf(stock) as source:
        write_plan(plan_file, make_plan(source, "ksort,balanced", block_size=16)[0])
    types = dict(k_type="bfp12", v_type="bfp12")
    assert torch.equal(run(stock, tokens, plan_file=plan_file, **types), run(folded, tokens, **types))


def test_greedy_text_equals_transformers(converted, checkpoint, tokens):
    """Would catch a generation loop that feeds a token twice, skips one, or stops at the wrong place."""
    out = converted("balanced")
    with torch.inference_mode():
        theirs = checkpoint[1].generate(
            torch.tensor([tokens[:20]]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    loaded = load_model(out, n_threads=2)
    generator = Generator(loaded.backend.start(loaded.cache_options(**EXACT), 256), Sampler(temp=0))
    generator.set_prompt(tokens[:20])
    assert list(generator.generate(40)) == theirs[0, 20:].tolist()
