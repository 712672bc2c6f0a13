"""Measuring: perplexity, KL divergence, speed."""
