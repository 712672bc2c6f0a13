"""Models: what an architecture is (spec.py, families/), where its tensors come from, and three interpreters of it."""
