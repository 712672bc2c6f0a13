"""The CPU's interpreter of a spec: eight calls into libksort_run a block, all on the threads of one pool.

Nothing else runs on several threads: torch's own threads spin for milliseconds after each operation and would take the
cores from the pool's.
"""

import copy
import threading

import numpy as np
import torch
import torch.nn.functional as F

from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.binding.run import Call, Linear, Pool, RmsNorm, SwiGlu
from ksort_gguf.cache.cpu import CpuAttention, CpuCache
from ksort_gguf.cache.exclusive import exclusive
from ksort_gguf.cache.protocol import Attention, Cache, CacheOptions
from ksort_gguf.kvplan import KVPlan
from ksort_gguf.models.context import check_finite, check_fits
from ksort_gguf.models.layers import LayerPlans, RopeFactors
from ksort_gguf.models.spec import Block, ModelSpec, Norm
from ksort_gguf.models.weights import BlockWeights, ModelWeights

N_UBATCH = 512  # tokens that go through the layers together


class _Rows:
    """Float32 rows of `n` tokens between the calls of a block, at fixed addresses."""

    def __init__(self, n: int, spec: ModelSpec):
        def rows(width: int) -> FloatRows:
            return FloatRows(torch.empty((n, width)))

        self.n, attentions, mlps = n, spec.attentions, [block.mlp for block in spec.blocks]
        self.x, self.added, self.normed = (rows(spec.n_embd) for _ in range(3))  # added: to x, by attention or MLP
        self.qkv = {width: rows(width) for width in {a.q.n_out + a.k.n_out + a.v.n_out for a in attentions}}
        self.attended = {width: rows(width) for width in {a.output.n_in for a in attentions}}
        self.gate_up = {n_ff: rows(2 * n_ff) for n_ff in {mlp.down.n_in for mlp in mlps}}
        self.activated = {n_ff: rows(n_ff) for n_ff in self.gate_up}

    def first(self, n: int) -> "_Rows":
        """The first `n` of them, in the same memory."""
        part = copy.copy(self)
        part.x, part.added, part.normed = (rows.first(n) for rows in (self.x, self.added, self.normed))
        part.qkv, part.attended, part.gate_up, part.activated = (
            {width: rows.first(n) for width, rows in of_widths.items()}
            for of_widths in (self.qkv, self.attended, self.gate_up, self.activated)
        )
        return part


class _Block:
    """One block's operations, and the calls around its attention.

    The calls are prepared once for a number of rows and made at every step: reading the weights puts the interpreter's
    own code out of the caches between two calls, so that every line of Python costs.
    """

    def __init__(self, block: Block, w: BlockWeights, is_first: bool):
        self._spec, self._is_first = block, is_first  # the first block finds nothing added to x
        a, scale = block.attention, block.residual_scale
        self._attention_norm = RmsNorm(w.attention_norm, block.attention_norm.epsilon, added_scale=scale)
        self._qkv = Linear(w.qkv, w.qkv_bias)
        self._head_norms = [
            (RmsNorm(gain, norm.epsilon, heads=n_heads), start * a.head_dim, (start + n_heads) * a.head_dim)
            for gain, norm, start, n_heads in (
                (w.q_norm, a.q_norm, 0, a.n_heads),
                (w.k_norm, a.k_norm, a.n_heads, a.n_kv_heads),
            )
            if gain is not None and norm is not None
        ]
        self._output = Linear(w.output, w.output_bias)
        self._mlp_norm = RmsNorm(w.mlp_norm, block.mlp_norm.epsilon, added_scale=scale)
        self._gate_up, self._down = Linear(w.gate_up), Linear(w.down)
        self._swiglu = SwiGlu(self._down.n_in)

    def prepare(self, pool: Pool, rows: _Rows) -> None:
        """Set the calls for these rows."""
        self.qkv, self.attended = rows.qkv[self._qkv.n_out], rows.attended[self._output.n_in]
        n_ff = self._down.n_in
        gate_up, activated = rows.gate_up[n_ff], rows.activated[n_ff]
        added = None if self._is_first else rows.added
        self.before_attention: list[Call] = [
            self._attention_norm.call(pool, rows.x, added, rows.normed),
            self._qkv.call(pool, rows.normed, self.qkv),
        ]
        for norm, start, stop in self._head_norms:
            heads = self.qkv.columns(start, stop)
            self.before_attention.append(norm.call(pool, heads, None, heads))
        self.after_attention: list[Call] = [
            self._output.call(pool, self.attended, rows.added),
            self._mlp_norm.call(pool, rows.x, rows.added, rows.normed),
            self._gate_up.call(pool, rows.normed, gate_up),
            self._swiglu.call(pool, gate_up.columns(0, n_ff), gate_up.columns(n_ff, 2 * n_ff), activated),
            self._down.call(pool, activated, rows.added),
        ]


class NativeModel:
    """cache.protocol.Backend on the CPU: the weights of a stock or folded model, and the threads that run them.

    Contexts of one model may be used from several threads: their steps take turns.
    """

    has_exact_rows = True

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, plan: KVPlan | None, rope_factors: RopeFactors, n_threads: int
    ):
        self.spec, self.n_vocab, self.n_threads = spec, spec.n_vocab, n_threads
        self.lock = threading.Lock()  # of the pool and of the rows between calls
        self._plans = LayerPlans(spec, plan, rope_factors)
        self._embedding = weights.embedding
        self._pool = Pool(n_threads)
        self._blocks = [
            _Block(block, w, is_first=i == 0)
            for i, (block, w) in enumerate(zip(spec.blocks, weights.blocks, strict=True))
        ]
        self._output_norm = self._norm(spec.output_norm, weights.output_norm)
        self._output = Linear(weights.output)
        self._all_rows = self._rows = _Rows(N_UBATCH, spec)
        self._n_prepared = 0  # rows that the blocks' calls are for
        torch.set_num_threads(n_threads)

    def _norm(self, norm: Norm, gain: torch.Tensor) -> RmsNorm:
        return RmsNorm(gain, norm.epsilon, added_scale=self.spec.blocks[-1].residual_scale)

    def start(self, options: CacheOptions, n_ctx: int) -> "NativeContext":
        """See Backend."""
        cache = CpuCache(self._plans.heads, options, n_ctx)
        return self.start_with(cache, CpuAttention(self._pool, cache, self._plans.layers(options, n_ctx)))

    def start_with(self, cache: Cache, attention: Attention, n_ubatch: int = N_UBATCH) -> "NativeContext":
        """A context with a cache and an attention of one's own; `n_ubatch`: the most tokens of a step."""
        return NativeContext(self, cache, attention, n_ubatch)

    def run_blocks(self, tokens: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Hidden states float32 [n, n_embd] after all blocks and the output norm, of int64 `tokens` [n].

        The attention's step has begun, and this thread holds `lock`.
        """
        n, pool = len(tokens), self._pool
        self._prepare_calls(n)
        x = self._rows.x.array
        x[:] = F.embedding(tokens, self._embedding)
        if self.spec.embedding_scale != 1:
            x *= self.spec.embedding_scale
        for layer, block in enumerate(self._blocks):
            pool.run(block.before_attention)
            attention.run(layer, block.qkv, block.attended)
            pool.run(block.after_attention)
        hidden = torch.empty((n, self.spec.n_embd))
        pool.run([self._output_norm.call(pool, self._rows.x, self._rows.added, FloatRows(hidden))])
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [n, n_vocab] from run_blocks' hidden states [n, n_embd]."""
        logits = torch.empty((len(hidden), self.n_vocab))
        self._pool.run([self._output.call(self._pool, FloatRows(hidden), FloatRows(logits))])
        if self.spec.logit_scale != 1:
            logits.numpy()[...] *= np.float32(self.spec.logit_scale)  # one thread: torch would wake all of them
        return logits

    def _prepare_calls(self, n: int) -> None:
        """Make the blocks' calls for `n` rows, where the last ones were for another number."""
        if n == self._n_prepared:
            return
        self._n_prepared = 0  # until all are made: an interrupt may come between them
        if n > self._all_rows.n:
            self._all_rows = _Rows(n, self.spec)
        self._rows = self._all_rows.first(n)
        for block in self._blocks:
            block.prepare(self._pool, self._rows)
        self._n_prepared = n


class NativeContext:
    """cache.protocol.Context of a NativeModel."""

    def __init__(self, model: NativeModel, cache: Cache, attention: Attention, n_ubatch: int):
        self.model, self.cache, self.attention, self._n_ubatch = model, cache, attention, n_ubatch
        self._in_use = threading.Lock()

    @torch.inference_mode()
    def forward(self, tokens: list[int], n_logits: int = 1) -> torch.Tensor:
        """See Context."""
        with exclusive(self._in_use):
            first = check_fits(self.cache, tokens)
            ids = torch.tensor(tokens)
            tail = []
            with self.model.lock:
                for start in range(0, len(tokens), self._n_ubatch):
                    part = ids[start : start + self._n_ubatch]
                    self.attention.begin(len(part), first + start + len(part))
                    hidden = self.model.run_blocks(part, self.attention)
                    skip = len(tokens) - n_logits - start  # of this part's rows, those that no one asked logits for
                    if skip < len(part):
                        tail.append(self.model.logits(hidden[max(skip, 0) :]))
            logits = torch.cat(tail) if len(tail) > 1 else tail[0]
            check_finite(logits)
            self.cache.n_tokens = first + len(tokens)
            return logits
