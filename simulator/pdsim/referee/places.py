"""Addresses for engines and the router under test."""

import itertools
import os
import socket

_LOW_PORT = 18000  # below the range that systems use for outgoing connections


def free(host: str, port: int) -> bool:
    """Whether an address can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


class Places:
    """Gives each process an address that it can come back to after it was killed.

    Each gets a loopback address of its own where the system has more than one (Linux), else ports of 127.0.0.1.
    """

    def __init__(self) -> None:
        pid = os.getpid()
        self._network = f"127.{200 + pid % 50}.{pid // 50 % 250 + 1}"
        self._hosts = itertools.count(1)
        self._ports = itertools.count(_LOW_PORT)
        self._many = free(f"{self._network}.1", 0)

    def host(self) -> str:
        """Give an address for one process."""
        return f"{self._network}.{next(self._hosts)}" if self._many else "127.0.0.1"

    def port(self, wished: int) -> int:
        """Give a port on the address given last; the wished one where addresses are plenty."""
        if self._many:
            return wished
        return next(port for port in self._ports if free("127.0.0.1", port))
