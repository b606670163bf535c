"""Engines and routers as real processes on loopback addresses of their own."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Any, Self

import httpx

_addresses = itertools.count(1)


def new_address() -> str:
    """Give a loopback address that no other test process of this machine uses."""
    third, last = divmod(os.getpid() // 100 * 1000 + next(_addresses), 250)
    return f"127.{100 + os.getpid() % 100}.{third % 250 + 1}.{last + 1}"


def until(condition: Callable[[], Any], seconds: float = 20.0, what: str = "") -> Any:
    """Poll until the condition is true; fail with `what` when it never is."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.02)


@dataclass
class Process:
    """A program of this workspace, its address and its log."""

    command: list[str]
    url: str
    health: str = "/health"
    process: subprocess.Popen[bytes] = field(init=False)
    log: IO[bytes] = field(init=False)

    def start(self) -> Self:
        """Start it without waiting."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 closed by stop()
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=subprocess.STDOUT)
        return self

    def ready(self) -> bool:
        """Whether it answers; fails with its log when it has ended."""
        if self.process.poll() is not None:
            raise AssertionError(f"{self.command} ended with {self.process.returncode}:\n{self.output()}")
        try:
            return httpx.get(self.url + self.health, timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def output(self) -> str:
        """Everything it printed."""
        self.log.seek(0)
        return self.log.read().decode()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it and give its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.log.close()
        return status

    def __enter__(self) -> Self:
        """Start it and wait until it answers."""
        self.start()
        until(self.ready, 60, f"{self.url} answers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def get(self, path: str) -> Any:
        """Get JSON."""
        return httpx.get(self.url + path, timeout=30).json()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Post JSON."""
        return httpx.post(self.url + path, json=body, timeout=options.pop("timeout", 60), **options)


def engine(role: str, *flags: str, model: str = "tiny") -> Process:
    """Make a simulated engine on an address of its own, not started."""
    host, port = new_address(), {"prefill": 8000, "decode": 8200, "both": 8300}[role]
    command = [sys.executable, "-m", "pdsim.engine", "--role", role, "--host", host, "--port", str(port)]
    return Process([*command, "--model", model, "--seed", "1", *flags], f"http://{host}:{port}")


def start_all(processes: list[Process]) -> None:
    """Start processes side by side and wait for all."""
    for one in processes:
        one.start()
    for one in processes:
        until(one.ready, 60, f"{one.url} answers")


def router(prefills: list[Process], decodes: list[Process], *flags: str) -> Process:
    """Make a router in front of engines, not started; its metrics are on port 29000 of the same address."""
    host = new_address()
    command = [sys.executable, "-m", "pdrouter", "--vllm-pd-disaggregation", "--host", host, "--port", "10001"]
    command += ["--prometheus-host", host, "--prometheus-port", "29000"]
    command += [part for one in prefills for part in ("--prefill", one.url)]
    command += [part for one in decodes for part in ("--decode", one.url)]
    return Process([*command, *flags], f"http://{host}:10001", "/ready")
