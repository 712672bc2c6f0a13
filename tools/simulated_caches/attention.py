"""Attention over simulated caches, in the place of libksort's: what Model.run_layers calls once a layer."""

import ctypes

import numpy as np
import torch

from ksort_gguf.families import Geometry
from ksort_gguf.families.rope import RopeTables

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


class SimulatedStep:
    """One layer of a text that is fed whole: like native_pool.LayerStep, but keys and values are stored by schemes.

    `seen` gets the layer's tensors before they are stored; `bits` holds the mean bits of a key and of a value of the
    last text.
    """

    def __init__(self, geometry: Geometry, tables: RopeTables, keys: Scheme, values: Scheme, seen=lambda layer: None):
        self._g, self._rope = geometry, Rope(tables, geometry.n_kv_heads)
        self._keys, self._values, self._seen = keys, values, seen
        self.bits = (0.0, 0.0)

    def run(
        self, qkv_address, token_stride, n_tokens, first_slot,
        cos_address, sin_address, n_frequencies, out_address, out_token_stride,
    ) -> None:  # fmt: skip
        """As native_pool.LayerStep.run. Raises ValueError unless the tokens stand at the beginning of a text."""
        if first_slot:
            raise ValueError("a simulated cache needs the whole text in one call")
        g = self._g
        n_rows = g.n_heads + 2 * g.n_kv_heads
        qkv = _floats(qkv_address, n_tokens, token_stride, n_rows * g.head_dim)
        q, k, v = qkv.unflatten(1, (n_rows, g.head_dim)).transpose(0, 1).split([g.n_heads, g.n_kv_heads, g.n_kv_heads])
        cos = _floats(cos_address, n_tokens, n_frequencies, n_frequencies)
        sin = _floats(sin_address, n_tokens, n_frequencies, n_frequencies)
        layer = LayerTensors(
            q=self._rope.apply(q, cos, sin),
            k=self._rope.apply(k, cos, sin),
            k_before_rope=k.contiguous(),
            v=v.contiguous(),
            apply_rope=lambda x: self._rope.apply(x, cos, sin),
            score_scale=g.head_dim**-0.5,
        )
        self._seen(layer)
        stored_k, stored_v = self._keys.store(layer, "k"), self._values.store(layer, "v")
        self.bits = stored_k.bits, stored_v.bits
        out = _floats(out_address, n_tokens, out_token_stride, g.n_heads * g.head_dim)
        queries = self._keys.round_queries(layer.q)
        attend(queries, layer, stored_k, stored_v, g.window, out.unflatten(1, (g.n_heads, g.head_dim)))


def _floats(address: int, n_rows: int, stride: int, n_columns: int) -> torch.Tensor:
    """float32 [n_rows, n_columns] at `address`, rows `stride` floats apart: a view, valid while that memory is."""
    n_floats = (n_rows - 1) * stride + n_columns
    flat = np.ctypeslib.as_array((ctypes.c_float * n_floats).from_address(address))
    return torch.from_numpy(flat).as_strided((n_rows, n_columns), (stride, 1))


def attend(q: torch.Tensor, layer: LayerTensors, keys: Stored, values: Stored, window: int, out: torch.Tensor) -> None:
    """Causal attention of q [n_heads, n, head_dim] over what each query finds, into `out` [n, n_heads, head_dim].

    window: tokens that a query sees, itself included; 0 for all.
    """
    n_kv_heads, n, _ = layer.k.shape
    q = q.unflatten(0, (n_kv_heads, -1))  # [n_kv_heads, group, n, head_dim]
    position = torch.arange(n)
    for start in range(0, n, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, n)
        first = max(0, start + 1 - window) if window else 0
        rows, columns = position[start:end, None], position[first:end]
        queries = q[:, :, start:end]
        scores = queries @ keys.decoded[:, None, first:end].mT  # [n_kv_heads, group, rows, columns]
        if keys.n_decoded is not None:
            recent = _recent(keys.n_decoded[start:end], first, end)
            exact = queries @ layer.k[:, None, recent].half().float().mT
            still_exact = position[recent] >= keys.n_decoded[start:end, None]
            part = scores[..., recent.start - first :]
            part.copy_(torch.where(still_exact, exact, part))
        hidden = columns > rows
        if window:
            hidden |= columns <= rows - window
        weights = torch.softmax((scores * layer.score_scale).masked_fill_(hidden, -torch.inf), dim=-1)
        attended = _weighted_values(weights, layer, values, first, start, end)
        out[start:end] = attended.flatten(0, 1).transpose(0, 1)


def _weighted_values(weights, layer: LayerTensors, values: Stored, first: int, start: int, end: int) -> torch.Tensor:
    """Queries start .. end-1: weights [n_kv_heads, group, rows, tokens first .. end-1] times what each finds of values.

    [n_kv_heads, group, rows, head_dim]. Overwrites `weights`.
    """
    decoded = values.decoded[:, None, first:end]
    if values.n_decoded is None:
        return weights @ decoded
    recent = _recent(values.n_decoded[start:end], first, end)
    still_exact = torch.arange(recent.start, end) >= values.n_decoded[start:end, None]
    exact_weights = weights[..., recent.start - first :] * still_exact
    weights[..., recent.start - first :] -= exact_weights
    return weights @ decoded + exact_weights @ layer.v[:, None, recent].half().float()


def _recent(n_decoded: torch.Tensor, first: int, end: int) -> slice:
    """The tokens that some query of a block finds exact."""
    return slice(max(first, int(n_decoded.min())), end)
