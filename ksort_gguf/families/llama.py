"""Llama 1/2/3, Mistral and SmolLM."""

import gguf

from ksort_gguf.families.base import Family

LLAMA = Family(
    name="llama",
    arch=gguf.MODEL_ARCH.LLAMA,
    hf_architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"),
    row_order="interleaved",
    output_bias=True,
    extra_keys=("vocab_size", "rope.dimension_count"),
)
