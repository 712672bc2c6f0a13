"""The forward pass of a Llama-like model: eight calls into libksort a layer, all on the threads of one pool.

Nothing else runs on several threads: torch's own threads spin for milliseconds after each operation and would take the
cores from the pool's.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ksort_gguf import native_pool
from ksort_gguf.cache_types import CACHE_TYPES
from ksort_gguf.errors import KsortError
from ksort_gguf.families import Family, Geometry
from ksort_gguf.families.rope import RopeTables, cos_sin, folded_tables, frequencies, stock_tables
from ksort_gguf.plan.kplan import KPlan, Transforms
from ksort_gguf.runtime.kv_cache import CacheOptions, KVCache
from ksort_gguf.runtime.weights import LayerWeights, ModelWeights

N_UBATCH = 512  # tokens that go through the layers together

_TYPE_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class _Angles:
    """cos and sin of every position's RoPE angles, float32 [n_positions, n_rot/2], extended as positions come."""

    def __init__(self, g: Geometry, factors: torch.Tensor | None):
        self._theta = frequencies(g, None if factors is None else factors.numpy())
        self.n_frequencies = len(self._theta)
        self._cos = self._sin = np.empty((0, self.n_frequencies), np.float32)
        self._at = 0, 0  # addresses of both

    def addresses(self, first: int, n: int) -> tuple[int, int]:
        """Addresses of the rows of positions first .. first+n-1, valid until the next call."""
        if first + n > len(self._cos):
            self._cos, self._sin = cos_sin(self._theta, max(first + n, 2 * len(self._cos), N_UBATCH))
            self._at = self._cos.ctypes.data, self._sin.ctypes.data
        offset = first * self.n_frequencies * 4
        return self._at[0] + offset, self._at[1] + offset


class _Matrix:
    """A matrix [n_out, n_in] with an optional float32 bias [n_out], both kept as they are, for Pool.linear."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._kept = weight, bias = weight.contiguous(), bias
        bias_address = None if bias is None else bias.data_ptr()
        self.n_out = weight.shape[0]
        self.native = native_pool.Weights(_TYPE_NAMES[weight.dtype], *weight.shape, weight.data_ptr(), bias_address)


class _Norm:
    """RMSNorm with a float32 gain [n], for Pool.rms_norm."""

    def __init__(self, gain: torch.Tensor, epsilon: float):
        self._kept = gain
        self.native = native_pool.RmsNorm(len(gain), gain.data_ptr(), epsilon)


class _Layer:
    """One block's matrices and norms, and the calls around its attention.

    The calls are prepared once for a number of rows and made at every step: reading the weights puts the interpreter's
    own code out of the caches between two calls, so that every line of Python costs.
    """

    def __init__(self, w: LayerWeights, epsilon: float):
        self.attn_norm, self.ffn_norm = _Norm(w.attn_norm, epsilon), _Norm(w.ffn_norm, epsilon)
        self.qkv = _Matrix(w.qkv, w.qkv_bias)
        self.attn_output = _Matrix(w.attn_output, w.attn_output_bias)
        self.gate_up, self.down = _Matrix(w.gate_up), _Matrix(w.down)
        self.swiglu = native_pool.SwiGlu(self.gate_up.n_out // 2)

    def prepare(self, pool: native_pool.Pool, at: dict[str, int], is_first: bool, n: int) -> None:
        """Set the calls for `n` rows of activations at the addresses `at`. The first layer finds nothing to add."""
        added = 0 if is_first else at["added"]
        self.before_attention = [
            self.attn_norm.native.call(pool, at["x"], added, at["normed"], n),
            self.qkv.native.call(pool, at["normed"], at["qkv"], n),
        ]
        self.after_attention = [
            self.attn_output.native.call(pool, at["attended"], at["added"], n),
            self.ffn_norm.native.call(pool, at["x"], at["added"], at["normed"], n),
            self.gate_up.native.call(pool, at["normed"], at["gate_up"], n),
            self.swiglu.call(pool, at["gate_up"], at["up"], at["activated"], n),
            self.down.native.call(pool, at["activated"], at["added"], n),
        ]


class _Activations:
    """Float32 rows of up to `n_rows` tokens between the calls of a block, at fixed addresses."""

    def __init__(self, n_rows: int, n_embd: int, n_attended: int, layer: _Layer):
        self.n_rows = n_rows
        widths = {
            "x": n_embd,  # the hidden states
            "added": n_embd,  # what attention or FFN adds to them
            "normed": n_embd,
            "qkv": layer.qkv.n_out,
            "attended": n_attended,
            "gate_up": layer.gate_up.n_out,
            "activated": layer.gate_up.n_out // 2,
        }
        self._kept = {name: torch.empty((n_rows, width)) for name, width in widths.items()}
        self.x = self._kept["x"]
        self.at = {name: rows.data_ptr() for name, rows in self._kept.items()}
        self.at["up"] = self._kept["gate_up"][0, layer.gate_up.n_out // 2 :].data_ptr()  # every row's second half


class Model:
    """Weights of a family, folded or stock, and the threads that run them.

    One sequence at a time: `start` gives it a cache, `forward` feeds tokens.
    """

    def __init__(self, weights: ModelWeights, family: Family, geometry: Geometry, plan: KPlan | None, n_threads: int):
        self.geometry = geometry
        self.n_vocab = weights.output.shape[0]
        self._embedding = weights.embedding
        self.n_threads = n_threads
        self._pool = native_pool.Pool(n_threads)
        self._layers = [_Layer(w, geometry.rms_epsilon) for w in weights.layers]
        self._output_norm, self._output = _Norm(weights.output_norm, geometry.rms_epsilon), _Matrix(weights.output)
        self._activations = self._new_activations(N_UBATCH)
        self._n_prepared = 0  # rows that the layers' calls are for
        self._angles = _Angles(geometry, weights.rope_factors)
        self._plan = plan
        self._rope = [layer_tables(family, geometry, plan, layer) for layer in range(geometry.n_layers)]
        torch.set_num_threads(n_threads)

    def _prepare_calls(self, n: int) -> None:
        """Make the layers' calls for `n` rows, where the last ones were for another number."""
        if n == self._n_prepared:
            return
        self._n_prepared = 0  # until all are made: an interrupt may come between them
        if n > self._activations.n_rows:
            self._activations = self._new_activations(n)
        for i, layer in enumerate(self._layers):
            layer.prepare(self._pool, self._activations.at, i == 0, n)
        self._n_prepared = n

    def _new_activations(self, n_rows: int) -> _Activations:
        g = self.geometry
        return _Activations(n_rows, g.n_embd, g.n_heads * g.head_dim, self._layers[0])

    def start(self, options: CacheOptions, n_ctx: int) -> "Sequence":
        """A new, empty sequence of at most `n_ctx` tokens."""
        return Sequence(self, KVCache(self.geometry, options, n_ctx))

    def layer_steps(self, cache: KVCache) -> list[native_pool.LayerStep]:
        """The native calls that pack into and attend over `cache`, one a layer; a plan transforms BFP types only."""
        g, options = self.geometry, cache.options
        k_plan = self._plan.keys if self._plan and CACHE_TYPES[options.k_type].is_bfp else Transforms()
        v_plan = self._plan.values if self._plan and CACHE_TYPES[options.v_type].is_bfp else Transforms()
        return [
            native_pool.LayerStep(
                self._pool,
                cache.k[layer],
                cache.v[layer],
                n_heads=g.n_heads,
                scale=1 / math.sqrt(g.head_dim),
                window=g.window,
                query_type=options.query_type,
                rope=self._rope[layer],
                k_transform=k_plan.layer(layer),
                v_transform=v_plan.layer(layer),
            )
            for layer in range(g.n_layers)
        ]

    def run_layers(self, tokens: torch.Tensor, steps: list[native_pool.LayerStep], first_slot: int) -> torch.Tensor:
        """Hidden states float32 [n, n_embd] after all layers and the output norm.

        tokens: int64 [n], standing in slots first_slot on.
        """
        g, n, pool = self.geometry, len(tokens), self._pool
        self._prepare_calls(n)
        cos, sin = self._angles.addresses(first_slot, n)
        waves = cos, sin, self._angles.n_frequencies
        self._activations.x[:n] = F.embedding(tokens, self._embedding)
        at = self._activations.at
        for layer, step in zip(self._layers, steps, strict=True):
            pool.run(layer.before_attention)
            step.run(at["qkv"], layer.qkv.n_out, n, first_slot, *waves, at["attended"], g.n_heads * g.head_dim)
            pool.run(layer.after_attention)
        hidden = torch.empty((n, g.n_embd))
        pool.rms_norm(self._output_norm.native, at["x"], at["added"], hidden.data_ptr(), n)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, n_vocab] from run_layers' hidden states [n, n_embd], contiguous."""
        logits = torch.empty((len(hidden), self.n_vocab))
        self._pool.linear(self._output.native, hidden.data_ptr(), logits.data_ptr(), len(hidden))
        return logits


def layer_tables(family: Family, g: Geometry, plan: KPlan | None, layer: int) -> RopeTables:
    """RoPE tables [n_kv_heads, head_dim] of a layer: stock, or in the plan's order."""
    stock = stock_tables(g.head_dim, g.n_rot, family.row_order)
    order = np.tile(np.arange(g.head_dim), (g.n_kv_heads, 1))
    if plan is not None and plan.order is not None:
        order = plan.order[layer]
    return folded_tables(stock, order)


def does_not_fit(n_tokens: int, n_ctx: int) -> KsortError:
    """The error for more tokens than the context holds."""
    return KsortError(f"{n_tokens} tokens do not fit the context of {n_ctx}: raise it with -c or shorten the prompt")


def check_finite(logits: torch.Tensor) -> None:
    """Raise KsortError if a logit is NaN or infinite."""
    if not np.isfinite(logits.numpy().sum()):  # one thread: torch would wake all of them
        raise KsortError("the model's logits are not finite: its arithmetic overflows, or its weights are damaged")


class Sequence:
    """A model running one sequence of tokens."""

    def __init__(self, model: Model, cache: KVCache):
        self.model, self.cache = model, cache
        self._steps = model.layer_steps(cache)

    @torch.inference_mode()
    def forward(self, tokens: list[int], n_logits: int = 1) -> torch.Tensor:
        """Append `tokens`; logits float32 [n_logits, n_vocab] of the last `n_logits` of them.

        Raises KsortError where the tokens do not fit the context or the model's arithmetic overflowed; the cache then
        holds what it held before.
        """
        first = self.cache.n_tokens
        if first + len(tokens) > self.cache.n_ctx:
            raise does_not_fit(first + len(tokens), self.cache.n_ctx)
        if not tokens:
            raise ValueError("no tokens")
        ids = torch.tensor(tokens)
        tail = []
        for start in range(0, len(tokens), N_UBATCH):
            part = ids[start : start + N_UBATCH]
            hidden = self.model.run_layers(part, self._steps, first + start)
            skip = len(tokens) - n_logits - start  # of this part's rows, those that no one asked logits for
            if skip < len(part):
                tail.append(self.model.logits(hidden[max(skip, 0) :]))
        logits = torch.cat(tail) if len(tail) > 1 else tail[0]
        check_finite(logits)
        self.cache.n_tokens = first + len(tokens)
        return logits
