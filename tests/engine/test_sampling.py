"""The sampler's chain: what each step keeps, in which order, and what it refuses."""

import numpy as np
import pytest

from ksort_gguf.engine.sampling import Sampler
from ksort_gguf.errors import KsortError

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temp": 1.0, "seed": 1}


def logits_of(*shares: float) -> np.ndarray:
    """Logits whose softmax is `shares`."""
    return np.log(np.array(shares, dtype=np.float32))


def drawn(sampler: Sampler, logits: np.ndarray, n: int = 300) -> set[int]:
    """All that comes up in n draws."""
    return {sampler.sample(logits) for _ in range(n)}


def test_greedy():
    """Temperature 0 that divides by zero or draws; ties that depend on the sort."""
    assert Sampler(temp=0).sample(np.array([1, 3, 3, 2], dtype=np.float32)) == 1
    assert Sampler(temp=-1, top_k=1).sample(np.array([-5, -4], dtype=np.float32)) == 1


def test_draws_follow_the_probabilities():
    """Draws from the sorted place instead of the token, or from probabilities that are not normalized."""
    sampler = Sampler(**OFF)
    counts = np.bincount([sampler.sample(logits_of(0.1, 0.6, 0.3)) for _ in range(6000)], minlength=3)
    np.testing.assert_allclose(counts / 6000, [0.1, 0.6, 0.3], atol=0.03)


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.0}, {1}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1}),
    ],
)
def test_what_each_step_keeps(keys, kept):
    """Off-by-one in a filter: one token too many or too few."""
    assert drawn(Sampler(**OFF | keys), logits_of(0.15, 0.45, 0.1, 0.3)) == kept


def test_top_k_keeps_the_first_of_equal_logits():
    """Equal logits at the limit: which of them stays must not depend on the partition."""
    assert drawn(Sampler(**OFF | {"top_k": 2}), np.array([1, 2, 1, 1], dtype=np.float32)) == {0, 1}


def test_top_p_counts_what_top_k_left():
    """Filters that each look at the whole vocabulary: llama.cpp's act one on the other's remains."""
    sampler = Sampler(**OFF | {"top_k": 2, "top_p": 0.55})
    assert drawn(sampler, logits_of(0.3, 0.25, 0.23, 0.22)) == {0, 1}
    assert drawn(Sampler(**OFF | {"top_k": 2, "top_p": 0.54}), logits_of(0.3, 0.25, 0.23, 0.22)) == {0}


def test_temperature_comes_after_the_filters():
    """A high temperature that lets the tail in: top-p and min-p look at the model's own probabilities."""
    shares = logits_of(0.7, 0.25, 0.03, 0.02)
    assert drawn(Sampler(**OFF | {"temp": 50.0, "top_p": 0.9}), shares) == {0, 1}
    assert drawn(Sampler(**OFF | {"temp": 50.0, "min_p": 0.1}), shares) == {0, 1}


def test_repeat_penalty():
    """Negative logits divided (which makes repeats likelier), or a token penalized once for each time it came."""
    logits = np.array([2.0, 1.5, -1.0, -1.1], dtype=np.float32)
    sampler = Sampler(temp=0, repeat_penalty=1.5)
    assert sampler.sample(logits, [0]) == 1
    assert sampler.sample(logits, [0, 0, 1, 1]) == 0  # 1.33 and 1.0: each once
    assert sampler.sample(logits[2:], [0]) == 1  # -1.5
    assert logits[0] == 2.0


@pytest.mark.parametrize(("last_n", "expected"), [(1, 0), (2, 1), (0, 0), (-1, 1)])
def test_repeat_last_n(last_n, expected):
    """A window one token off, 0 taken for all tokens (as past[-0:] is), or -1 taken for one."""
    logits = np.array([2.0, 1.5, 0.0], dtype=np.float32)
    assert Sampler(temp=0, repeat_penalty=2.0, repeat_last_n=last_n).sample(logits, [0, 2]) == expected


def test_seed_repeats_a_run():
    """Random numbers shared between samplers, or a seed that is ignored."""
    logits = np.zeros(50, dtype=np.float32)
    first, second, other = (Sampler(seed=seed) for seed in (3, 3, 4))
    runs = [[sampler.sample(logits) for _ in range(20)] for sampler in (first, second, other)]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 3


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"temp": float("nan")}, "temp"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"repeat_last_n": -2}, "repeat_last_n"),
        ({"seed": -2}, "seed"),
    ],
)
def test_ranges(keys, name):
    """Nonsense that is sampled from without a word."""
    with pytest.raises(KsortError, match=f"^`{name}` ") as caught:
        Sampler(**keys)
    assert caught.value.field == name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_damaged_logits(bad, temp):
    """A broken model that answers token 0 forever."""
    with pytest.raises(KsortError, match="logits are not finite"):
        Sampler(temp=temp).sample(np.array([0.0, bad, 1.0], dtype=np.float32))


def test_masked_logits():
    """Minus infinity is a mask, not damage; it is never drawn, also without any filter."""
    assert drawn(Sampler(**OFF), np.array([-np.inf, 0.0, 0.0, -np.inf], dtype=np.float32)) == {1, 2}
