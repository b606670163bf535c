"""A Kubernetes API that answers as a test wishes, on a real socket; and the way to it."""

import base64
import hashlib
import json
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


class Request(BaseHTTPRequestHandler):
    """What is asked, and ways to answer it."""

    protocol_version = "HTTP/1.1"
    wbufsize = 0
    disable_nagle_algorithm = True

    def handle_any(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        self.body: Any = json.loads(self.rfile.read(length)) if length else None
        api = self.server
        assert isinstance(api, Api)
        try:
            if urlsplit(self.path).path == "/version":
                self.tell(200, gitVersion="v1.34.0")
            else:
                api.answer(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815 as http.server names them

    @property
    def token(self) -> str:
        return str(self.headers.get("authorization", "")).removeprefix("Bearer ")

    def tell(self, code: int, /, **told: Any) -> None:
        """Answer with an object."""
        self.send_response(code)
        content = json.dumps(told).encode()
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, code: int, reason: str, message: str) -> None:
        """Answer with a Status."""
        self.tell(code, kind="Status", status="Failure", reason=reason, message=message, code=code)

    def stream(self, *lines: str) -> None:
        """Begin an answer without a length, which ends with the connection; more may be written."""
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        for line in lines:
            self.wfile.write(line.encode() + b"\n")

    def upgrade(self) -> None:
        """Go over to a websocket."""
        key = self.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("upgrade", "websocket")
        self.send_header("connection", "upgrade")
        self.send_header("sec-websocket-accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.send_header("sec-websocket-protocol", self.headers["sec-websocket-protocol"])
        self.end_headers()
        self.close_connection = True

    def send(self, channel: int, data: bytes) -> None:
        """Send a message on a channel of the websocket."""
        content = bytes([channel]) + data
        self.wfile.write(b"\x82" + (struct.pack("!BH", 126, len(content)) if len(content) > 125 else
                                    bytes([len(content)])) + content)  # fmt: skip

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


class Api(ThreadingHTTPServer):
    """Asks `answer` what to answer, each time; a context in which it serves."""

    daemon_threads = True

    def __init__(self, answer: Callable[[Request], None]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answer = answer
        self._serving = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def kubeconfig(self, folder: Path, token: Path | None = None) -> Path:
        """Write the way here; with a token, that file's content is the credential at every login."""
        user: dict[str, Any] = {"token": "secret"}
        if token is not None:
            print_it = (
                'printf \'{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", '
                f'"status": {{"token": "%s"}}}}\' "$(cat {token})"'
            )
            user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "sh",
                             "args": ["-c", print_it], "interactiveMode": "Never"}}  # fmt: skip
        told = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": user}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }  # fmt: skip
        path = folder / "kubeconfig"
        path.write_text(json.dumps(told))
        return path

    def __enter__(self) -> Self:
        self._serving.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self._serving.join()
        self.server_close()
