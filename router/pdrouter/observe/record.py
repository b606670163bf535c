"""What is known of one client request when it is over."""

from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdrouter.observe.traces import RequestSpan
    from pdrouter.openai.features import Prompt


class Record:
    """Filled while a request is served, read once at its end. Times are `perf_counter` seconds.

    `generation` tells requests for text from those for anything else; only they count as pairs. `retries` counts tries
    with other engines after the first, `continued` those of them that went on with a stream. `generated` counts tokens
    of streams that the router follows, `asked` is the prompt of a request that is to be recorded.
    """

    __slots__ = (
        "asked", "completion_tokens", "continued", "decode", "decode_sent_at", "error_leg", "error_reason",
        "first_byte_at", "generated", "generation",
        "path", "prefill", "prefill_seconds", "prefill_sent_at", "prompt_tokens", "reason", "request_id",
        "retries", "span", "started", "status", "ticket_at",
    )  # fmt: skip

    def __init__(self, request_id: str, path: str, reason: str = "", generation: bool = False) -> None:
        self.request_id = request_id
        self.path = path
        self.reason = reason
        self.generation = generation
        self.started = perf_counter()
        self.status = 0
        self.prefill: list[str] = []
        self.decode: list[str] = []
        self.prefill_sent_at: float | None = None
        self.prefill_seconds: float | None = None
        self.ticket_at: float | None = None
        self.decode_sent_at: float | None = None
        self.first_byte_at: float | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.retries = 0
        self.continued = 0
        self.generated = 0
        self.asked: Prompt | None = None
        self.error_leg: str | None = None
        self.error_reason: str | None = None
        self.span: RequestSpan | None = None

    def first_byte(self) -> None:
        """Note the first byte of an answer; later ones do not count."""
        if self.first_byte_at is None:
            self.first_byte_at = perf_counter()

    def error(self, leg: str, reason: str) -> None:
        """Note what ended the request early."""
        if self.error_leg is None:
            self.error_leg, self.error_reason = leg, reason

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Give (prefill, decode) of each handoff; prefill is `none` where one engine served alone."""
        for number, decode in enumerate(self.decode if self.generation else ()):
            yield (self.prefill[number] if number < len(self.prefill) else "none"), decode
