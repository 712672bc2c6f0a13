"""Qwen2 and Qwen2.5: like Llama with biases on the q, k and v projections."""

import gguf

from ksort_gguf.families.base import Family

QWEN2 = Family(
    name="qwen2",
    arch=gguf.MODEL_ARCH.QWEN2,
    hf_architectures=("Qwen2ForCausalLM",),
    row_order="half",
    biases="required",
)
