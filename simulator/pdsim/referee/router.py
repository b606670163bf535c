"""The router under test: started by a command, or running somewhere already."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Protocol

import httpx
import orjson

from pdsim.referee.bench import COMPLETIONS
from pdsim.referee.engines import MODEL, Fleet, RefereeError, until
from pdsim.referee.peers import command, manifest
from pdsim.referee.places import Places

PORT, METRICS_PORT = 10001, 29000
START_SECONDS = 90.0
AGAIN_SECONDS = 10.0  # for a router that served before the last case


class Router(Protocol):
    """The router under test."""

    url: str
    metrics_urls: tuple[str, ...]

    async def start(self, fleet: Fleet) -> None:
        """See that it serves, in front of these engines."""

    async def stop(self) -> None:
        """End it, if it is ours."""

    def alive(self) -> bool:
        """Whether it runs, as far as that can be seen."""


async def serves(router: Router, client: httpx.AsyncClient, fleet: Fleet, seconds: float) -> bool:
    """Wait until a router answers a request and uses engines of both roles for it; whether it does."""
    numbers = itertools.count()

    async def once() -> bool:
        if not router.alive():
            raise RefereeError("the router ended before it served")
        prompt = f"return over def in {next(numbers)}"
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        with contextlib.suppress(httpx.HTTPError):
            if (await client.post(router.url + COMPLETIONS, json=body, timeout=3)).status_code != 200:
                return False
            # some serve with decode engines alone until they know the prefill engines
            return any([await engine.requests() for engine in fleet.prefills])
        return False

    return bool(await until(once, seconds))


class LaunchedRouter:
    """A router that is started for each fleet by a command."""

    def __init__(self, template: str, program: str, places: Places, client: httpx.AsyncClient) -> None:
        self._template, self._program, self._client = template, program, client
        self._host = places.host()
        self._ports = places.port(PORT), places.port(METRICS_PORT)
        self.url = f"http://{self._host}:{self._ports[0]}"
        self.metrics_urls: tuple[str, ...] = (f"http://{self._host}:{self._ports[1]}/metrics", f"{self.url}/metrics")
        self._process: subprocess.Popen[bytes] | None = None
        self._manifest = tempfile.NamedTemporaryFile(suffix=".json")  # noqa: SIM115 likewise
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 lives as long as the run

    def command(self, fleet: Fleet) -> list[str]:
        """Give the command line in front of some engines."""
        prefills, decodes = [one.url for one in fleet.prefills], [one.url for one in fleet.decodes]
        Path(self._manifest.name).write_bytes(orjson.dumps(manifest(prefills, decodes)))
        values = {
            "prefill_flags": " ".join(f"--prefill {url}" for url in prefills),
            "decode_flags": " ".join(f"--decode {url}" for url in decodes),
            "prefill_urls": ",".join(prefills),
            "decode_urls": ",".join(decodes),
            "host": self._host,
            "port": str(self._ports[0]),
            "metrics_port": str(self._ports[1]),
            "lease_seconds": f"{fleet.plan.lease_seconds:g}",
            "stall_seconds": f"{fleet.plan.stall_seconds:g}",
            "program": self._program,
            "python": sys.executable,
            "manifest": self._manifest.name,
        }
        return command(self._template, values)

    async def start(self, fleet: Fleet) -> None:
        """Start it and wait until it serves.

        Raises:
            RefereeError: it cannot be started, or does not serve in time.
        """
        self._launch(self.command(fleet))
        try:
            if await serves(self, self._client, fleet, START_SECONDS):
                return
        except RefereeError as error:
            raise RefereeError(f"{error}: {self.tail()}") from None
        raise RefereeError(f"the router does not serve within {START_SECONDS:g} s: {self.tail()}")

    def _launch(self, made: list[str]) -> None:
        try:
            self._process = subprocess.Popen(
                made, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise RefereeError(f"cannot start the router: {made[0]}: {error.strerror}") from None

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def tail(self) -> str:
        """The last lines that it printed."""
        self._log.seek(0)
        return " | ".join(self._log.read().decode(errors="replace").splitlines()[-3:]) or "(it printed nothing)"

    async def stop(self) -> None:
        """End it and all that it started."""
        if self._process is None:
            return
        # at once: a router that drains would hold the next case up, and this one is over
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.wait)
        self._process = None


class RunningRouter:
    """A router that runs already; it cannot be started anew."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url.rstrip("/")
        self._client = client
        self.metrics_urls: tuple[str, ...] = (f"{self.url}/metrics",)
        self._seconds = START_SECONDS

    async def start(self, fleet: Fleet) -> None:
        """Wait until it serves.

        Raises:
            RefereeError: it does not.
        """
        if not await serves(self, self._client, fleet, self._seconds):
            raise RefereeError(f"{self.url} does not serve within {self._seconds:g} s, with all engines well")
        self._seconds = AGAIN_SECONDS

    def alive(self) -> bool:
        """It is not ours to know."""
        return True

    async def stop(self) -> None:
        """It is not ours to end."""
