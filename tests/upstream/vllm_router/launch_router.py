"""Our router behind vllm-router's command line, as vllm-router's own integration tests start it.

They run `python3 -m vllm_router.launch_router FLAGS`, which is this module when the folder above is on PYTHONPATH. The
program that is started is `PD_ROUTER`, by default the workspace's. It runs in those tests' environment, so it needs the
standard library only. What it adds between them and the router:

- `/list_workers`, `/add_worker` and `/remove_worker` on the public port; ours has them on its admin port.
- The port opens when all engines are healthy. vllm-router does not listen before; ours lets requests wait.
- `--worker-urls` become decode engines without a prefill engine, each of which serves requests alone: what the router
  does while all prefill engines are gone.
- A ticket in the answers of prefill engines that give none. The tests' mock worker is no P/D engine: as such real vLLM
  would be misconfigured, and the router refuses to go on.
- Settings that the router does not have are taken and not used, nor is the port of the metrics: `UNUSED`.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

ROUTER = Path(__file__).parents[3] / ".venv" / "bin" / "pd-router"
UNUSED = (
    "--prometheus-port", "--worker-startup-check-interval", "--worker-startup-timeout-secs", "--cache-threshold",
    "--balance-abs-threshold", "--balance-rel-threshold", "--retry-max-retries", "--retry-initial-backoff-ms",
    "--retry-max-backoff-ms", "--retry-backoff-multiplier", "--retry-jitter-factor", "--disable-retries",
    "--cb-failure-threshold", "--cb-success-threshold", "--cb-timeout-duration-secs", "--cb-window-duration-secs",
    "--disable-circuit-breaker",
)  # fmt: skip
_ADMIN = frozenset((b"/list_workers", b"/add_worker", b"/remove_worker"))
# What ends a connection: either end, or this program's own end.
_ENDS = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TICKET = {
    "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "mock", "remote_request_id": "mock",
    "remote_block_ids": [[1]], "remote_host": "127.0.0.1", "remote_port": 5600, "tp_size": 1,
}  # fmt: skip


def _bound(host: str, port: int) -> socket.socket:
    """Bind a port without listening: nobody else gets it, and clients are refused."""
    taken = socket.socket()
    taken.bind((host, port))
    return taken


def _free_ports(host: str, count: int) -> list[int]:
    """Find ports below those that systems give to outgoing connections, which take one at any moment."""
    free: list[socket.socket] = []
    while len(free) < count:
        with suppress(OSError):
            free.append(_bound(host, random.randrange(20_000, 32_000)))
    ports = [one.getsockname()[1] for one in free]
    for one in free:
        one.close()
    return ports


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(*_ENDS):
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
        writer.write_eof()


class Front:
    """The one port that vllm-router's tests know. A connection's first request decides where all of it goes."""

    def __init__(self, host: str, public: str, admin: str) -> None:
        self._host = host
        self._public = public
        self._admin = admin

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection."""
        with suppress(*_ENDS):
            line = await reader.readline()
            path, _, query = line.partition(b" ")[2].partition(b" ")[0].partition(b"?")
            if path == b"/add_worker" and query and b"role=" not in query:
                line = line.replace(query, query + b"&role=decode")
            to, out = await asyncio.open_connection(self._host, self._admin if path in _ADMIN else self._public)
            out.write(line)
            await asyncio.gather(_copy(reader, out), _copy(to, writer))
            out.close()
        writer.close()


class Ticketing:
    """Stands before a prefill engine; adds a ticket to an answer that has none, and the name of the model asked for."""

    def __init__(self, engine: str) -> None:
        parts = urlsplit(engine)
        self._host, self._port = parts.hostname, parts.port

    async def start(self, host: str) -> str:
        """Listen; give the URL."""
        server = await asyncio.start_server(self._serve, host, 0)
        return f"http://{host}:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        out = None
        with suppress(*_ENDS):
            to, out = await asyncio.open_connection(self._host, self._port)
            while True:
                head, asked = await self._message(reader)
                out.write(head + asked)
                head, answer = await self._message(to)
                if b"do_remote_decode" in asked and head.startswith(b"HTTP/1.1 200"):
                    told = json.loads(answer)
                    if not told.get("kv_transfer_params"):
                        told |= {"kv_transfer_params": _TICKET, "model": json.loads(asked).get("model")}
                    answer = json.dumps(told).encode()
                    head = _LENGTH.sub(b"content-length: %d" % len(answer), head)
                writer.write(head + answer)
                await writer.drain()
        writer.close()
        if out is not None:
            out.close()

    @staticmethod
    async def _message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        return head, await reader.readexactly(int(length[1]) if length else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm_router.launch_router", allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--worker-urls", nargs="*", default=[])
    parser.add_argument("--prefill", nargs="+", action="append", default=[])
    parser.add_argument("--decode", action="append", default=[])
    for flag in UNUSED:
        parser.add_argument(flag, nargs="?")
    return parser


def _wait(router: asyncio.subprocess.Process, admin: str, count: int) -> None:
    """Wait until all engines are healthy, or until the router has ended."""
    while router.returncode is None:
        with suppress(OSError), urlopen(f"{admin}/list_workers", timeout=5) as answer:
            workers = json.load(answer)["workers"]
            if len(workers) == count and all(one["healthy"] for one in workers):
                return
        time.sleep(0.05)


async def run(argv: Sequence[str]) -> int:
    """Start the router, open the port, wait for the router's end; give its exit status."""
    told, rest = _parser().parse_known_args(argv)
    host = told.host
    front = _bound(host, told.port)
    public, admin, metrics = map(str, _free_ports(host, 3))
    command = [os.environ.get("PD_ROUTER", str(ROUTER)), "--host", host, "--port", public, "--admin-host", host]
    command += ["--admin-port", admin, "--prometheus-port", metrics, "--drain-timeout-secs", "1"]
    for engine, *_ in told.prefill:
        command += ["--prefill", await Ticketing(engine).start(host)]
    decodes = told.decode + told.worker_urls
    for engine in decodes:
        command += ["--decode", engine]
    router = await asyncio.create_subprocess_exec(*command, *rest)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, router.terminate)
    await asyncio.to_thread(_wait, router, f"http://{host}:{admin}", len(told.prefill) + len(decodes))
    if router.returncode is None:
        await asyncio.start_server(Front(host, public, admin).serve, sock=front)
    return await router.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1:])))
