"""Sources of engines, against a DNS server and a Kubernetes API on loopback."""
