"""Running a model for a user: tokenizer, sampling, sessions, chat, and the public LLM."""
