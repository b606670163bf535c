"""What is known of one client request when it is over."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter


@dataclass(slots=True)
class Record:
    """Filled while a request is served, read once at its end. Times are `perf_counter` seconds.

    `generation` tells requests for text from those for anything else; only they count as pairs.
    """

    request_id: str
    path: str
    reason: str = ""
    generation: bool = False
    started: float = field(default_factory=perf_counter)
    status: int = 0
    prefill: list[str] = field(default_factory=list)
    decode: list[str] = field(default_factory=list)
    prefill_seconds: float | None = None
    ticket_at: float | None = None
    decode_sent_at: float | None = None
    first_byte_at: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error_leg: str | None = None
    error_reason: str | None = None

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
