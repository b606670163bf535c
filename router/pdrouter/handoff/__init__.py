"""Prefill, ticket, decode."""
