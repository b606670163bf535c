"""Record which engines the real vllm-router 0.1.17 chooses, as a golden file for tests/router.

The binary is installed from the package index into a virtual environment of its own, started with
`--policy consistent_hash` in front of fake engines that speak the two-phase NIXL handoff, and asked one request at a
time. The fake engines note who was called and what arrived.

    python scripts/record_decisions.py tests/router/data/decisions.jsonl.gz

Each fleet starts with a line {"prefill": [URL, …], "decode": [URL, …]}; each request of that fleet is a line
{"kind", "path", "headers", "body", "prefill", "decode", "seen"}: `body` is the text sent, `prefill` and `decode` are
places in the fleet's lists, `seen` is the body that the decode engine received without its ticket (only for bodies
without a key: vllm-router hashes the text it forwards, not the text it got).
The addresses are fixed (127.77.0.0/16) because the ring is made of URLs.
"""

import argparse
import asyncio
import gzip
import json
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

VERSION = "0.1.17"
ROUTER = ("127.77.255.1", 10001)
FLEETS = ((8, 8), (1, 1), (2, 3), (5, 4), (16, 16), (3, 13))
WORDS = "return over def in class brown quick dog dict value import the lazy fox list jumps self range print os".split()
WITHOUT_KEY = {"no_key", "no_key_fields", "null_user"}
TICKET = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1]],
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}


def install(where: pathlib.Path) -> pathlib.Path:
    """Install vllm-router into a virtual environment; give its launcher."""
    launcher = where / "bin" / "vllm-router"
    if not launcher.exists():
        subprocess.run([sys.executable, "-m", "venv", str(where)], check=True)
        pip = [str(where / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, f"vllm-router=={VERSION}"], check=True)
    return launcher


@dataclass
class Engines:
    """Fake engines; `calls` holds (url, body) of each generation request since it was last cleared."""

    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def start(self, host: str, port: int) -> asyncio.Server:
        """Listen as one engine."""
        url = f"http://{host}:{port}"

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                    size = next((int(x[15:]) for x in head.split("\r\n") if x.lower().startswith("content-length:")), 0)
                    body = await reader.readexactly(size)
                    answer = self._answer(url, head, body)
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer)
                    )
                    writer.write(answer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        return await asyncio.start_server(serve, host, port)

    def _answer(self, url: str, head: str, raw: bytes) -> bytes:
        if not head.startswith("POST"):
            return b'{"object":"list","data":[{"id":"tiny"}]}' if " /v1/models" in head else b"{}"
        body = json.loads(raw)
        self.calls.append((url, body))
        chat = "/chat/" in head.split(" ", 2)[1]
        text = {"message": {"role": "assistant", "content": "x"}} if chat else {"text": "x"}
        answer: dict[str, Any] = {
            "id": "cmpl-x",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": "tiny",
            "choices": [{"index": 0, "finish_reason": "length", **text}],
            "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
        }
        if body.get("kv_transfer_params", {}).get("do_remote_decode"):
            answer["kv_transfer_params"] = TICKET
        return json.dumps(answer).encode()


def requests(draw: random.Random) -> Iterator[tuple[str, str, dict[str, str], dict[str, Any] | str]]:
    """Give requests: kind, path, headers, body."""
    names = ("x-session-id", "x-user-id", "x-tenant-id", "x-correlation-id", "x-request-id", "x-trace-id")

    def words(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    def body(chat: bool, *, least: int = 1, most: int = 60, **fields: Any) -> dict[str, Any]:
        text = words(least, most)
        content = {"messages": [{"role": "system", "content": text}]} if chat else {"prompt": text}
        return {"model": "tiny", **content, "max_tokens": 4, **fields}

    def value() -> str:
        return draw.choice(
            [
                f"{draw.getrandbits(64):016x}",
                f"session {draw.randint(0, 999)}",
                f"{words(1, 3)}-{draw.randint(0, 99)}",
                f"u{draw.randint(0, 9999)}@example.org",
                f"ключ-{draw.randint(0, 999)}",
                "k" * draw.randint(1, 40),
            ]
        )

    for chat in (False, True):
        path = "/v1/chat/completions" if chat else "/v1/completions"
        for name in names:
            for _ in range(16):
                yield "header", path, {name: value().encode("ascii", "replace").decode()}, body(chat)
        for _ in range(12):
            both = {name: value().encode("ascii", "replace").decode() for name in draw.sample(names, 3)}
            yield "headers", path, both, body(chat, user=value())
        for _ in range(6):
            yield "empty_header", path, {"x-session-id": "", "x-trace-id": f"t{draw.randint(0, 99)}"}, body(chat)
        for _ in range(24):
            yield "user", path, {}, body(chat, user=value())
            yield "session_id", path, {}, body(chat, session_id=value())
            yield "user_id", path, {}, body(chat, user_id=value())
            yield "session_params", path, {}, body(chat, session_params={"session_id": value()}, user=value())
        for most in (4, 60, 400):
            for _ in range(8):
                yield "no_key", path, {}, body(chat, most=most)
        for _ in range(6):
            yield "no_key_fields", path, {}, body(chat, temperature=0.5, seed=draw.randint(0, 99), stop=["x", "y"])
            yield "number_user_id", path, {}, body(chat, user_id=draw.randint(0, 10**6))
            yield "quote_in_user", path, {}, body(chat, user=f'{words(1, 1)}"{draw.randint(0, 99)}')
            yield "null_user", path, {}, body(chat, user=None)
            yield "empty_user", path, {}, body(chat, user="")
            yield "null_user_id", path, {}, body(chat, user_id=None)
            yield "fraction_user_id", path, {}, body(chat, user_id=draw.randint(0, 99) + 0.5)
    for _ in range(12):
        yield "user_in_prompt", "/v1/completions", {}, body(False) | {"prompt": f"dear user: {value()} {words(3, 30)}"}
        message = [{"role": "user", "content": words(3, 30)}]
        yield "chat_user", "/v1/chat/completions", {}, body(True, user=value()) | {"messages": message}


async def ask(path: str, headers: dict[str, str], body: str) -> int:
    """Send one request; give its status."""
    reader, writer = await asyncio.open_connection(*ROUTER)
    raw = body.encode()
    told = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
    head = f"POST {path} HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n"
    writer.write(f"{head}connection: close\r\n{told}\r\n".encode() + raw)
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1])


async def record(launcher: pathlib.Path, number: int, prefills: int, decodes: int) -> list[dict[str, Any]]:
    """Record one fleet."""
    urls = {
        "prefill": [f"http://127.77.{number}.{1 + place}:8000" for place in range(prefills)],
        "decode": [f"http://127.77.{number}.{101 + place}:8200" for place in range(decodes)],
    }
    engines = Engines()
    places = [url.removeprefix("http://").split(":") for url in urls["prefill"] + urls["decode"]]
    servers = [await engines.start(host, int(port)) for host, port in places]
    flags = [part for role in ("prefill", "decode") for url in urls[role] for part in (f"--{role}", url)]
    command = [str(launcher), "--vllm-pd-disaggregation", "--policy", "consistent_hash", *flags]
    command += ["--host", ROUTER[0], "--port", str(ROUTER[1]), "--prometheus-host", ROUTER[0]]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--log-level", "error"], stdout=log, stderr=log)  # noqa: ASYNC220
        try:
            lines: list[dict[str, Any]] = [urls]
            await answering(process)
            for kind, path, headers, asked in requests(random.Random(number)):
                body = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)
                engines.calls.clear()
                status = await ask(path, headers, body)
                if status != 200 or len(engines.calls) != 2:
                    raise SystemExit(f"{kind}: status {status}, {len(engines.calls)} engines called: {body[:300]}")
                (prefill, _), (decode, seen) = engines.calls
                line = {"kind": kind, "path": path, "headers": headers, "body": body}
                line |= {"prefill": urls["prefill"].index(prefill), "decode": urls["decode"].index(decode)}
                if kind in WITHOUT_KEY:
                    seen.pop("kv_transfer_params")
                    line["seen"] = json.dumps(seen, ensure_ascii=False, separators=(",", ":"))
                lines.append(line)
        finally:
            process.terminate()
            process.wait()
            for server in servers:
                server.close()
            # The router's end closes its connections; let their handlers see that before the loop ends.
            await asyncio.sleep(0.2)
    return lines


async def answering(process: subprocess.Popen[bytes]) -> None:
    """Wait until the router listens and finds its engines healthy."""
    for _ in range(300):
        if process.poll() is not None:
            raise SystemExit(f"vllm-router ended with {process.returncode}")
        try:
            if await ask("/v1/completions", {}, '{"model":"tiny","prompt":"x"}') == 200:
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise SystemExit("vllm-router did not answer within 30 s")


def main() -> None:
    """Record all fleets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path)
    default = pathlib.Path(tempfile.gettempdir()) / f"vllm-router-{VERSION}"
    parser.add_argument("--venv", type=pathlib.Path, default=default, help="where vllm-router is or gets installed")
    flags = parser.parse_args()
    launcher = install(flags.venv)
    lines: list[dict[str, Any]] = []
    for number, (prefills, decodes) in enumerate(FLEETS):
        lines += asyncio.run(record(launcher, number, prefills, decodes))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    flags.output.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(lines) - len(FLEETS)} decisions over {len(FLEETS)} fleets: {flags.output}")


if __name__ == "__main__":
    main()
