"""Folding: the rows of q and k projections in the order of a plan. Rows move as bytes and are never re-quantized."""

from collections.abc import Mapping

import numpy as np

from ksort_gguf.container.tensors import Tensor
from ksort_gguf.errors import KsortError
from ksort_gguf.models.source import Source


def inverse_order(order: np.ndarray) -> np.ndarray:
    """The order that undoes `order` [..., head_dim]: at stock channel c, the place where it went."""
    return np.argsort(order, axis=-1)


class FoldedTensor(Tensor):
    """A tensor of projections with its rows in another order."""

    def __init__(self, base: Tensor, rows: np.ndarray):
        """rows: int [base.shape[0]]; place i holds the base's row rows[i]."""
        super().__init__(base.file, base.name, base.shape, base.type)
        self._base, self._rows = base, rows

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        rows = self._rows[start:stop]
        first = int(rows.min())
        raw = self._base.read_rows(first, int(rows.max()) + 1).reshape(-1, self.n_bytes // self.shape[0])
        return raw[rows - first].reshape(-1)

    def non_finite(self) -> KsortError:
        return self._base.non_finite()


def folded_tensors(source: Source, order: np.ndarray | None) -> Mapping[str, Tensor]:
    """All tensors of a stock model, q and k projections folded with `order` int [n_layers, n_kv_heads, head_dim].

    order[l, h, i] is the stock channel that stands at place i of KV head h; query heads have their KV head's order.
    None: nothing is folded.
    """
    if order is None:
        return source.tensors
    rows: dict[str, np.ndarray] = {}
    for a, layer_order in zip(source.spec.attentions, order, strict=True):
        for projection, n_heads in ((a.q, a.n_heads), (a.k, a.n_kv_heads)):
            head_orders = np.repeat(layer_order, n_heads // a.n_kv_heads, axis=0)
            moved = (np.arange(n_heads)[:, None] * a.head_dim + head_orders).reshape(-1) + projection.start
            for name in (projection.weight, projection.bias):
                if name is not None:
                    rows.setdefault(name, np.arange(source.tensor(name).shape[0]))
                    rows[name][projection.start : projection.start + projection.n_out] = moved
    return {n: FoldedTensor(t, rows[n]) if n in rows else t for n, t in source.tensors.items()}
