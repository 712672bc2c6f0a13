"""KVarN: tiles of 128 tokens, rotated, with the deviations of their rows and columns made alike, then asymmetric.

Source: arXiv 2606.03458 and the authors' vLLM fork (huawei-csl/KVarN, README.md; in a copy of it, sztlink/KVarN,
vllm/model_executor/layers/quantization/kvarn/config.py and vllm/v1/attention/ops/triton_kvarn_sinkhorn.py). A head's
tile is multiplied by the orthonormal Hadamard matrix over the channels. 16 rounds divide each token, then each channel
(values: each channel, then each token) by its standard deviation, in logarithms clamped to -0.3 .. 10; the round with
the least imbalance, largest over least deviation of either axis, stays. Then each channel of keys, each token of
values, gets a uniform grid from its least to its largest value. The grid's scale and zero point, both times the
deviation of the same axis, and the deviations of the other axis are kept in f16. The first 128 tokens are never stored,
and a tile is stored when it is full: the query at position t finds the tiles that were full before it. Every token is
taken as generated (see kivi.py).

kvarn-2 is the preset kvarn_k4v2_g128, 4 bits for keys and 2 for values; kvarn-4 is k4v4, which the configuration can do
and no preset names.
"""

import torch

from .scheme import LayerTensors, Scheme, Side, Stored, check_power_of_two, hadamard, with_recent

_TILE = 128  # tokens; also those at the beginning that stay exact
_ROUNDS = 16
_LEAST_STD, _LARGEST_STD = 1e-3, 1e3
_LEAST_LOG, _LARGEST_LOG = -0.3, 10.0
_K_BITS = 4


class Kvarn(Scheme):
    """KVarN with 4 bits for keys and `v_bits` for values."""

    def __init__(self, v_bits: int):
        self.name, self._v_bits = f"kvarn-{v_bits}", v_bits

    def check(self, head_dim: int) -> None:
        check_power_of_two(self.name, head_dim)

    def store(self, layer: LayerTensors, side: Side) -> Stored:
        x = layer.side(side)
        n, head_dim = x.shape[1:]
        rotation = hadamard(head_dim)
        tiles = (x[:, : n // _TILE * _TILE] @ rotation).unflatten(1, (-1, _TILE))  # [heads, tiles, 128 tokens, d]
        if side == "k":
            n_bits, n_rows, n_columns = _K_BITS, head_dim, _TILE
            decoded = by_rows(tiles.mT, n_bits).mT
        else:
            n_bits, n_rows, n_columns = self._v_bits, _TILE, head_dim
            decoded = by_rows(tiles, n_bits)
        token_bits = n_bits + 16 * (2 * n_rows + n_columns) / (n_rows * n_columns)
        stored = with_recent(decoded.flatten(1, 2) @ rotation, x, torch.arange(n) // _TILE * _TILE, token_bits)
        return stored.with_exact(0, _TILE)


def by_rows(tiles: torch.Tensor, n_bits: int) -> torch.Tensor:
    """What is read back of tiles [..., rows, columns], each row on a grid of its own."""
    row_scale, column_scale = even_deviations(tiles)
    even = tiles / column_scale / row_scale
    low, high = even.amin(-1, keepdim=True), even.amax(-1, keepdim=True)
    step = ((high - low) / (2**n_bits - 1)).clamp(min=1e-10)
    q = ((even - low) / step).round().clamp(0, 2**n_bits - 1)
    return (q * (row_scale * step).half().float() + (row_scale * low).half().float()) * column_scale.half().float()


def even_deviations(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of rows [..., rows, 1] and columns [..., 1, columns]; tiles divided by both have even deviations."""
    row_log, column_log = torch.zeros_like(tiles[..., :1]), torch.zeros_like(tiles[..., :1, :])
    best_row, best_column, least = row_log, column_log, _imbalance(tiles)
    for _ in range(_ROUNDS):
        column_log = _with_deviation(column_log, tiles / (row_log + column_log).exp(), dim=-2)
        row_log = _with_deviation(row_log, tiles / (row_log + column_log).exp(), dim=-1)
        imbalance = _imbalance(tiles / (row_log + column_log).exp())
        is_better = imbalance <= least
        best_row, best_column = (
            torch.where(is_better, row_log, best_row),
            torch.where(is_better, column_log, best_column),
        )
        least = torch.where(is_better, imbalance, least)
    return best_row.exp(), best_column.exp()


def _with_deviation(log_scale: torch.Tensor, tiles: torch.Tensor, dim: int) -> torch.Tensor:
    """`log_scale` and the logarithm of the standard deviations that are left along `dim`."""
    deviation = tiles.std(dim, keepdim=True).clamp(_LEAST_STD, _LARGEST_STD)
    return (log_scale + deviation.log()).clamp(_LEAST_LOG, _LARGEST_LOG)


def _imbalance(tiles: torch.Tensor) -> torch.Tensor:
    """[..., 1, 1]: the largest over the least deviation of columns, plus that of rows."""
    columns, rows = tiles.std(-2, keepdim=True), tiles.std(-1, keepdim=True)
    return _spread(columns) + _spread(rows)


def _spread(deviations: torch.Tensor) -> torch.Tensor:
    """[..., 1, 1]: the largest over the least."""
    return deviations.amax((-2, -1), keepdim=True) / deviations.amin((-2, -1), keepdim=True).clamp(min=1e-8)
