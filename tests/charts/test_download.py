"""What the download Job and the pods that wait for it run, against a hub on this machine."""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from support.processes import new_address, until

from .conftest import ROOT

FILES = ROOT / "charts/pd-engines/files"
COMMIT = "a" * 40
CONTENT = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights" * 1000}


def oid(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one open and one gated model; counts what is fetched."""

    fetched: list[str] = []  # noqa: RUF012 -- one server a test module

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "gated" in path and self.headers.get("authorization") != "Bearer right":
            self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="ask for access")
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(body), "oid": oid(body)} for name, body in CONTENT.items()
            ]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/"):
            told = {"id": "owner/open", "sha": COMMIT, "siblings": [{"rfilename": name} for name in CONTENT]}
            self.answer(200, json.dumps(told).encode(), Content_Type="application/json")
        elif (name := path.rpartition("/")[2]) not in CONTENT:
            self.answer(404, b"{}")
        else:
            if self.command == "GET":
                self.fetched.append(name)
            self.answer(200, CONTENT[name], ETag=f'"{oid(CONTENT[name])}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815 -- the name that http.server calls

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer((new_address(), 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://{server.server_address[0]}:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def download(hub: str, cache: pathlib.Path, model: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(cache), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "no_proxy": "*", **variables}
    return subprocess.run(
        [sys.executable, FILES / "download.py", model, "", cache / ".downloaded/mark"],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_mark_is_there_when_all_of_the_model_is_and_a_second_job_fetches_nothing(
    hub: str, tmp_path: pathlib.Path
) -> None:
    Hub.fetched.clear()
    done = download(hub, tmp_path, "owner/open")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".downloaded/mark").exists()
    snapshot = tmp_path / "hub/models--owner--open/snapshots" / COMMIT
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == CONTENT
    assert sorted(Hub.fetched) == sorted(CONTENT)
    assert download(hub, tmp_path, "owner/open").returncode == 0
    assert sorted(Hub.fetched) == sorted(CONTENT)


def test_a_gated_model_says_what_to_do_and_leaves_no_mark(hub: str, tmp_path: pathlib.Path) -> None:
    done = download(hub, tmp_path, "owner/gated", HF_TOKEN="wrong")
    assert done.returncode == 1
    assert "owner/gated is not given to this token (403): ask for access" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / ".downloaded").exists()


def test_a_gated_model_comes_with_the_right_token(hub: str, tmp_path: pathlib.Path) -> None:
    assert download(hub, tmp_path, "owner/gated", HF_TOKEN="right").returncode == 0


def test_a_pod_waits_until_the_mark_is_there(tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "mark"
    waiting = subprocess.Popen([sys.executable, "-u", FILES / "wait.py", mark], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout
    assert waiting.stdout.readline() == "waiting for the download Job, 0 s so far\n"
    assert waiting.poll() is None
    mark.touch()
    until(lambda: waiting.poll() is not None, 20, "the waiting pod goes on")
    assert waiting.stdout.read() == "the model is there\n"
    waiting.stdout.close()
    assert waiting.returncode == 0
