"""What a request means: routing key, legs, splitting a batch, merging answers."""
