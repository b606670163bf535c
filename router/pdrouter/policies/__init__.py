"""Pure choices: (request, engines) -> engine. One module a policy."""
