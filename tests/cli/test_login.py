"""What a kubeconfig may hold besides a token: programs that log in, proxies, addresses that are none."""

import asyncio
import base64
import json
import signal
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
import trustme

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
def answering(status: int, body: bytes) -> Iterator[str]:
    """Give the address of an API that always answers the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

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
    with answering(401, b"{}") as server:
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


def with_a_key() -> dict[str, str]:
    """Give a user who has a client certificate, with its key in the kubeconfig."""
    made = trustme.CA().issue_cert("me.example")
    return {
        "client-key-data": base64.b64encode(made.private_key_pem.bytes()).decode(),
        "client-certificate-data": base64.b64encode(made.cert_chain_pems[0].bytes()).decode(),
    }


def keys(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_client_key_is_in_no_file_while_a_command_runs_nor_after_a_signal(
    tmp_path: Path, number: signal.Signals
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    shell = Shell(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        server = f"https://127.0.0.1:{silent.getsockname()[1]}"
        config = kubeconfig(tmp_path, with_a_key(), server=server, **{"insecure-skip-tls-verify": True})
        shell.environment |= {"TMPDIR": str(temporary), "KUBECONFIG": config}
        with shell.start("status", "--namespace", "x") as running, silent.accept()[0]:
            assert [path.name[:6] for path in temporary.iterdir()] == ["pdctl-"]
            assert keys(temporary) == []
            running.send_signal(number)
            _, stderr = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "Traceback" not in stderr
    assert list(temporary.iterdir()) == []


def test_sighup_does_not_end_a_command_that_ignores_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        server = f"https://127.0.0.1:{silent.getsockname()[1]}"
        config = kubeconfig(tmp_path, {"token": "t"}, server=server, **{"insecure-skip-tls-verify": True})
        shell = Shell(tmp_path)
        shell.environment["KUBECONFIG"] = config
        ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what a child inherits, as from nohup
        try:
            running = shell.start("status", "--namespace", "x")
        finally:
            signal.signal(signal.SIGHUP, ignored)
        with running, silent.accept()[0]:
            running.send_signal(signal.SIGHUP)
            _, stderr = running.communicate(timeout=60)
    assert running.returncode == 3
    assert "does not answer" in stderr


def test_credentials_with_a_key_are_renewed_and_leave_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def renewed() -> Cluster:
        cluster = await Cluster.connect()
        before = cluster.client
        await cluster._renew(before)
        assert cluster.client is not before
        assert await cluster.get("/version") == {"gitVersion": "v1"}
        return cluster

    with answering(200, b'{"gitVersion": "v1"}') as server:
        monkeypatch.setenv("KUBECONFIG", kubeconfig(tmp_path, with_a_key(), server=server))
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert asyncio.run(renewed()).version == "v1"
    assert keys(api.scratch()) == []
