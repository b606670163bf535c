"""HTTP/1.1 towards clients: parse, answer, flow control, limits."""
