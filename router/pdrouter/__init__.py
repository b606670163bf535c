"""A router for vLLM with prefill and decode on separate engines."""
