"""One vLLM engine as the router knows it."""

from enum import StrEnum
from math import inf
from time import monotonic
from urllib.parse import urlsplit


class Role(StrEnum):
    """What an engine is used for."""

    PREFILL = "prefill"
    DECODE = "decode"


class Engine:
    """An engine: where it is, whether it answers, how much it has to do.

    `name` is its identity for hash policies: the URL, or the pod's name, which outlives a restart. `models` maps each
    model name that the engine serves to what it loads (vLLM's `root`): aliases of one model share it, an adapter has
    its own. Empty until the engine was asked. `failures` counts legs that failed in a row (`pdrouter.fleet.breaker`)
    and is load until `blamed_until` (`time.monotonic`), `answered` and `failed` count all legs. `gone` is true of an
    engine that left the fleet, which never comes back: its successor is another object. `cached` and `uncached` add up
    the tokens of the prompts it was given, as the policy predicted. `heard` counts reads from its connections, `worked`
    those that answered requests of clients, `heard_then` and `heard_before` are what `heard` was at the last looks.
    What `group` says tells which engines can exchange KV blocks (`Fleet.compatible`). `suspected` is when its prefix
    cache was last thought to hold KV of other prompts, microseconds of the wall clock, 0 for never (`Pool.suspect`).

    The load row: `in_flight`, `queued_tokens` and `held_tokens` are what this process gave it to do, `elsewhere` what
    the router's other processes did (`pdrouter.fleet.rows`), `waiting`, `running` and `kv_usage` what its metrics said
    at `scraped_at` (`time.monotonic`).
    """

    __slots__ = (
        "answered", "authority", "blamed_until", "block_size", "cached", "elsewhere", "failed", "failures", "gone",
        "group", "healthy", "heard", "heard_before", "heard_then", "host", "kv_tokens", "kv_usage", "leaving",
        "longest_context", "models", "name", "own_coming", "own_held", "own_in_flight", "own_pinned",
        "own_queued", "port", "role", "running", "scraped_at", "suspected", "uncached", "url", "version", "waiting",
        "worked",
    )  # fmt: skip

    def __init__(self, url: str, role: Role, name: str | None = None) -> None:
        parts = urlsplit(url)
        self.url = url
        self.name = name or url
        self.role = role
        self.host = parts.hostname or ""
        self.port = parts.port or 80
        self.authority = parts.netloc.encode()
        self.healthy = False
        self.leaving = self.gone = False
        self.blamed_until = -inf
        self.failures = self.answered = self.failed = 0
        self.cached = self.uncached = self.suspected = 0
        self.models: dict[str, str] = {}
        self.own_in_flight = self.own_queued = self.own_held = self.own_coming = self.own_pinned = 0
        self.elsewhere = (0, 0, 0, 0)
        self.waiting = self.running = self.kv_usage = 0.0
        self.kv_tokens = self.block_size = self.longest_context = 0
        self.heard = self.heard_then = self.heard_before = self.worked = 0
        self.version = self.group = ""
        self.scraped_at = -inf

    @property
    def quiet(self) -> bool:
        """Whether it has sent nothing for a quarter of a second or longer (`pdrouter.fleet.stall`)."""
        return self.heard == self.heard_before

    @property
    def in_flight(self) -> int:
        """Requests that the router gave it and that are not over, and for a while those that it failed in a row.

        An engine that fails at once has nothing to do; were failures no load, it would be given everything. Were they
        load until it answers, one that is well again would not be asked and so could not answer.
        """
        given = self.given
        return given + self.failures if self.failures and monotonic() < self.blamed_until else given

    @property
    def given(self) -> int:
        """Requests that the router gave it and that are not over."""
        return self.own_in_flight + self.elsewhere[0]

    @property
    def queued_tokens(self) -> int:
        """Uncached prompt tokens of requests whose prefill has not ended."""
        return self.own_queued + self.elsewhere[1]

    @property
    def held_tokens(self) -> int:
        """Tokens that requests which are not over hold or will hold: prompts, on decode also predicted answers."""
        return self.own_held + self.own_coming + self.elsewhere[2]

    @property
    def pinned_tokens(self) -> int:
        """Tokens of finished prefills, in whole blocks, that wait to be fetched (`pdrouter.handoff.ledger`)."""
        return self.own_pinned + self.elsewhere[3]

    @property
    def metrics_age(self) -> float:
        """Seconds since its metrics were read."""
        return monotonic() - self.scraped_at

    @property
    def salt(self) -> str:
        """By which it finds nothing that it has cached until it was suspected; empty when it never was."""
        return f"pd-router-{self.suspected:x}" if self.suspected else ""

    @property
    def model(self) -> str | None:
        """The first name it serves, or None before it was asked."""
        return next(iter(self.models), None)

    def same_model(self, asked: str, answered: str) -> bool:
        """Whether two names mean one model to this engine; unknown names mean only themselves."""
        return asked == answered or self.models.get(asked, asked) == self.models.get(answered, answered)
