"""How long things take on the GPU: a model fitted to measurements."""
