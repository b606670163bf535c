"""Simulated vLLM engines that tell the truth about KV transfer and time."""
