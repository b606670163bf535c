"""The last POST requests as they came in: what a router really sent, headers and bytes."""

import time
from collections import deque
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(slots=True)
class Kept:
    """One request; its body grows while it comes in."""

    at: float
    path: str
    headers: list[tuple[str, str]]
    body: bytearray = field(default_factory=bytearray)


class Requests:
    """The last requests, oldest first; those to `/sim/…` are not among them."""

    def __init__(self, keep: int) -> None:
        self._kept: deque[Kept] = deque(maxlen=keep)

    def kept(self, application: ASGIApp) -> ASGIApp:
        """Give the application, its requests kept from now on."""

        async def keeping(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith("/sim/"):
                await application(scope, receive, send)
                return
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
            one = Kept(time.time(), scope["path"], headers)
            self._kept.append(one)

            async def received() -> Message:
                message = await receive()
                one.body += message.get("body", b"")
                return message

            await application(scope, received, send)

        return keeping

    def listed(self) -> list[dict[str, object]]:
        """Give all; bytes of a body that are no UTF-8 are replaced."""
        return [
            {"at": one.at, "path": one.path, "headers": one.headers, "body": one.body.decode(errors="replace")}
            for one in self._kept
        ]

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
