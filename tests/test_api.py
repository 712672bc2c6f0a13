"""The public Python API on a tiny model: answers, scores, plans, typed errors that name an argument."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_support import TEMPLATE, rewrite, write_tiny_gguf

import ksort_gguf
from ksort_gguf import KVPlan, convert, load, make_plan, read_plan
from ksort_gguf.engine.load import load_model
from ksort_gguf.models.gguf_source import open_gguf
from ksort_gguf.plan.file import folded_plan

PROMPT = "karaka lotilo"
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(tiny):
    return load(tiny, **EXACT, n_threads=2)


def test_importing_and_converting_take_no_torch(tiny, tmp_path):
    """Catches an import at the top of a file that costs every `--help` a second, and a converter that needs a GB."""
    script = f"""if True:
        import sys, ksort_gguf
        assert not {{"torch", "numpy", "cffi", "gguf"}} & sys.modules.keys()
        ksort_gguf.convert({str(tiny)!r}, {str(tmp_path / "o.gguf")!r}, plan="none")
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there():
    """Catches a name of __all__ that points to a module which no longer has it."""
    for name in ksort_gguf.__all__:
        assert getattr(ksort_gguf, name).__doc__, name
    assert set(ksort_gguf.__all__) < set(dir(ksort_gguf))


def test_generate_is_greedy_decoding(llm, tiny):
    """Catches a prompt fed twice, a token lost between calls, and streamed pieces that are not the answer."""
    loaded = load_model(tiny, n_threads=2)
    context = loaded.backend.start(loaded.cache_options("f32", "f32"), 128)
    ids, answer = llm.tokenize(PROMPT), []
    for _ in range(12):
        ids = [int(context.forward(ids)[0].argmax())]
        answer += ids
    said = llm.generate(PROMPT, n_predict=12, temp=0, ignore_eos=True)
    assert said == llm.detokenize(answer)
    assert "".join(llm.stream(PROMPT, n_predict=12, temp=0, ignore_eos=True)) == said
    assert said.startswith(llm.generate(PROMPT, n_predict=5, temp=0, ignore_eos=True))


def test_seeds_decide_what_is_drawn(llm):
    """Catches sampling that ignores its seed, or the temperature."""
    first, again, other = (llm.generate(PROMPT, 16, temp=2.0, seed=seed, ignore_eos=True) for seed in (1, 1, 2))
    assert first == again != other


def test_chat_is_the_template_s_text(llm, tiny, tmp_path):
    """Catches messages that do not reach the template, and a model without one that answers anything."""
    messages = [{"role": "system", "content": "mi"}, {"role": "user", "content": "nu"}]
    assert llm.chat(messages, 8, temp=0) == llm.generate("system: mi\nuser: nu\n", 8, temp=0)
    assert "message.role" in TEMPLATE
    with pytest.raises(ksort_gguf.KsortError, match="chat_template"):
        load(tiny.with_suffix(".plain")).chat(messages)
    with pytest.raises(ksort_gguf.KsortError, match="role") as caught:
        llm.chat([{"role": "user"}])
    assert caught.value.field == "messages"


def test_scores_are_the_model_s(llm, tiny):
    """Catches log-probabilities of the wrong token or position, above all where the text is scored in parts."""
    text = "karaka lotilo miwomi nupenu serase katika lowolo mipemi 1234567890 abcdefgh " * 2
    ids = llm.tokenize(text)
    assert 64 < len(ids) <= 128  # several parts, the last one short
    loaded = load_model(tiny, n_threads=2)
    logits = loaded.backend.start(loaded.cache_options("f32", "f32"), 128).forward(ids, len(ids))
    targets = torch.tensor(ids[1:])
    expected = logits.log_softmax(1)[torch.arange(len(targets)), targets]
    scores = llm.score(text)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-4)
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(tiny.parent / "checkpoint", dtype=torch.float32)
    with torch.inference_mode():
        reference = theirs(torch.tensor([ids])).logits[0].log_softmax(1)[torch.arange(len(targets)), targets]
    np.testing.assert_allclose(scores, reference.numpy(), rtol=1e-4, atol=1e-4)


def test_tokenize_and_detokenize(llm):
    """Catches BOS that is left out, or added against the caller's wish, and ids that are numpy's."""
    ids = llm.tokenize(PROMPT)
    assert llm.tokenize(PROMPT, add_special=False) == ids[1:] and ids[0] == 1
    assert all(type(token) is int for token in ids)
    assert llm.detokenize(ids).strip() == PROMPT


def test_plans_by_name_file_and_object_are_one(tiny, tmp_path):
    """Catches a door that loses the plan: packed caches then give other scores."""
    made = make_plan(tiny, tmp_path / "plan.gguf", plan="ksort,balanced")
    assert isinstance(made, KVPlan) and read_plan(tmp_path / "plan.gguf").steps == made.steps
    folded = convert(tiny, tmp_path / "folded.gguf", plan="ksort,balanced")
    types = {"cache_type_k": "bfp12", "cache_type_v": "bfp12", "n_threads": 1}
    models = [load(tiny, plan=plan, **types) for plan in (made, tmp_path / "plan.gguf", "ksort,balanced")]
    models.append(load(folded.path, **types))
    scores = [model.score(PROMPT) for model in models]
    assert all(np.array_equal(score, scores[0]) for score in scores)
    plain = load(tiny, **types).score(PROMPT)
    assert not np.array_equal(plain, scores[0])
    assert models[0].cache_type_k == "bfp12" and models[0].path == tiny


def test_calibration_reaches_the_plan(tiny, tmp_path):
    """Catches `calibrate` that is taken and ignored."""
    (tmp_path / "text").write_text("karaka lotilo miwomi " * 30)
    plan = make_plan(tiny, plan="rotate,scale", calibrate=tmp_path / "text", calibrate_tokens=64)
    assert plan.statistics == "text of 64 tokens in windows of 64"
    convert(tiny, tmp_path / "o.gguf", plan="rotate,scale", calibrate=tmp_path / "text", calibrate_tokens=64)
    with open_gguf(tmp_path / "o.gguf") as source:
        assert folded_plan(source).statistics == plan.statistics


LOAD_ERRORS = [
    ({"cache_type_k": "bfp13"}, "CacheTypeError", "cache_type_k"),
    ({"cache_type_v": "q4_0"}, "CacheTypeError", "cache_type_v"),
    ({"query_type": "f16"}, "CacheTypeError", "query_type"),
    ({"cache_type_k": "bfp12", "block_size": 7}, "CacheTypeError", "block_size"),
    ({"cache_type_k": "bfp12", "block_size": 64}, "CacheTypeError", "block_size"),
    ({"device": "tpu"}, "DeviceError", "device"),
    ({"n_ctx": -1}, "ContextError", "n_ctx"),
    ({"n_threads": -1}, "KsortError", "n_threads"),
    ({"plan": "spin"}, "KsortError", None),
]
CALL_ERRORS = [
    ({"temp": float("nan")}, "KsortError", "temp"),
    ({"top_p": 2.0}, "KsortError", "top_p"),
    ({"min_p": -1.0}, "KsortError", "min_p"),
    ({"repeat_penalty": 0.0}, "KsortError", "repeat_penalty"),
    ({"seed": -2}, "KsortError", "seed"),
    ({"n_predict": -2}, "KsortError", "n_predict"),
    ({"prompt": "karaka " * 200}, "ContextError", "n_ctx"),
]


def assert_error(kind: str, field: str | None, call, *args, **keys) -> None:
    with pytest.raises(ksort_gguf.KsortError) as caught:
        call(*args, **keys)
    assert type(caught.value).__name__ == kind and caught.value.field == field
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)


@pytest.mark.parametrize(("keys", "kind", "field"), LOAD_ERRORS)
def test_load_blames_the_argument(tiny, keys, kind, field):
    """Catches errors that a program cannot tell apart, or that speak of flags to someone without a command line."""
    assert_error(kind, field, load, tiny, **keys)


@pytest.mark.parametrize(("keys", "kind", "field"), CALL_ERRORS)
def test_calls_blame_the_argument_before_they_begin(llm, keys, kind, field):
    """Catches a stream whose errors come only with its first piece."""
    keys = {"prompt": PROMPT, **keys}
    for call in (llm.generate, llm.stream):
        assert_error(kind, field, call, **keys)


def test_plans_and_conversions_blame_the_argument(tiny, tmp_path):
    """Catches wrong plans, ranks and files that are one kind of error without a name."""
    (tmp_path / "there").write_text("")
    out = tmp_path / "o.gguf"
    assert_error("PlanError", "plan", make_plan, tiny, plan="spin")
    assert_error("PlanError", "plan", make_plan, tiny, plan="none")
    assert_error("PlanError", "rank", make_plan, tiny, plan="ksort", rank="size")
    assert_error("PlanError", "calibrate_tokens", make_plan, tiny, calibrate=True, calibrate_tokens=0)
    assert_error("PlanError", None, read_plan, tiny)
    assert_error("PlanError", "rank", convert, tiny, out, plan="none", rank="key-rms")
    assert_error("CacheTypeError", "cache_type_k", convert, tiny, out, cache_type_k="bfp13")
    assert_error("CacheTypeError", "block_size", convert, tiny, out, block_size=64)
    assert_error("KsortError", "outfile", convert, tiny, tmp_path / "there")
    assert_error("KsortError", "outtype", convert, tiny, out, outtype="q2_k")
    odd = rewrite(tiny, tmp_path / "odd.gguf", {"llama.logit_scale": 2.0})
    assert_error("UnsupportedModelError", None, load, odd)
    assert not out.exists()


def test_a_text_of_one_token_has_no_score(llm):
    """Catches an empty array where a mean is asked for."""
    with pytest.raises(ksort_gguf.KsortError, match="fewer than two tokens"):
        llm.score("")
    assert_error("ContextError", "n_ctx", llm.score, "karaka " * 200)
