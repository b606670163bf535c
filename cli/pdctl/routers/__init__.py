"""Routers that can stand before the same engines: ours, vllm-router, llm-d's stack."""
