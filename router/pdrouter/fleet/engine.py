"""One vLLM engine as the router knows it."""

from enum import StrEnum
from urllib.parse import urlsplit


class Role(StrEnum):
    """What an engine is used for."""

    PREFILL = "prefill"
    DECODE = "decode"


class Engine:
    """An engine: where it is, whether it answers, how much this router gave it to do.

    `models` maps each model name that the engine serves to what it loads (vLLM's `root`): aliases of one model share
    it, an adapter has its own. Empty until the engine was asked.
    """

    __slots__ = ("authority", "healthy", "host", "in_flight", "models", "port", "role", "url")

    def __init__(self, url: str, role: Role) -> None:
        parts = urlsplit(url)
        self.url = url
        self.role = role
        self.host = parts.hostname or ""
        self.port = parts.port or 80
        self.authority = parts.netloc.encode()
        self.healthy = False
        self.in_flight = 0
        self.models: dict[str, str] = {}

    @property
    def model(self) -> str | None:
        """The first name it serves, or None before it was asked."""
        return next(iter(self.models), None)

    def same_model(self, asked: str, answered: str) -> bool:
        """Whether two names mean one model to this engine; unknown names mean only themselves."""
        return asked == answered or self.models.get(asked, asked) == self.models.get(answered, answered)
