"""The forward pass of calibration: the queries, keys and values that a model has on text, one layer at a time.

    for each layer: read its weights -> for each window: hidden states -> q, k, v -> observe -> attention, MLP -> hidden

In memory at once: one layer's weights, one window's activations (of attention and MLP a few hundred rows), and the
hidden states between layers, which move to a temporary file above MAX_HIDDEN_BYTES. Everything is float32: f16 matrices
are several times slower on CPUs, and bf16 ones would round the activations whose statistics are wanted here.
"""

import tempfile
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F

from ksort_gguf.cache.rope_table import cos_sin
from ksort_gguf.errors import KsortError
from ksort_gguf.models.rope import frequencies, stock_tables
from ksort_gguf.models.run_torch import Float32, project, run_block
from ksort_gguf.models.source import Source
from ksort_gguf.models.spec import Attention, Rope
from ksort_gguf.models.weights import WeightReader

# observe(layer, window, q, k, v): float32 q [n, n_heads, head_dim] and k [n, n_kv_heads, head_dim] after RoPE, channels
# in the stock row order, and v [n, n_kv_heads, head_dim], of the n tokens of a window
Observe = Callable[[int, int, torch.Tensor, torch.Tensor, torch.Tensor], None]

Heads = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # q, k, v of rows of all three

MAX_HIDDEN_BYTES = 1 << 30  # of hidden states in memory; 64k tokens of a model with 4096 channels
_TOKENS_AT_ONCE = 512  # that go through windowed attention together


@torch.no_grad()
def observe_layers(
    source: Source, windows: Sequence[Sequence[int]], observe: Observe, progress: Callable[[], object]
) -> None:
    """Run `windows` of token ids, which do not see each other, through the stock model `source`.

    Calls observe(layer, window, q, k, v) for each layer and window, layers outermost; the tensors are its to keep but
    not to change. Calls `progress` after each of them. The same for every run with as many torch threads.
    Raises KsortError for a folded model, for tokens that it lacks, for weights or activations that are not finite, and
    where there is no room for the temporary file.
    """
    source.refuse_folded("calibrate on the stock model")
    spec, how = source.spec, Float32()
    reader = WeightReader(source, float32=True)
    ropes = _Ropes(source, max(map(len, windows)))
    with tempfile.SpooledTemporaryFile(max_size=MAX_HIDDEN_BYTES) as file:
        hidden = _HiddenStates(file, [len(tokens) for tokens in windows], spec.n_embd)
        for window, tokens in enumerate(windows):
            hidden.write(window, _embed(source, tokens))
        for layer, block in enumerate(spec.blocks):
            weights, a = reader.block(block), block.attention
            for window in range(len(windows)):

                def heads(
                    qkv: torch.Tensor, layer: int = layer, window: int = window, a: Attention = a
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
                    q, k, v = qkv.view(len(qkv), -1, a.head_dim).split((a.n_heads, a.n_kv_heads, a.n_kv_heads), 1)
                    if not torch.isfinite(q.sum() + k.sum() + v.sum()):
                        raise KsortError(
                            f"{source.path}: layer {layer}: activations overflow float32: the weights are damaged, "
                            "get the model again"
                        )
                    q, k = ropes.turn(q, a), ropes.turn(k, a)
                    observe(layer, window, q, k, v)
                    return q, k, v

                x = hidden.read(window)
                if layer + 1 == spec.n_layers:
                    heads(project(block, weights, x, how))
                else:

                    def attend(qkv: torch.Tensor, heads: Heads = heads, a: Attention = a) -> torch.Tensor:
                        return _attend(*heads(qkv), a)

                    run_block(block, weights, x, attend, how)
                    hidden.write(window, x)
                progress()
            del weights  # before the next layer's are read


def _embed(source: Source, tokens: Sequence[int]) -> torch.Tensor:
    """float32 [n, n_embd]: the embedding's rows of `tokens`, the only ones that are read."""
    embedding = source.tensor(source.spec.embedding)
    distinct, places = np.unique(tokens, return_inverse=True)
    if distinct[-1] >= embedding.shape[0]:
        raise KsortError(
            f"{source.path}: token {distinct[-1]} has no row in the embedding of {embedding.shape[0]}: "
            "the model's tokenizer is another model's, convert it again"
        )
    rows = np.concatenate([embedding.read_rows(token, token + 1) for token in distinct.tolist()])
    x = torch.from_numpy(embedding.read_finite_f32(rows))[torch.from_numpy(places)]
    return x if source.spec.embedding_scale == 1 else x * source.spec.embedding_scale


class _Ropes:
    """RoPE of a stock model, for windows of up to `n_positions` tokens that begin at position 0."""

    def __init__(self, source: Source, n_positions: int):
        self._turns = {
            (a.rope, a.head_dim): _tables(source, a, a.rope, n_positions)
            for a in source.spec.attentions
            if a.rope is not None
        }

    def turn(self, x: torch.Tensor, attention: Attention) -> torch.Tensor:
        """x [n, heads, head_dim] of a layer after RoPE: see RopeTables."""
        if attention.rope is None:
            return x
        cos, sin, partner = self._turns[attention.rope, attention.head_dim]
        n = len(x)
        return x * cos[:n] + x[:, :, partner] * sin[:n]


def _tables(
    source: Source, attention: Attention, rope: Rope, n_positions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cos and sin by position and channel, float32 [n_positions, 1, head_dim], and each channel's partner."""
    tables = stock_tables(attention.head_dim, rope.n_rot, source.spec.row_order)
    theta = frequencies(rope, source.rope_factors(rope, n_positions))
    cos, sin = cos_sin(theta, n_positions, rope.magnitude)
    channel = tables.frequency.astype(np.intp)
    cos = np.where(tables.sign == 0, np.float32(1), cos[:, channel])
    sin = sin[:, channel] * tables.sign.astype(np.float32)
    return (
        torch.from_numpy(cos)[:, None],
        torch.from_numpy(sin)[:, None],
        torch.from_numpy(tables.partner.astype(np.int64)),
    )


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Causal attention, [n, n_heads * head_dim]. q [n, n_heads, head_dim]; k, v [n, n_kv_heads, head_dim].

    torch's attention on CPUs goes over keys in blocks: it holds no n x n scores.
    """
    n, n_heads, head_dim = q.shape
    window, scale = attention.window, attention.scale
    n_kv_heads = k.shape[1]
    # KV heads stand where torch has the batch, the query heads that share one where it has the heads
    q = q.view(n, n_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k, v = (kv.transpose(0, 1)[:, None].expand(-1, n_heads // n_kv_heads, -1, -1) for kv in (k, v))
    if window == 0 or n <= window:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        starts = range(0, n, _TOKENS_AT_ONCE)
        out = torch.cat([_attend_part(q, k, v, attention, start) for start in starts], dim=2)
    return out.permute(2, 0, 1, 3).reshape(n, n_heads * head_dim)


def _attend_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention, start: int) -> torch.Tensor:
    """Windowed attention of _TOKENS_AT_ONCE tokens, from `start` on. All are [n_kv_heads, group, tokens, head_dim]."""
    stop, window = min(start + _TOKENS_AT_ONCE, q.shape[2]), attention.window
    first = max(0, start + 1 - window)
    behind = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
    visible = (behind >= 0) & (behind < window)
    return F.scaled_dot_product_attention(
        q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], attn_mask=visible, scale=attention.scale
    )


class _HiddenStates:
    """float32 [n, n_embd] for each window, one after the other in a binary file."""

    def __init__(self, file: IO[bytes], lengths: Sequence[int], n_embd: int):
        self._file = file
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self._n_embd = n_embd

    def read(self, window: int) -> torch.Tensor:
        """A window's hidden states."""
        start, stop = self._starts[window : window + 2]
        self._file.seek(start * self._n_embd * 4)
        values = np.frombuffer(self._file.read((stop - start) * self._n_embd * 4), np.float32)
        return torch.tensor(values).view(-1, self._n_embd)

    def write(self, window: int, x: torch.Tensor) -> None:
        """Keep x [n, n_embd]. Raises KsortError where the temporary file finds no room."""
        try:
            self._file.seek(self._starts[window] * self._n_embd * 4)
            self._file.write(x.numpy().data)
            self._file.flush()
        except OSError as error:
            raise KsortError(
                f"{tempfile.gettempdir()}: cannot hold the hidden states of calibration: {error.strerror}: "
                "lower `calibrate_tokens`, or set TMPDIR to a folder with room"
            ) from None
