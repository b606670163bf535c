"""Engines and their load."""
