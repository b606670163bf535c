"""A deployment on Kubernetes: the API, Helm, preflight checks, the lock, evidence. Commands reach it by a target."""
