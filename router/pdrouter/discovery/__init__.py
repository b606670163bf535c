"""Which engines there are: sources that watch DNS or Kubernetes and report what they find."""
