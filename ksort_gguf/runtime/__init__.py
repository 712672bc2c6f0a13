"""The runner: folded weights, packed KV cache, sampling, text."""
