"""Stands where vllm-router's tests look for vllm-router."""
