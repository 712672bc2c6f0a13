"""torch's interpreter of a spec: what a block computes, with attention as a hook, for GPUs and for calibration.

On a GPU, weights are in f16 (a bf16 weight becomes one exactly, unless it is below 2^-14, where it moves by at most
2^-25), inputs of products rounded to f16, sums and all that stands between products in float32. Calibration runs in
float32. A decode step is captured in a CUDA graph once for each bound of the attention, and replayed as the context
grows.
"""

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from ksort_gguf.binding.cuda import check_status
from ksort_gguf.binding.rows import FloatRows
from ksort_gguf.cache.cuda import CudaCache
from ksort_gguf.cache.cuda_attention import cuda_attention
from ksort_gguf.cache.cuda_device import memory_errors
from ksort_gguf.cache.exclusive import exclusive
from ksort_gguf.cache.protocol import Attention, CacheOptions
from ksort_gguf.errors import DeviceError
from ksort_gguf.kvplan import KVPlan
from ksort_gguf.models.context import check_finite, check_fits
from ksort_gguf.models.layers import LayerPlans, RopeFactors
from ksort_gguf.models.spec import Block, ModelSpec, Norm
from ksort_gguf.models.weights import BlockWeights, ModelWeights

N_UBATCH = 2048  # tokens that go through the layers together

# What SwiGLU makes may be beyond f16's 65504 in models made for bf16: it is divided by 64 before the product and
# multiplied after. Values below 2^-8 are then subnormal and move by up to 2^-19, less than their row's larger ones do.
_SWIGLU_SCALE = 2.0**-6


class Arithmetic(Protocol):
    """How matrix products are made. x [n, n_in] and results are float32; weight [n_out, n_in], bias float32 [n_out]."""

    dtype: torch.dtype  # of matrices
    rows_at_once: int  # that go through an MLP together

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias."""

    def add_product(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> None:
        """total += scale (x W^T + bias)."""

    def add_wide_product(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: float) -> None:
        """total += scale x W^T, where x, which may change, may be large."""


class Float32:
    """Products in float32, for calibration."""

    dtype, rows_at_once = torch.float32, 512

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def add_product(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> None:
        total.add_(F.linear(x, weight, bias), alpha=scale)

    def add_wide_product(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: float) -> None:
        self.add_product(total, x, weight, None, scale)


class Float16Products:
    """Inputs rounded to the weight's type, sums in float32."""

    dtype, rows_at_once = torch.float16, N_UBATCH

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = x.to(weight.dtype)
        # the CPU has no such product; the same numbers
        y = torch.mm(x, weight.t(), out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().t()
        return y if bias is None else y.add_(bias)

    def add_product(
        self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float
    ) -> None:
        total.add_(self.product(x, weight), alpha=scale)
        if bias is not None:
            total.add_(bias, alpha=scale)

    def add_wide_product(self, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: float) -> None:
        total.add_(self.product(x.mul_(_SWIGLU_SCALE), weight), alpha=scale / _SWIGLU_SCALE)


def run_block(
    block: Block, w: BlockWeights, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor], how: Arithmetic
) -> None:
    """Put float32 x [n, n_embd] through a block, in place.

    attend: float32 [n, n_heads * head_dim] from qkv [n, (n_heads + 2 n_kv_heads) * head_dim], before RoPE.
    """
    qkv = project(block, w, x, how)
    how.add_product(x, attend(qkv), w.output, w.output_bias, block.residual_scale)
    for part in x.split(how.rows_at_once) if len(x) > how.rows_at_once else (x,):
        gate, up = how.product(_norm(part, block.mlp_norm, w.mlp_norm), w.gate_up).chunk(2, dim=1)
        how.add_wide_product(part, F.silu(gate).mul_(up), w.down, block.residual_scale)


def project(block: Block, w: BlockWeights, x: torch.Tensor, how: Arithmetic) -> torch.Tensor:
    """A block's queries, keys and values before RoPE, float32 [n, (n_heads + 2 n_kv_heads) * head_dim]."""
    a = block.attention
    qkv = how.product(_norm(x, block.attention_norm, w.attention_norm), w.qkv, w.qkv_bias)
    if a.q_norm is None and a.k_norm is None:
        return qkv
    heads = qkv.view(len(x), -1, a.head_dim)
    for norm, gain, start, n_heads in (
        (a.q_norm, w.q_norm, 0, a.n_heads),
        (a.k_norm, w.k_norm, a.n_heads, a.n_kv_heads),
    ):
        if norm is not None and gain is not None:
            part = heads[:, start : start + n_heads]
            part.copy_(_norm(part, norm, gain))
    return qkv


def _norm(x: torch.Tensor, norm: Norm, gain: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (norm.n,), gain, norm.epsilon)


class TorchModel:
    """cache.protocol.Backend on a GPU: the weights of a stock or folded model.

    `use_graph`, which may be set anew at any time: whether decode steps are replayed from a CUDA graph. `device` may be
    "cpu", for tests, without a graph, and `arithmetic` another than Float16Products. Contexts of one model may be used
    from several threads: their steps take turns. Raises DeviceError where the GPU's memory is too small, or a weight is
    beyond f16.
    """

    has_exact_rows = False

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, plan: KVPlan | None, rope_factors: RopeFactors,
        n_threads: int = 1, device: str = "cuda", use_graph: bool = True, arithmetic: Arithmetic | None = None,
    ):  # fmt: skip
        self.spec, self.n_vocab, self.n_threads = spec, spec.n_vocab, n_threads
        self.device, self.use_graph = torch.device(device), use_graph
        self._how = arithmetic or Float16Products()
        self.lock = threading.Lock()
        self._plans = LayerPlans(spec, plan, rope_factors)
        torch.set_num_threads(n_threads)  # for what is done with logits, which come to the CPU
        torch.backends.cuda.enable_cudnn_sdp(False)  # it compiles for each new length: prompts would wait for that
        with memory_errors("the model's weights"):
            self._embedding = self._matrix(weights.embedding)
            tied = weights.output is weights.embedding
            self._output = self._embedding if tied else self._matrix(weights.output)
            self._output_norm = weights.output_norm.to(self.device)
            self._blocks = [self._moved(block) for block in weights.blocks]

    def start(self, options: CacheOptions, n_ctx: int) -> "TorchContext":
        """See Backend."""
        cache = CudaCache(self._plans.heads, options, n_ctx, self.device)
        with memory_errors(f"a context of {n_ctx} tokens"):
            return TorchContext(self, cache, self._plans)

    def logits(self, tokens: torch.Tensor, attention: Attention, n_logits: int) -> torch.Tensor:
        """float32 [n_logits, n_vocab] of the last tokens of int64 `tokens` [n]; the attention's step has begun."""
        x, spec, how = F.embedding(tokens, self._embedding).float(), self.spec, self._how
        if spec.embedding_scale != 1:
            x *= spec.embedding_scale
        widths = {attention.output.n_in for attention in spec.attentions}
        attended = {width: torch.empty((len(x), width), device=x.device) for width in widths}
        rows = {width: FloatRows(out) for width, out in attended.items()}
        for layer, (block, w) in enumerate(zip(spec.blocks, self._blocks, strict=True)):

            def attend(qkv: torch.Tensor, layer: int = layer, width: int = block.attention.output.n_in) -> torch.Tensor:
                attention.run(layer, FloatRows(qkv), rows[width])
                return attended[width]

            run_block(block, w, x, attend, how)
        logits = how.product(_norm(x[len(x) - n_logits :], spec.output_norm, self._output_norm), self._output)
        return logits if spec.logit_scale == 1 else logits.mul_(spec.logit_scale)

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        matrix = weight.to(self.device).to(self._how.dtype)
        if not torch.isfinite(matrix).all():
            raise DeviceError("a weight is beyond f16's 65504, which the GPU's products take: run the model on the CPU")
        return matrix

    def _moved(self, block: BlockWeights) -> BlockWeights:
        tensors = {field.name: getattr(block, field.name) for field in fields(block)}
        return replace(
            block,
            **{
                name: self._matrix(tensor) if tensor.ndim == 2 else tensor.to(self.device)
                for name, tensor in tensors.items()
                if tensor is not None
            },
        )


class TorchContext:
    """cache.protocol.Context of a TorchModel."""

    def __init__(self, model: TorchModel, cache: CudaCache, plans: LayerPlans):
        self.model, self.cache = model, cache
        self._token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._n_cached, self._status = (torch.zeros(1, dtype=torch.int32, device=model.device) for _ in range(2))
        layers = plans.layers(cache.options, cache.n_ctx)
        self.attention = cuda_attention(cache, layers, self._n_cached, self._status, min(N_UBATCH, cache.n_ctx))
        self._graphs: dict[int, _DecodeGraph] = {}  # by bound
        self._in_use = threading.Lock()

    @torch.inference_mode()
    def forward(self, tokens: list[int], n_logits: int = 1) -> torch.Tensor:
        """See Context."""
        with exclusive(self._in_use):
            first, n = check_fits(self.cache, tokens), len(tokens)
            with self.model.lock, memory_errors(f"a prompt of {n} tokens"):
                logits = self._decode(first, tokens[0]) if n == 1 else self._prompt(first, tokens, n_logits)
                if status := int(self._status):
                    self._status.zero_()
                    check_status(status)
            check_finite(logits)
            self.cache.n_tokens = first + n
            return logits

    def _prompt(self, first: int, tokens: list[int], n_logits: int) -> torch.Tensor:
        ids = torch.tensor(tokens, device=self.model.device)
        tail = []
        for start in range(0, len(tokens), N_UBATCH):
            part = ids[start : start + N_UBATCH]
            self._n_cached.fill_(first + start)
            # of this part's rows, those whose logits are asked for; one even where none is, which costs little
            wanted = min(len(part), n_logits - (len(tokens) - start - len(part)))
            self.attention.begin(len(part), first + start + len(part))
            logits = self.model.logits(part, self.attention, max(wanted, 1))
            if wanted > 0:
                tail.append(logits.cpu())
        return torch.cat(tail) if len(tail) > 1 else tail[0]

    def _decode(self, first: int, token: int) -> torch.Tensor:
        self._token.fill_(token)
        self._n_cached.fill_(first)
        bound = self.attention.bound(first + 1)
        if not self.model.use_graph:
            return self._step(bound).cpu()
        if bound not in self._graphs:
            self._graphs[bound] = _DecodeGraph(lambda: self._step(bound))
        return self._graphs[bound].replay().cpu()

    def _step(self, bound: int) -> torch.Tensor:
        self.attention.begin(1, bound)
        return self.model.logits(self._token, self.attention, 1)


class _DecodeGraph:
    """A step captured in a CUDA graph. Its inputs are tensors that stay where they are; so is its result."""

    def __init__(self, step: Callable[[], torch.Tensor]):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what torch sets up on first use cannot be captured
            step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = step()

    def replay(self) -> torch.Tensor:
        """The step's result, valid until the next replay."""
        self._graph.replay()
        return self._result
