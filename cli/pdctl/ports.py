"""Ports of this machine that nobody has."""

import os

from pdctl.errors import ExitCode, PdctlError
from pdsim.referee.places import free

HOST = "127.0.0.1"
INNER = range(20_000, 28_000)  # below those that systems give to connections


class Ports:
    """Gives out free ports, none of them twice."""

    def __init__(self) -> None:
        self._given: set[int] = set()

    def take(self, wished: int, host: str = HOST) -> int:
        """Give the first free port from one on.

        Raises:
            PdctlError: a thousand are taken.
        """
        for port in range(wished, wished + 1000):
            if port not in self._given and free(host, port):
                self._given.add(port)
                return port
        raise PdctlError(f"no free port from {wished} on", "stop what holds them", ExitCode.PREFLIGHT)

    def inner(self) -> int:
        """Give a free port that nobody needs to know by heart.

        Each process begins somewhere else: what it starts listens seconds later, and others look for ports meanwhile.
        """
        return self.take(INNER.start + os.getpid() * 31 % (len(INNER) - 1000))
