"""Choosing the next token from logits: llama.cpp's chain with its defaults and order.

Repeat penalty, top-k, top-p, min-p, temperature, draw. The random numbers are NumPy's, not llama.cpp's: a seed repeats
a run of ours, not one of theirs.
"""

import math
from collections.abc import Sequence

import numpy as np

from ksort_gguf.errors import KsortError


class Sampler:
    """Draws token ids; keeps nothing between draws but the state of its random numbers. Not thread-safe."""

    def __init__(
        self,
        temp: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int = -1,
    ):
        """Off is: temp 0 (or less: the likeliest token), top_k 0 (or less), top_p 1, min_p 0, repeat_penalty 1.

        repeat_last_n: tokens that are looked back at, -1 for all; seed: -1 for one that the system picks. Raises
        KsortError naming the argument that is out of range.
        """
        if not math.isfinite(temp):
            raise KsortError(f"`temp` {temp} is not a number: pass 0 for greedy or a positive number", field="temp")
        for name, share in (("top_p", top_p), ("min_p", min_p)):
            if not 0 <= share <= 1:
                raise KsortError(f"`{name}` {share} is not between 0 and 1", field=name)
        if not (math.isfinite(repeat_penalty) and repeat_penalty > 0):
            raise KsortError(
                f"`repeat_penalty` {repeat_penalty} is not positive: pass 1 for none", field="repeat_penalty"
            )
        if repeat_last_n < -1:
            raise KsortError(
                f"`repeat_last_n` {repeat_last_n} is below -1: pass a count, 0 for off or -1 for all",
                field="repeat_last_n",
            )
        if seed < -1:
            raise KsortError(f"`seed` {seed} is below -1: pass 0 or more, or -1 for a random one", field="seed")
        self._temp, self._top_k, self._top_p, self._min_p = temp, top_k, top_p, min_p
        self._repeat_penalty, self._repeat_last_n = repeat_penalty, repeat_last_n
        self._random = np.random.default_rng(None if seed == -1 else seed)

    def sample(self, logits: np.ndarray, past: Sequence[int] = ()) -> int:
        """The next token's id, from `logits` (float32 [n_vocab], not changed) and the tokens `past`, prompt included.

        Equal logits go to the lower id first. Raises KsortError if a logit is NaN or positive infinity.
        """
        logits = np.asarray(logits, dtype=np.float32)
        if not np.isfinite(logits.max()):
            raise KsortError("the model's logits are not finite: its weights are damaged, convert the model again")
        logits = self._penalize(logits, past)
        if self._temp <= 0:
            return int(logits.argmax())
        ids = self._top_k_ids(logits)
        kept = logits[ids].astype(np.float64)
        n_kept = self._n_top_p(kept)
        if self._min_p > 0:
            n_kept = min(n_kept, int((kept >= kept[0] + math.log(self._min_p)).sum()))
        shares = np.exp((kept[:n_kept] - kept[0]) / self._temp).cumsum()
        drawn = int(np.searchsorted(shares, self._random.random() * shares[-1], side="right"))
        return int(ids[min(drawn, n_kept - 1)])

    def _penalize(self, logits: np.ndarray, past: Sequence[int]) -> np.ndarray:
        """`logits` with those of recent tokens made less likely, each once: divided if positive, else multiplied."""
        recent = past if self._repeat_last_n == -1 else past[len(past) - min(self._repeat_last_n, len(past)) :]
        if self._repeat_penalty == 1 or len(recent) == 0:
            return logits
        ids = np.unique(np.asarray(recent))
        logits = logits.copy()
        values = logits[ids]
        logits[ids] = np.where(values <= 0, values * self._repeat_penalty, values / self._repeat_penalty)
        return logits

    def _top_k_ids(self, logits: np.ndarray) -> np.ndarray:
        """Ids of the k largest logits, largest first, equal ones by id."""
        n_vocab = len(logits)
        if not 0 < self._top_k < n_vocab:
            return np.argsort(-logits, kind="stable")
        smallest_kept = np.partition(logits, n_vocab - self._top_k)[n_vocab - self._top_k]
        ids = np.flatnonzero(logits >= smallest_kept)
        return ids[np.argsort(-logits[ids], kind="stable")][: self._top_k]

    def _n_top_p(self, kept: np.ndarray) -> int:
        """How many of the descending logits `kept` it takes to hold top_p of their probability, at least one."""
        if self._top_p >= 1:
            return len(kept)
        shares = np.exp(kept - kept[0]).cumsum()
        return min(int(np.searchsorted(shares, self._top_p * shares[-1])) + 1, len(kept))
