"""Whether a plan helps, layer by layer: rounding errors, tried on sample keys and values before anything is written.

The error of a rounded key e moves a query's score by q.e; its mean square over queries is e^T E[q q^T] e. That of a
rounded value moves the layer's output by Wo e. So an error costs e^T metric e, and the mean of it over samples,
packed as a cache packs them, is the expected error.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ksort_gguf.binding.cpu import PackedHeads
from ksort_gguf.kvplan import Transform
from ksort_gguf.reference import reorder, restore_values

NO_GAIN = 0.99  # a plan whose expected error is more of that without a plan does not help
# A head stays unsorted where its expected error is more of that without: from text, or from the weights alone, which
# say less well how far channels stand out.
HARM = {"text": 1.0, "weights": 1.1}


@dataclass(frozen=True, eq=False)
class Trial:
    """Samples of a layer's keys or values, float32 [n, n_kv_heads, d] in stock row order, and the metric of their
    errors, [n_kv_heads, d, d]. type_name: the cache type that they are packed in."""

    samples: np.ndarray
    metric: np.ndarray
    type_name: str
    block_size: int

    def errors(self, order: np.ndarray | None, transform: Transform | None) -> np.ndarray:
        """The expected error, float64 [n_kv_heads].

        order: int [n_kv_heads, d] or None; transform: in folded order, or None for the nearest encoder alone.
        """
        folded = self.samples if order is None else reorder(self.samples, order)
        n_samples, n_kv_heads, head_dim = folded.shape
        packed = PackedHeads(self.type_name, head_dim, self.block_size, n_kv_heads, n_samples)
        packed.pack(folded, 0, transform=transform)
        restored = packed.unpack(0, n_samples)
        if transform is not None:
            restored = restore_values(restored, transform)
        if order is not None:
            restored = reorder(restored, np.argsort(order, axis=1))
        error = (restored - self.samples).astype(np.float64).swapaxes(0, 1)  # [n_kv_heads, n, d]
        return ((error @ self.metric) * error).sum(axis=2).mean(axis=1)

    def relative_error(self, order: np.ndarray | None, transform: Transform | None) -> float:
        """`errors` over those without a plan, the mean over heads: below 1 the plan helps.

        Heads count alike, whatever their size: a head whose scores are lost weighs no more than that.
        """
        plain, errors = self.errors(None, None), self.errors(order, transform)
        return float(np.mean(np.divide(errors, plain, out=np.ones_like(plain), where=plain > 0)))


def checked_order(trial: Trial, order: np.ndarray, harm: float) -> tuple[np.ndarray, list[int]]:
    """`order` [n_kv_heads, d] with the stock order for the heads that it harms, and those heads. harm: of HARM."""
    harmed = trial.errors(order, None) > harm * trial.errors(None, None)
    stock = np.arange(order.shape[1], dtype=order.dtype)
    return np.where(harmed[:, None], stock, order), np.flatnonzero(harmed).tolist()


def best_transform(
    trial: Trial, order: np.ndarray | None, steps: tuple[str, ...], make: Callable[[tuple[str, ...]], Transform]
) -> tuple[Transform, list[str]]:
    """make(steps), or where that does worse than no plan, the transform of the steps which do best.

    One of shift, scale and feedback may be left out then, or all; `rotate` not, as it is the same for all layers.
    Returns also the names of the steps left out.
    """
    tables: list[str] = [name for name in ("shift", "scale", "feedback") if name in steps]

    def without(names: list[str]) -> tuple[float, Transform]:
        transform = make(tuple(step for step in steps if step not in names))
        return trial.relative_error(order, transform), transform

    error, transform = without([])
    if error <= 1:
        return transform, []
    choices: list[list[str]] = [[], *([name] for name in tables), tables]
    tried = [without(names) for names in choices]
    best = min(range(len(choices)), key=lambda i: tried[i][0])
    return tried[best][1], choices[best]
