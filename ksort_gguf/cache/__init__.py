"""The KV cache of a running context, and attention over it: on the CPU, and on a GPU."""
