"""HTTP/1.1 towards engines: pool, protocol, deadlines."""
