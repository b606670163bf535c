"""A router in front of the engines, for one measurement: its CPU time and its memory."""

import importlib.metadata
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from types import TracebackType

import httpx
import psutil
from plan import DIRECT, PLAIN, THEIRS, VARIANTS

STARTS = 60.0  # seconds
NGINX = Template(Path(__file__).parent.with_name("nginx.conf").read_text(encoding="utf-8"))


class RouterError(Exception):
    """A router did not start; the message has the end of its log."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Programs:
    """How routers are called.

    Args:
        ours: command of pd-router.
        theirs: command of vllm-router.
        plain: command of nginx.
        logs: folder for their logs.
    """

    ours: str
    theirs: str
    plain: str
    logs: Path


class Router(AbstractContextManager["Router"]):
    """A router process and all it started; ended with the block. `direct` is none at all."""

    def __init__(
        self, name: str, programs: Programs, prefill: Sequence[str], decode: Sequence[str], model: str,
        flags: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Start it and wait until a request came through.

        Args:
            name: one of `plan.ROUTERS`.
            programs: how it is called.
            prefill: URLs of prefill engines.
            decode: URLs of decode engines.
            model: what to ask for.
            flags: further ones.

        Raises:
            RouterError: no request came through.
        """
        self.name = name
        self.metrics: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        if name == DIRECT:
            self.url = decode[0]
            return
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = programs.logs / f"{name.replace(':', '-')}.log"
        if name == PLAIN:
            command = self._nginx(programs, port, decode[0])
        else:
            command = [*self._command(programs, port, prefill, decode), *flags]
        with self.log.open("ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait(model)

    def _nginx(self, programs: Programs, port: int, engine: str) -> list[str]:
        folder = programs.logs.resolve()
        config = folder / "nginx.conf"
        servers = f"server {httpx.URL(engine).netloc.decode()};"
        config.write_text(NGINX.substitute(folder=folder, servers=servers, port=port), encoding="utf-8")
        return [*shlex.split(programs.plain), "-c", str(config)]

    def _command(self, programs: Programs, port: int, prefill: Sequence[str], decode: Sequence[str]) -> list[str]:
        name, metrics_port = self.name, _free_port()
        engines = [part for url in decode for part in ("--decode", url)]
        own = [part if part != "0" else str(_free_port()) for part in VARIANTS.get(name, ())]
        if not name.endswith(":no-prefill"):
            engines += [part for url in prefill for part in ("--prefill", url)]
        command = [*shlex.split(programs.theirs if name == THEIRS else programs.ours), *engines, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--prometheus-port", str(metrics_port), *own]
        if name == THEIRS:  # as its own benchmarks run it
            command += ["--vllm-pd-disaggregation", "--policy", "consistent_hash", "--log-level", "error"]
        else:
            self.metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        return command

    def _wait(self, model: str) -> None:
        assert self._process is not None
        body = {"model": model, "prompt": "w1 w2 w3", "max_tokens": 2, "temperature": 0}
        deadline, last = time.monotonic() + STARTS, "no answer"
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)
                if answer.status_code == 200:
                    return
                last = f"{answer.status_code} {answer.text[:300]}"
            except httpx.HTTPError as error:
                last = str(error)
            time.sleep(0.1)
        self.stop()
        end = self.log.read_text(errors="replace")[-1500:]
        raise RouterError(f"no request came through {self.name} ({last}); {self.log} ends:\n{end}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _family(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def stop(self) -> None:
        """End it and all it started."""
        if self._process is None or self._process.poll() is not None:
            return
        family = self._family()
        self._process.terminate()
        _, left = psutil.wait_procs(family, timeout=5)
        for one in left:
            one.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """User and system time of all its processes so far."""
        return sum(sum(one.cpu_times()[:2]) for one in self._family())

    def resident_mib(self) -> float:
        """Resident memory of all its processes."""
        return float(sum(one.memory_info().rss for one in self._family())) / 2**20

    def compiled(self) -> bool:
        """Whether it is our router with its request path compiled."""
        maps = (mapped.path for one in self._family() for mapped in one.memory_maps())
        return any("__mypyc." in path for path in maps)


def version(package: str) -> str | None:
    """Give the version of a package that this Python has."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
