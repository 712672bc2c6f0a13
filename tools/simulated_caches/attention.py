"""Attention over simulated caches, in the place of libksort's."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.cache.protocol import LayerPlan
from ksort_gguf.kvplan import RopeTables

from .scheme import LayerTensors, Scheme, Stored

_QUERIES_AT_ONCE = 256


class Rope:
    """RoPE on torch tensors, by tables of one layer: arrays [head_dim] or [n_kv_heads, head_dim]."""

    def __init__(self, tables: RopeTables, n_kv_heads: int):
        head_dim = tables.partner.shape[-1]
        partner, sign, frequency = (
            torch.from_numpy(np.broadcast_to(values, (n_kv_heads, head_dim)).astype(np.int64))[:, None]
            for values in (tables.partner, tables.sign, tables.frequency)
        )  # int64 [n_kv_heads, 1, head_dim] each
        self._partner, self._sign, self._frequency = partner, sign, frequency

    def apply(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [heads, n, head_dim], heads a multiple of n_kv_heads; cos and sin [n, n_frequencies]. A rotated copy."""
        group = len(x) // len(self._partner)
        x = x.unflatten(0, (-1, group))  # [n_kv_heads, group, n, head_dim]
        sign = self._sign[:, None]
        cos = torch.where(sign == 0, 1.0, cos[:, self._frequency[:, 0]].transpose(0, 1)[:, None])
        sin = sign * sin[:, self._frequency[:, 0]].transpose(0, 1)[:, None]
        partner = x.gather(3, self._partner[:, None].expand_as(x))
        return (x * cos + partner * sin).flatten(0, 1)


class SimulatedAttention:
    """cache.protocol.Attention over texts that are fed whole, their keys and values stored by schemes.

    `seen` gets each layer's number and tensors before they are stored; `bits` holds the mean bits of a key and of a
    value of the last text, by layer.
    """

    def __init__(
        self, layers: Sequence[LayerPlan], keys: Sequence[Scheme], values: Sequence[Scheme],
        seen: Callable[[int, LayerTensors], None] = lambda layer, tensors: None, tail: int = 0, sink: int = 0,
    ):  # fmt: skip
        """keys, values: a scheme for each layer. tail, sink: newest and first tokens that each query finds in f16."""
        self._layers, self._keys, self._values, self._seen = layers, keys, values, seen
        self._tail, self._sink = tail, sink
        self._ropes = [Rope(plan.rope, plan.heads.n_kv_heads) for plan in layers]
        self.bits = [(0.0, 0.0)] * len(layers)

    def bound(self, n_tokens: int) -> int:
        """See Attention."""
        return n_tokens

    def begin(self, n_tokens: int, n_slots: int) -> None:
        """See Attention. Raises ValueError unless the tokens are a text from its beginning."""
        if n_slots != n_tokens:
            raise ValueError("a simulated cache needs the whole text in one step")

    def run(self, layer: int, qkv: FloatRows, out: FloatRows) -> None:
        """See Attention."""
        plan, rope = self._layers[layer], self._ropes[layer]
        h, n = plan.heads, qkv.n_rows
        heads = torch.from_numpy(qkv.numpy()).view(n, -1, h.head_dim).transpose(0, 1)
        q, k, v = heads.split([h.n_heads, h.n_kv_heads, h.n_kv_heads])
        cos, sin = (torch.from_numpy(rows.numpy()) for rows in plan.rope_table.rows(0, n))
        tensors = LayerTensors(
            q=rope.apply(q, cos, sin),
            k=rope.apply(k, cos, sin),
            k_before_rope=k.contiguous(),
            v=v.contiguous(),
            apply_rope=lambda x: rope.apply(x, cos, sin),
            score_scale=h.scale,
        )
        self._seen(layer, tensors)
        keys, values = self._keys[layer], self._values[layer]
        stored_k = keys.store(tensors, "k").with_exact(self._tail, self._sink)
        stored_v = values.store(tensors, "v").with_exact(self._tail, self._sink)
        self.bits[layer] = stored_k.bits, stored_v.bits
        attended = torch.from_numpy(out.numpy()).view(n, h.n_heads, h.head_dim)
        attend(keys.round_queries(tensors.q), tensors, stored_k, stored_v, h.window, attended)


def attend(q: torch.Tensor, layer: LayerTensors, keys: Stored, values: Stored, window: int, out: torch.Tensor) -> None:
    """Causal attention over what each query finds, into `out` [n, n_heads, head_dim].

    q: queries [n_heads, n, head_dim] for stored keys; those that are still exact meet the layer's own.
    window: tokens that a query sees, itself included; 0 for all.
    """
    n_kv_heads, n, _ = layer.k.shape
    q, exact_q = (x.unflatten(0, (n_kv_heads, -1)) for x in (q, layer.q))  # [n_kv_heads, group, n, head_dim]
    position = torch.arange(n)
    for start in range(0, n, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, n)
        first = max(0, start + 1 - window) if window else 0
        rows, columns = position[start:end, None], position[first:end]
        scores = q[:, :, start:end] @ keys.decoded[:, None, first:end].mT  # [n_kv_heads, group, rows, columns]
        for tokens, is_exact in _exact_tokens(keys, first, start, end):
            exact = exact_q[:, :, start:end] @ layer.k[:, None, tokens].half().float().mT
            part = scores[..., tokens.start - first : tokens.stop - first]
            part.copy_(torch.where(is_exact, exact, part))
        hidden = columns > rows
        if window:
            hidden |= columns <= rows - window
        weights = torch.softmax((scores * layer.score_scale).masked_fill_(hidden, -torch.inf), dim=-1)
        attended = _weighted_values(weights, layer, values, first, start, end)
        out[start:end] = attended.flatten(0, 1).transpose(0, 1)


def _weighted_values(
    weights: torch.Tensor, layer: LayerTensors, values: Stored, first: int, start: int, end: int
) -> torch.Tensor:
    """Queries start .. end-1: weights [n_kv_heads, group, rows, tokens first .. end-1] times what each finds of values.

    [n_kv_heads, group, rows, head_dim]. Overwrites `weights`.
    """
    of_exact = torch.zeros(())
    for tokens, is_exact in _exact_tokens(values, first, start, end):
        part = weights[..., tokens.start - first : tokens.stop - first]
        exact_weights = part * is_exact
        part -= exact_weights
        of_exact = of_exact + exact_weights @ layer.v[:, None, tokens].half().float()
    return weights @ values.decoded[:, None, first:end] + of_exact


def _exact_tokens(stored: Stored, first: int, start: int, end: int) -> list[tuple[slice, torch.Tensor]]:
    """Runs of tokens from first .. end-1, which do not overlap, and what queries start .. end-1 find of them in f16.

    The latter is bool [end - start or 1, tokens of the run].
    """
    runs, recent = [], end
    if stored.n_decoded is not None:
        n_decoded = stored.n_decoded[start:end, None]
        recent = max(first, int(n_decoded.min()))
        tokens = torch.arange(recent, end)
        runs.append((slice(recent, end), (tokens >= n_decoded) | (tokens < stored.n_sinks)))
    if stored.n_sinks > first:
        sinks = slice(first, min(stored.n_sinks, recent))
        runs.append((sinks, torch.ones(1, sinks.stop - sinks.start, dtype=torch.bool)))
    return runs
