"""The forward pass of a Llama-like model on a GPU: matrices by torch, packing and attention as cuda_attention.py says.

Numbers: weights in f16 (a bf16 weight becomes one exactly, unless it is below 2^-14, where it moves by at most 2^-25),
inputs of products rounded to f16, sums and all that stands between products in float32. A decode step is captured in a
CUDA graph once for each bound of the attention, and replayed as the context grows.
"""

from dataclasses import fields, replace

import torch
import torch.nn.functional as F

from ksort_gguf import native_cuda
from ksort_gguf.errors import KsortError
from ksort_gguf.families import Family, Geometry
from ksort_gguf.families.rope import frequencies
from ksort_gguf.plan.kplan import KPlan
from ksort_gguf.runtime.cuda_attention import FloatAttention, PackedAttention, Waves
from ksort_gguf.runtime.cuda_cache import CudaCache
from ksort_gguf.runtime.cuda_device import memory_errors
from ksort_gguf.runtime.kv_cache import CacheOptions
from ksort_gguf.runtime.model import check_finite, does_not_fit, layer_tables
from ksort_gguf.runtime.weights import LayerWeights, ModelWeights

N_UBATCH = 2048  # tokens that go through the layers together
PRODUCTS = torch.float16  # type of matrices and of what they multiply

# What SwiGLU makes may be beyond f16's 65504 in models made for bf16: it is divided by 64 before the product and
# multiplied after. Values below 2^-8 are then subnormal and move by up to 2^-19, less than their row's larger ones do.
_SWIGLU_SCALE = 2.0**-6


class CudaModel:
    """Weights of a family, folded or stock, on `device`. What runtime/model.py's Model offers, `start` above all.

    `use_graph`, which may be set anew at any time: whether decode steps are replayed from a CUDA graph. `device` may be
    "cpu", for tests, without a graph. Raises KsortError where the GPU's memory is too small, or a weight is beyond f16.
    """

    def __init__(
        self, weights: ModelWeights, family: Family, geometry: Geometry, plan: KPlan | None, n_threads: int = 1,
        device: str = "cuda", use_graph: bool = True,
    ):  # fmt: skip
        self.geometry, self.n_vocab, self.n_threads = geometry, weights.output.shape[0], n_threads
        self.device, self.use_graph = torch.device(device), use_graph
        self._plan = plan
        torch.set_num_threads(n_threads)  # for what is done with logits, which come to the CPU
        torch.backends.cuda.enable_cudnn_sdp(False)  # it compiles for each new length: prompts would wait for that
        self._theta = frequencies(geometry, None if weights.rope_factors is None else weights.rope_factors.numpy())
        self._ropes = [layer_tables(family, geometry, plan, layer) for layer in range(geometry.n_layers)]
        with memory_errors("the model's weights"):
            self._embedding = self._matrix(weights.embedding)
            tied = weights.output is weights.embedding
            self._output = self._embedding if tied else self._matrix(weights.output)
            self._output_norm = weights.output_norm.to(self.device)
            self._layers = [self._moved(layer) for layer in weights.layers]

    def start(self, options: CacheOptions, n_ctx: int) -> "CudaSequence":
        """A new, empty sequence of at most `n_ctx` tokens. Raises KsortError for options that the GPU does not run."""
        cache = CudaCache(self.geometry, options, n_ctx, self.device)
        with memory_errors(f"a context of {n_ctx} tokens"):
            return CudaSequence(self, cache)

    def attention(
        self, cache: CudaCache, n_cached: torch.Tensor, status: torch.Tensor
    ) -> PackedAttention | FloatAttention:
        """Attention over `cache`. n_cached, status: int32 [1] each, tokens before a step and what kernels found."""
        waves = Waves(self._theta, cache.n_ctx, self.device)
        if cache.is_packed:
            n_ubatch = min(N_UBATCH, cache.n_ctx)
            return PackedAttention(cache, self._ropes, self._plan, waves, n_cached, status, n_ubatch)
        return FloatAttention(cache, self._ropes, waves, n_cached)

    def logits(self, tokens: torch.Tensor, attention: PackedAttention | FloatAttention, n_logits: int) -> torch.Tensor:
        """float32 [n_logits, n_vocab] of the last tokens of int64 `tokens` [n]; the attention's step has begun."""
        x = F.embedding(tokens, self._embedding).float()
        for layer, w in enumerate(self._layers):
            qkv = _product(self._norm(x, w.attn_norm), w.qkv)
            if w.qkv_bias is not None:
                qkv += w.qkv_bias
            x += _product(attention.run(layer, qkv), w.attn_output)
            if w.attn_output_bias is not None:
                x += w.attn_output_bias
            gate, up = _product(self._norm(x, w.ffn_norm), w.gate_up).chunk(2, dim=1)
            activated = F.silu(gate).mul_(up).mul_(_SWIGLU_SCALE)
            x.add_(_product(activated, w.down), alpha=1 / _SWIGLU_SCALE)
        return _product(self._norm(x[len(x) - n_logits :], self._output_norm), self._output)

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.geometry.n_embd,), gain, self.geometry.rms_epsilon)

    def _matrix(self, weight: torch.Tensor) -> torch.Tensor:
        matrix = weight.to(self.device).to(PRODUCTS)
        if not torch.isfinite(matrix).all():
            raise KsortError("a weight is beyond f16's 65504, which the GPU's products take: run the model on the CPU")
        return matrix

    def _moved(self, layer: LayerWeights) -> LayerWeights:
        tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
        return replace(
            layer,
            **{
                name: self._matrix(tensor) if tensor.ndim == 2 else tensor.to(self.device)
                for name, tensor in tensors.items()
                if tensor is not None
            },
        )


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T as float32 [n, n_out], from x [n, n_in] rounded to the weight's type and W [n_out, n_in]."""
    x = x.to(weight.dtype)
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()  # the CPU has no such product; the same numbers


class CudaSequence:
    """A model running one sequence of tokens on the GPU: what runtime/model.py's Sequence offers."""

    def __init__(self, model: CudaModel, cache: CudaCache):
        self.model, self.cache = model, cache
        self._token = torch.zeros(1, dtype=torch.int64, device=model.device)
        self._n_cached, self._status = (torch.zeros(1, dtype=torch.int32, device=model.device) for _ in range(2))
        self._attention = model.attention(cache, self._n_cached, self._status)
        self._graphs: dict[int, _DecodeGraph] = {}  # by bound

    @torch.inference_mode()
    def forward(self, tokens: list[int], n_logits: int = 1) -> torch.Tensor:
        """Append `tokens`; logits float32 [n_logits, n_vocab] of the last `n_logits` of them, in CPU memory.

        Raises KsortError where the tokens do not fit the context or the model's arithmetic overflowed; the cache then
        holds what it held before.
        """
        first, n = self.cache.n_tokens, len(tokens)
        if first + n > self.cache.n_ctx:
            raise does_not_fit(first + n, self.cache.n_ctx)
        if not tokens:
            raise ValueError("no tokens")
        with memory_errors(f"a prompt of {n} tokens"):
            logits = self._decode(first, tokens[0]) if n == 1 else self._prompt(first, tokens, n_logits)
        if status := int(self._status):
            self._status.zero_()
            native_cuda.check_status(status)
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
            self._attention.begin(len(part), first + start + len(part))
            logits = self.model.logits(part, self._attention, max(wanted, 1))
            if wanted > 0:
                tail.append(logits.cpu())
        return torch.cat(tail) if len(tail) > 1 else tail[0]

    def _decode(self, first: int, token: int) -> torch.Tensor:
        self._token.fill_(token)
        self._n_cached.fill_(first)
        bound = self._attention.bound(first + 1)
        if not self.model.use_graph:
            return self._step(bound).cpu()
        if bound not in self._graphs:
            self._graphs[bound] = _DecodeGraph(lambda: self._step(bound))
        return self._graphs[bound].replay().cpu()

    def _step(self, bound: int) -> torch.Tensor:
        self._attention.begin(1, bound)
        return self.model.logits(self._token, self._attention, 1)


class _DecodeGraph:
    """A step captured in a CUDA graph. Its inputs are tensors that stay where they are; so is its result."""

    def __init__(self, step):
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
