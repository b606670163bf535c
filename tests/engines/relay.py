"""A TCP relay before one engine that can break an answer at a chosen event, which killing the engine cannot hit."""

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

from support.processes import new_address

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing resets, as the kernel does for a killed process


class Cuts:
    """Where to break the next answers to POSTs; relays of several engines may share it."""

    def __init__(self) -> None:
        self.made = 0
        self._asked: list[int] = []
        self._lock = threading.Lock()

    def after(self, events: int) -> None:
        """Reset the connection of the next answer behind so many events; 0: when its first byte comes."""
        with self._lock:
            self._asked.append(events)

    def next(self) -> int | None:
        """Take the next one."""
        with self._lock:
            return self._asked.pop(0) if self._asked else None

    def done(self) -> None:
        """One was made."""
        with self._lock:
            self.made += 1


class Relay:
    """Passes bytes on between clients and an engine; `url` stands for the engine's."""

    def __init__(self, target: str, cuts: Cuts) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = host, int(port)
        self._listening = socket.create_server((new_address(), int(port)))
        self.url = "http://{}:{}".format(*self._listening.getsockname())
        self._cuts = cuts
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._listening.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            try:
                engine = socket.create_connection(self._target, 5)
            except OSError:
                client.close()
                continue
            engine.settimeout(None)
            _Pass(self._cuts, client, engine).start()


class _Pass:
    """One connection of a client and the one to the engine that belongs to it."""

    def __init__(self, cuts: Cuts, client: socket.socket, engine: socket.socket) -> None:
        self._cuts = cuts
        self._client = client
        self._engine = engine
        self._cut: int | None = None

    def start(self) -> None:
        for run in (self._requests, self._answers):
            threading.Thread(target=run, daemon=True).start()

    def _requests(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._client.recv(65536):
                if data.startswith(b"POST "):
                    self._cut = self._cuts.next()
                self._engine.sendall(data)
        self._close()

    def _answers(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._engine.recv(65536):
                if self._cut is not None:
                    passed, self._cut = _until(data, self._cut)
                    if self._cut == 0:
                        self._client.sendall(passed)
                        self._cuts.done()
                        for one in (self._client, self._engine):
                            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                        break
                self._client.sendall(data)
        self._close()

    def _close(self) -> None:
        for one in (self._client, self._engine):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _until(data: bytes, events: int) -> tuple[bytes, int]:
    """Give what of the data comes before the end of so many events, and how many are still to come."""
    end = 0
    while events > 0:
        found = data.find(b"\n\n", end)
        if found < 0:
            return data, events
        end = found + 2
        events -= 1
    return data[:end], 0
