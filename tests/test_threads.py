"""One model, or one context, in several threads: right answers or one clear error, in processes whose crash is seen."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_support import write_tiny_gguf

ROUNDS = 100
PRELUDE = """
import sys, threading
import numpy as np
from ksort_gguf import BusyError, PackedCache, load
from ksort_gguf.engine.load import load_model

path, rounds, wrong = sys.argv[1], int(sys.argv[2]), []

def in_threads(work, n_threads=4):
    barrier = threading.Barrier(n_threads)
    def run(i):
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            wrong.append(repr(error))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(n_threads)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong, wrong[:3]
"""
ONE_MODEL = """
llm = load(path, cache_type_k="bfp12", cache_type_v="bfp12", n_threads=2)
prompts = ["karaka lotilo", "miwomi", "nupenu serase katika", "lowolo mipemi karaka lotilo miwomi"]
answers = [llm.generate(prompt, 6, temp=0) for prompt in prompts]
scores = [llm.score(prompt) for prompt in prompts]

def work(i):
    for n in range(rounds):
        j = (i + n) % len(prompts)
        assert llm.generate(prompts[j], 6, temp=0) == answers[j], "another answer"
        assert np.array_equal(llm.score(prompts[j]), scores[j]), "another score"

in_threads(work)
"""
ONE_CONTEXT = """
loaded = load_model(path, n_threads=2)
options = loaded.cache_options("bfp12", "bfp12")
ids = [5, 70, 80, 90]
expected = loaded.backend.start(options, 64).forward(ids, 4)
context = loaded.backend.start(options, 4096)
refused, right = [0, 0], [0, 0]

def work(i):
    for n in range(rounds):
        try:
            logits = context.forward(ids, 4)
        except BusyError:
            refused[i] += 1
            continue
        right[i] += 1
        assert logits.isfinite().all()

in_threads(work, 2)
assert context.cache.n_tokens == len(ids) * sum(right), "a step that was lost, or counted twice"
assert sum(right) + sum(refused) == 2 * rounds
context.cache.truncate(0)
assert (context.forward(ids, 4) - expected).abs().max() == 0, "the context is damaged"
"""
BUSY = """
loaded = load_model(path, n_threads=2)
context = loaded.backend.start(loaded.cache_options("f32", "f32"), 64)
entered, go_on, run = threading.Event(), threading.Event(), context.attention.run

def slow(*args):
    entered.set()
    go_on.wait()
    run(*args)

context.attention.run = slow
first = threading.Thread(target=context.forward, args=([5, 6],))
first.start()
entered.wait()
try:
    context.forward([7])
    wrong.append("no error")
except BusyError as error:
    assert "another thread" in str(error)
other = loaded.backend.start(loaded.cache_options("f32", "f32"), 64)
waiting = threading.Thread(target=other.forward, args=([8],))
waiting.start()
waiting.join(0.05)
assert waiting.is_alive(), "two steps of one model at once"
go_on.set()
first.join(), waiting.join()
assert not wrong and (context.cache.n_tokens, other.cache.n_tokens) == (2, 1)
"""
ONE_PACKED_CACHE = """
rng = np.random.default_rng(1)
k, v = rng.standard_normal((2, 40, 2, 32), np.float32)
q = rng.standard_normal((40, 4, 32), np.float32)
cache = PackedCache(n_kv_heads=2, head_dim=32, n_ctx=100_000, exact_tail=0)  # a tail would be lost in between
cache.append(k, v)
expected = cache.attend(q)
appended = [0, 0, 0, 0]

def work(i):
    for n in range(rounds):
        try:
            if i % 2:
                cache.append(k, v)
                appended[i] += 1
            else:
                assert np.isfinite(cache.attend(q[:1])).all()
        except BusyError:
            pass

in_threads(work)
assert cache.n_tokens == 40 * (1 + sum(appended))
cache.truncate(40)
assert np.array_equal(cache.attend(q), expected), "stored tokens changed"
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.mark.parametrize("script", ["ONE_MODEL", "ONE_CONTEXT", "BUSY", "ONE_PACKED_CACHE"])
def test_threads_get_right_answers_or_one_error(tiny, script):
    """Catches a pool or rows that two steps use at once (it was a SIGSEGV), steps that are counted twice, and a lock
    that is kept."""
    command = [sys.executable, "-X", "faulthandler", "-c", PRELUDE + globals()[script], str(tiny), str(ROUNDS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
