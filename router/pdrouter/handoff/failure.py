"""Why a request could not be served, as the client will read it."""

from dataclasses import dataclass

from pdrouter.openai.errors import error_body

JSON_HEADERS = b"content-type: application/json\r\n"


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of a leg that did not succeed.

    `body` is an OpenAI JSON error: the engine's own where it sent one. `leg` is `prefill`, `decode` or `router`;
    `reason` is one word for metrics; `headers` are encoded lines for the client.
    """

    status: int
    body: bytes
    leg: str
    reason: str
    headers: bytes = b""


def leg_failure(status: int, leg: str, reason: str, message: str, headers: bytes = b"") -> Failure:
    """Make a failure of the router's own wording."""
    return Failure(status, error_body(status, message, leg), leg, reason, headers)


def router_failure() -> Failure:
    """Tell that the router itself failed."""
    return leg_failure(500, "router", "router_failure", "The request failed in the router itself; its log tells why.")


def engine_failure(status: int, body: bytes, headers: list[tuple[bytes, bytes]], leg: str, url: str) -> Failure:
    """Make a failure of an engine's answer: its own JSON as it is, anything else wrapped."""
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    if not (kind.startswith(b"application/json") and body):
        text = body[:500].decode("utf-8", "replace").strip()
        told = f": {text}" if text else ""
        status = status if status >= 400 else 502
        body = error_body(status, f"The {leg} engine {url} answered {status}{told}", leg)
    return Failure(status, body, leg, f"status_{status}")
