"""Evaluations by lm_eval."""
