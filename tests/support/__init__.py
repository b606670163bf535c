"""What several suites need: real engines and routers as processes, polling, prompts."""
