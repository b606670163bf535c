"""What a kubeconfig may hold besides a token: programs that log in, proxies, addresses that are none."""

import asyncio
import json
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from pdctl.cluster import api
from pdctl.cluster.api import Cluster
from pdctl.errors import PdctlError
from support.shell import Shell


def kubeconfig(folder: Path, user: dict[str, Any], **cluster: Any) -> str:
    told = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": cluster}], "users": [{"name": "me", "user": user}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }  # fmt: skip
    (folder / "kubeconfig").write_text(json.dumps(told))
    return str(folder / "kubeconfig")


def program(folder: Path, text: str) -> dict[str, Any]:
    """Give a user whose credentials a Python program gives."""
    (folder / "login.py").write_text(text)
    version = "client.authentication.k8s.io/v1"
    return {"exec": {"apiVersion": version, "command": sys.executable, "args": [str(folder / "login.py")]}}


@contextmanager
def refusing() -> Iterator[str]:
    """Give the address of an API that accepts nobody's token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextmanager
def refusing_proxy() -> Iterator[str]:
    """Give the address of a proxy that lets nobody through."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_a_login_that_does_not_end_is_told_about_then_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    user = program(tmp_path, text)
    monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path, user, server="https://127.0.0.1:9"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(api, "LOGIN_SECONDS", 3.0)
    monkeypatch.setattr(api, "QUIET_SECONDS", 0.2)
    with pytest.raises(PdctlError, match="the login of context 'here' did not end within 3 s") as told:
        asyncio.run(asyncio.wait_for(Cluster.connect("here"), 30))
    assert told.value.code == 3
    assert "waiting for the login of context 'here'" in capfd.readouterr().err
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_a_login_that_fails_when_it_is_renewed_is_told_as_a_first_one(tmp_path: Path) -> None:
    text = f"""\
import json, pathlib, sys
try:
    pathlib.Path({str(tmp_path / "begun")!r}).touch(exist_ok=False)
except FileExistsError:
    sys.exit("the session has expired")
print(json.dumps({{"status": {{"token": "t"}}}}))
"""
    with refusing() as server:
        environment = {"KUBECONFIG": kubeconfig(tmp_path, program(tmp_path, text), server=server)}
        answer = Shell(tmp_path).run("status", "--namespace", "x", environment=environment)
    assert answer.returncode == 3
    assert "the credentials of context 'here' cannot be had" in answer.stderr
    assert "the session has expired" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_proxy_that_refuses_is_told_by_what_it_says(tmp_path: Path) -> None:
    with refusing_proxy() as proxy:
        config = kubeconfig(tmp_path, {"token": "t"}, server="https://10.0.0.1:6443", **{"proxy-url": proxy})
        answer = Shell(tmp_path).run("status", "--namespace", "x", environment={"KUBECONFIG": config})
    assert answer.returncode == 3
    assert "the Kubernetes API at https://10.0.0.1:6443 does not answer: its proxy says 403 Forbidden" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_server_without_a_scheme_is_told_at_once(tmp_path: Path) -> None:
    config = kubeconfig(tmp_path, {"token": "t"}, server="127.0.0.1:6443")
    answer = Shell(tmp_path).run("status", "--namespace", "x", environment={"KUBECONFIG": config})
    assert answer.returncode == 3
    assert "the Kubernetes API at 127.0.0.1:6443 cannot be asked" in answer.stderr
    assert "Traceback" not in answer.stderr
