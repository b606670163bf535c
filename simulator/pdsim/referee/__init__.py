"""Judges a prefill/decode router by what clients and engines see of it: engines, cases, a scorecard."""
