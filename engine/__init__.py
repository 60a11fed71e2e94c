"""The engine: a causal language model in memory, LoRA versions on it, and continuous batching over it.

Knows nothing of HTTP, votes or SQLite. Serving and learning both go through here, so both see the same tokens
and the same logprobs.
"""
