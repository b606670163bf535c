"""The router as the process that users start."""

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from router.fakes import TICKET
from support.processes import Process, new_address, until

COMMAND = [sys.executable, "-m", "pdrouter", "--no-continue-streams"]  # the engine here tells no events of vLLM


def finished(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=20, check=False)


@contextmanager
def engine(hold: threading.Event):
    """An engine whose streams wait for `hold` before they end."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self._json({"data": [{"id": "tiny"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if body["kv_transfer_params"]["do_remote_decode"]:
                self._json({"model": "tiny", "kv_transfer_params": TICKET})
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"9\r\ndata: a\n\n\r\n")
            self.wfile.flush()
            hold.wait(10)
            self.wfile.write(b"9\r\ndata: b\n\n\r\n0\r\n\r\n")

        def _json(self, body):
            raw = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    with Server((new_address(), 8000), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://{server.server_address[0]}:8000"
        finally:
            hold.set()
            server.shutdown()
            thread.join()


def router(prefill: str, decode: str, *flags: str) -> Process:
    host = new_address()
    places = ["--host", host, "--prometheus-host", host, "--port", "10001"]
    command = [*COMMAND, "--vllm-pd-disaggregation", *places, "--prefill", prefill, "--decode", decode, *flags]
    return Process(command, f"http://{host}:10001", "/ready")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish_and_the_process_ends_with_0(number):
    hold = threading.Event()
    with engine(hold) as prefill, engine(hold) as decode, router(prefill, decode) as process:
        with httpx.stream("POST", f"{process.url}/v1/completions", json={"prompt": "x", "stream": True}) as answer:
            lines = answer.iter_raw()
            assert next(lines) == b"data: a\n\n"
            process.process.send_signal(number)

            def refused() -> bool:
                try:
                    httpx.get(f"{process.url}/health", timeout=1)
                except httpx.ConnectError:
                    return True
                return False

            until(refused, 5, "nothing new is accepted")
            assert process.process.poll() is None
            hold.set()
            assert b"".join(lines) == b"data: b\n\n"
        assert process.process.wait(5) == 0


def test_streams_that_outlast_the_drain_timeout_are_cut():
    hold = threading.Event()
    with engine(hold) as prefill, engine(hold) as decode:
        process = router(prefill, decode, "--drain-timeout-secs", "0.2")
        with (
            process,
            httpx.stream("POST", f"{process.url}/v1/completions", json={"prompt": "x", "stream": True}) as answer,
        ):
            lines = answer.iter_raw()
            next(lines)
            process.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                next(lines)
            assert process.process.wait(5) == 0
            assert "cut=1 " in process.output()


def test_the_metrics_port_has_metrics_only():
    hold = threading.Event()
    with engine(hold) as prefill, engine(hold) as decode, router(prefill, decode) as process:
        page = httpx.get(process.url.replace("10001", "29000") + "/metrics")
        assert page.status_code == 200
        assert "pd_router_in_flight" in page.text
        assert httpx.get(process.url.replace("10001", "29000") + "/v1/models").status_code == 404
        assert httpx.get(process.url + "/metrics").status_code == 404


def test_a_taken_port_is_one_clear_line_and_exit_status_1():
    address = new_address()
    with socket.create_server((address, 10001)):
        done = finished("--prefill", "http://p:1", "--decode", "http://d:1", "--host", address)
    assert done.returncode == 1
    assert f"{done.stderr.splitlines()[-1]}\n" == (
        f"pd-router: cannot listen on {address}:10001: the port is in use; stop the program that has it or choose "
        "another with --port\n"
    )


@pytest.mark.parametrize("flags", [["--nonsense"], [], ["--intra-node-data-parallel-size", "8"]])
def test_wrong_flags_are_one_line_and_exit_status_2(flags):
    done = finished(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith("pd-router: error: ")
    assert done.stderr.count("\n") == 1


def test_help_lists_the_flags():
    done = finished("--help")
    assert done.returncode == 0
    for flag in ("--vllm-pd-disaggregation", "--prefill", "--decode", "--policy", "--api-key-file", "--config"):
        assert flag in done.stdout
