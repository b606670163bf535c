"""A vLLM engine on the wire."""
