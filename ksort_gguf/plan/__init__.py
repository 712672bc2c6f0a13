"""Making a KV plan for a model, storing it, and converting with it."""
