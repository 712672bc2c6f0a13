"""Random layers for the tests of simulated caches, and slow definitions of what their queries find."""

import functools

import torch
from simulated_caches import FLOATS, SCHEMES
from simulated_caches.scheme import LayerTensors

N, N_HEADS, N_KV_HEADS, HEAD_DIM = 300, 6, 2, 64


def turned(x: torch.Tensor) -> torch.Tensor:
    """Stands for RoPE: each token's channels turn by its position, so that no two tokens are treated alike."""
    n, head_dim = x.shape[1:]
    came_from = (torch.arange(head_dim) - torch.arange(n)[:, None]) % head_dim
    return x.gather(2, came_from.expand_as(x))


@functools.cache
def layer_of(seed: int, n: int = N, head_dim: int = HEAD_DIM) -> LayerTensors:
    """Random tensors with a few large channels and tokens, as keys have them."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(N_HEADS, n, head_dim, generator=random)
    k, v = torch.randn(2, N_KV_HEADS, n, head_dim, generator=random)
    k *= torch.linspace(0.2, 6, head_dim)
    k[:, 7] *= 5
    return LayerTensors(q, turned(k), k, v, turned, head_dim**-0.5)


@functools.cache
def fitted(name: str, side: str):
    """The scheme of that name, calibrated on layer_of(9) where it must be."""
    scheme = (SCHEMES | FLOATS)[name]
    return scheme.fit(layer_of(9), side) if scheme.needs_calibration else scheme


def found(stored, exact, head: int, t: int) -> torch.Tensor:
    """What the query at `t` finds of tokens 0 .. t: [t + 1, head_dim]."""
    n_decoded = t + 1 if stored.n_decoded is None else int(stored.n_decoded[t])
    as_stored = [stored.n_sinks <= token < n_decoded for token in range(t + 1)]
    return torch.stack(
        [(stored.decoded if is_so else exact.half().float())[head, i] for i, is_so in enumerate(as_stored)]
    )


def on_grid(groups: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Groups [..., m] as read from a grid of 2^n_bits points of their own, scale and zero point in f16."""
    low, high = groups.amin(-1, keepdim=True).half().float(), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**n_bits - 1)).half().float()
    return ((groups - low) / scale).round().clamp(0, 2**n_bits - 1) * scale + low


def with_window(bits: float, n_stored) -> float:
    """Mean over the later half of queries: query t finds n_stored(t) tokens at `bits`, the others in f16."""
    found = [(n_stored(t) * bits + (t + 1 - n_stored(t)) * 16) / (t + 1) for t in range(N // 2, N)]
    return sum(found) / len(found)
