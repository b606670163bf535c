"""What a request means: routing key, prefill leg, decode leg, what may not be disaggregated."""
