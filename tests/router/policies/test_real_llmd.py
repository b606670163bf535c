"""llm-d's own endpoint picker beside our policies of its rules: same fleet, same prompts, same scores."""

import json
import random
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import yaml

from pdctl.deployment import Member
from pdctl.ports import Ports
from pdctl.routers import envoy, llmd, programs
from pdrouter.openai.features import Prompt
from pdrouter.policies import POLICIES, Commons, RoutingKey
from pdrouter.policies.llmd import LlmdPdSample
from router.policies.rows import Row
from support import llmd as real
from support.processes import until

HEADER = "x-gateway-destination-endpoint-scores"
PAGE = "".join(
    f'# TYPE vllm:{name} gauge\nvllm:{name}{{{{model_name="m"}}}} {value}\n'
    for name, value in (
        ("num_requests_waiting", "{waiting}"), ("num_requests_running", "0"), ("kv_cache_usage_perc", "{used}"),
    )
)  # fmt: skip


@dataclass
class Engine:
    """An engine whose load is set by hand; it tells which prefill engine was chosen with it."""

    name: str
    row: Row
    scraped: int = 0

    def __post_init__(self) -> None:
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                engine.scraped += 1
                self.answer(PAGE.format(waiting=int(engine.row.waiting), used=engine.row.kv_usage), "text/plain")

            def do_POST(self) -> None:
                chunked = self.headers.get("transfer-encoding")
                while chunked and (size := int(self.rfile.readline(), 16)):
                    self.rfile.read(size + 2)
                self.rfile.readline() if chunked else self.rfile.read(int(self.headers["content-length"]))
                told = {"decode": engine.name, "prefill": self.headers.get("x-prefiller-host-port"), "choices": []}
                self.answer(json.dumps(told), "application/json")

            def handle(self) -> None:
                with suppress(ConnectionResetError):  # the picker ends
                    super().handle()

            def answer(self, body: str, kind: str) -> None:
                self.send_response(200)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def picker(preset: str, engines: dict[str, list[Engine]], folder: Path) -> Iterator[str]:
    """Stand llm-d's endpoint picker and Envoy before engines, which need no sidecars: nothing is handed over."""
    members = {
        role: [Member(one.name, role, f"http://{one.address}", []) for one in some] for role, some in engines.items()
    }
    listed, config = folder / "endpoints.yaml", folder / "picker.yaml"
    listed.write_text(yaml.safe_dump(llmd.endpoints(members["prefill"], members["decode"])))
    config.write_text(yaml.safe_dump(llmd.picker_config(preset, listed)))
    ports = Ports()
    grpc, health, metrics, port, admin = (ports.inner() for _ in range(5))
    gateway = envoy.gateway([port], admin, grpc)
    manager = gateway["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"][0]["typed_config"]["metadata_options"] = {"receiving_namespaces": {"untyped": ["envoy.lb"]}}
    told = {"key": HEADER, "value": f"%DYNAMIC_METADATA(envoy.lb:{HEADER})%"}
    manager["route_config"]["response_headers_to_add"] = [{"header": told}]
    commands = [
        [real.EPP, "--config-file", str(config), "--pool-name", "t", "--pool-namespace", "default", "--grpc-port",
         str(grpc), "--grpc-health-port", str(health), "--metrics-port", str(metrics), "--secure-serving=false",
         "--metrics-endpoint-auth=false", "--tracing=false", "--emit-endpoint-scores"],
        envoy.command(programs.envoy(print), envoy.write(gateway, folder / "envoy.json")),
    ]  # fmt: skip
    with ExitStack() as stack, (folder / "log").open("wb") as log:
        for command in commands:
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
            stack.callback(process.kill)
        url = f"http://127.0.0.1:{port}"

        def serves() -> bool:
            try:
                answer = httpx.post(url + "/v1/completions", json={"model": "m", "prompt": "?"}, timeout=5)
            except httpx.HTTPError:
                return False
            return answer.status_code == 200 and HEADER in answer.headers

        until(serves, 30, "the picker chooses")
        yield url


def read_again(engines: list[Engine], seen: list[int]) -> bool:
    """Whether each engine's metrics were read, all of them, since it had been read so often."""
    return all(engine.scraped > was + 2 for engine, was in zip(engines, seen, strict=True))


@real.needed
@pytest.mark.parametrize(
    ("preset", "policy"),
    [("default", "llmd_default"), ("pd-sample", "llmd_pd_sample"), ("pd-guide", "llmd_pd_guide")],
)
def test_our_policies_of_llm_d_score_as_llm_ds_own_picker_does(preset: str, policy: str, tmp_path: Path) -> None:
    draw = random.Random(7)
    engines = {role: [Engine(f"{role}-{n}", Row(f"{role}-{n}")) for n in range(3)] for role in ("prefill", "decode")}
    every = [engine for some in engines.values() for engine in some]
    commons = Commons(seed=1)
    ours = {role: cast(Any, POLICIES[policy](cast(Any, role), commons)) for role in engines}
    rows = {role: [engine.row for engine in some] for role, some in engines.items()}
    beginnings = ["".join(draw.choices("abcdefgh ", k=3000)) for _ in range(3)]
    with picker(preset, engines, tmp_path) as url, httpx.Client(timeout=30) as client:
        alone = 0
        for number in range(24):
            for engine in every:
                engine.row.waiting, engine.row.kv_usage = draw.randrange(5), draw.randrange(8) / 10
            seen = [engine.scraped for engine in every]
            until(partial(read_again, every, seen), 10, "all are read")
            # No length ends where a block does: our blocks begin one token earlier, with what tells the model.
            text = draw.choice(beginnings)[: draw.choice((700, 1500, 2900))] + draw.choice(("", f" {number}"))
            body = {"model": "m", "prompt": text}
            request = Prompt(RoutingKey("k", ""), body)
            answer = client.post(url + "/v1/completions", json=body)
            told, scores = answer.json(), json.loads(answer.headers[HEADER])
            expected = ours["decode"].scores(request, rows["decode"])
            found = [scores[engine.address] for engine in engines["decode"]]
            assert found == pytest.approx(expected, abs=1e-6), number
            decode = next(row for row in rows["decode"] if row.name == told["decode"])
            assert expected[rows["decode"].index(decode)] == pytest.approx(max(expected)), number
            chosen = [number for number, engine in enumerate(engines["prefill"]) if engine.address == told["prefill"]]
            if isinstance(ours["decode"], LlmdPdSample):
                assert (not chosen) == ours["decode"].bypass(request, rows["prefill"][0], decode), number
            alone += not chosen
            if chosen:
                of_prefill = ours["prefill"].scores(request, rows["prefill"])
                if preset == "pd-guide":
                    # Its load counts what a prompt's beginning spares in some starts of the picker, in others not: its
                    # two producers have no order. What the affinity filter leaves is the same in all.
                    assert of_prefill[chosen[0]] >= 0, number
                else:
                    assert of_prefill[chosen[0]] == pytest.approx(max(of_prefill)), number
                ours["prefill"].routed(request, rows["prefill"][chosen[0]])
            ours["decode"].routed(request, decode)
        assert (alone > 0) == (preset == "pd-sample"), "only the sample leaves prompts to decode that it has"
    for engine in every:
        engine.close()
