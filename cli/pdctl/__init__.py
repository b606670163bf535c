"""The command line of a P/D-disaggregated vLLM deployment."""
