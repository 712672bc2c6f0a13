"""Passkey retrieval, on tiny tokenizers and a random model."""

import json

import passkey
import pytest
from passkey import FILLER, N_ANSWER, QUESTION, Trial, draw_trials, is_right, prompt_ids
from text_support import byte_tokenizer

from ksort_gguf.errors import KsortError


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_prompt_fills_its_tokens(depth):
    """Would catch prompts that are too long for the context, or shorter than the length they are reported under."""
    tokenizer = byte_tokenizer(merges=("T h", "Th e", "g r", "gr a", "gra s"))
    ids = prompt_ids(tokenizer, Trial(depth, 54321), 1500)
    assert len(ids) == 1500
    assert tokenizer.decode(ids).endswith("\n" + QUESTION)


def test_depth_is_the_share_of_filler_before_the_key():
    """Would catch keys that always lie at one end, and a question before the key."""
    n_filler = 100 * len(FILLER)
    task, before, info, after, question = Trial(0.25, 54321).text(n_filler).split("\n")
    assert before == FILLER * 25
    assert after == FILLER * 75
    assert info.count("54321") == 2
    assert "54321" not in task + question


def test_too_little_room_is_refused():
    """Would catch an endless search, or a prompt cut off, where not even the question fits."""
    with pytest.raises(KsortError, match=r"-c 100: .* needs at least \d+ tokens"):
        prompt_ids(byte_tokenizer(), Trial(0.5, 54321), 100 - N_ANSWER)


def test_seed_and_context_choose_the_trials():
    """Would catch trials that change from run to run, or that do not depend on the seed or the context."""
    assert draw_trials(1, 1024, 5) == draw_trials(1, 1024, 5)
    assert draw_trials(1, 1024, 5) != draw_trials(2, 1024, 5)
    assert draw_trials(1, 1024, 5) != draw_trials(1, 2048, 5)
    assert {len(str(trial.key)) for trial in draw_trials(0, 1024, 200)} == {5}


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 54321.", True), (" 54321", True), (" 5432", False), (" 543210", False), (" 12 54321", False), (" not", False)],
)
def test_the_first_number_counts(text, right):
    """Would catch an answer taken for right because the key is a part of it, or comes after another number."""
    assert is_right(text, 54321) is right


def test_right_answers_are_counted(folder, monkeypatch, capsys):
    """Would catch accuracies of the wrong cache or context: one cache is made to know the key, the other not."""

    def answer(generator, tokenizer, ids):
        key = tokenizer.decode(ids).split("The pass key is ")[1][:5]
        return key if generator.cache.options.k_type == "f16" else "no"

    monkeypatch.setattr(passkey, "answer", answer)
    model = str(folder / "stock.gguf")
    assert passkey.main(["-m", model, "-c", "700,900", "--trials", "3", "-t", "1", "-ctk", "f16", "bfp12"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    assert table == [
        "| K cache | 700 tokens | 900 tokens |",
        "|---|---:|---:|",
        "| f16 | 100% | 100% |",
        "| bfp12 | 0% | 0% |",
    ]
    counts = [(each["cache_type_k"], each["n_ctx"], each["n_right"]) for each in json.loads(line)["results"]]
    assert counts == [("f16", 700, 3), ("bfp12", 700, 0), ("f16", 900, 3), ("bfp12", 900, 0)]


def test_runs_through_the_model_twice_alike(folder, capsys):
    """Would catch answers that depend on earlier runs, and contexts beyond the model's own that are tried anyway."""
    outputs, model = [], str(folder / "stock.gguf")
    for _ in range(2):
        assert passkey.main(["-m", model, "-c", "700,4096", "--trials", "2", "-s", "3", "-t", "1"]) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out
    answers = [[line for line in output.err.splitlines() if "->" in line] for output in outputs]
    assert len(answers[0]) == 4
    assert answers[0] == answers[1]
    assert "note: context 4096 is left out" in outputs[0].err


@pytest.mark.parametrize("arguments", [["-c", "many"], ["-c", "2048"], ["--trials", "0"], ["-s", "-1"], ["-t", "-1"]])
def test_wrong_arguments_are_one_line(folder, capsys, arguments):
    """Would catch tracebacks, and tables without rows."""
    assert passkey.main(["-m", str(folder / "stock.gguf"), *arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith("error: -")
