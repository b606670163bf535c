"""Another router before the same engines, while requests come."""

import concurrent.futures
import json
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pdctl.routers import envoy, programs
from pdctl.routers import llmd as llmd_parts
from pdctl.routers.choice import POLICIES_OF
from support import llmd
from support.processes import until
from support.shell import Shell

REQUEST = {
    "model": "meta-llama/Llama-3.1-8B-Instruct", "max_tokens": 12, "ignore_eos": True, "stream": True, "temperature": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("switch"))
    deployed = made.run("deploy", "--local", "--prefill", "1", "--decode", "2", "--speed", "20", "-y")
    assert deployed.returncode == 0, deployed.stderr
    yield made
    made.run("cleanup", "-y")
    for process in made.processes():
        process.kill()


def written(shell: Shell) -> dict[str, Any]:
    """Give the deployment as it is written down: each command takes a second, which polling would repeat."""
    told: dict[str, Any] = json.loads((shell.state / "local/deployment.json").read_text())
    return told


def engines(shell: Shell) -> dict[str, int]:
    return {one["name"]: one["pid"] for one in written(shell)["members"] if one["role"] != "router"}


def router_of(answer: httpx.Response, body: str) -> str:
    """Say who relayed an answer: each leaves a mark."""
    if "x-went-into-resp-headers" in answer.headers:
        return "llm-d"
    return "vllm-router" if "___prefill_addr_" in body else "ours"


class Traffic:
    """Requests one after the other from several clients, each over a connection of its own, until it is left."""

    def __init__(self, url: str) -> None:
        self.url, self.over = url, threading.Event()
        self.served: Counter[str] = Counter()
        self.failed: list[str] = []

    def ask(self, client: int) -> None:
        number = 0
        while not self.over.is_set():
            number += 1
            asked = REQUEST | {"prompt": f"{client} {number} " + "so be it " * 20}
            try:
                answer = httpx.post(self.url + "/v1/completions", json=asked, timeout=60)
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
                continue
            if answer.status_code == 200 and answer.text.rstrip().endswith("data: [DONE]"):
                self.served[router_of(answer, answer.text)] += 1
            else:
                self.failed.append(f"{answer.status_code} {answer.text[-300:]}")

    def __enter__(self) -> "Traffic":
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        self.asking = [self.pool.submit(self.ask, number) for number in range(2)]
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.pool.shutdown()
        for one in self.asking:
            one.result()


@pytest.mark.parametrize("other", ["vllm-router", pytest.param("llm-d", marks=llmd.needed)])
def test_switching_to_another_router_and_back_loses_no_request_and_restarts_no_engine(shell: Shell, other: str) -> None:
    before = engines(shell)
    url = written(shell)["router_url"]
    with Traffic(url) as traffic, httpx.Client(timeout=120) as client:
        long = REQUEST | {"prompt": "and so on", "max_tokens": 6000}
        with client.stream("POST", url + "/v1/completions", json=long) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            switch = shell.start("router", "switch", other)
            until(lambda: any(one["leaving"] for one in written(shell)["members"]), 60, "ours is told to end")
            assert "finishing" in {part["state"] for part in shell.told("status")["parts"]}, "it has the long answer"
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, told = switch.communicate(timeout=60)
        assert switch.returncode == 0, told
        until(lambda: traffic.served[other] > 5, 60, f"{other} serves")
        served = traffic.served["ours"]
        back = shell.run("router", "switch", "ours")
        assert back.returncode == 0, back.stderr
        until(lambda: traffic.served["ours"] > served + 5, 60, "ours serves again")
    assert traffic.failed == []
    assert engines(shell) == before
    assert shell.told("routing")["violations"] == []
    assert len(written(shell)["members"]) == len(before) + 1, "nothing of the other one is left"


def test_a_router_that_cannot_start_leaves_the_old_one_serving(shell: Shell, tmp_path: Path) -> None:
    before = written(shell)["members"]
    broken = tmp_path / "epp"
    broken.write_text("#!/bin/sh\necho it is no day for picking >&2\nexit 3\n")
    broken.chmod(0o755)
    answer = shell.run("router", "switch", "llm-d", "--llm-d-epp", str(broken), "--llm-d-sidecar", str(broken))
    assert answer.returncode == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    assert "ended while starting (exit status 3); the old router goes on" in answer.stderr
    assert "it is no day for picking" in answer.stderr
    assert written(shell)["members"] == before


def test_llm_d_without_its_programs_is_refused_with_where_to_get_them(shell: Shell) -> None:
    without = {"PDCTL_LLM_D_EPP": "", "PDCTL_LLM_D_SIDECAR": ""}
    answer = shell.run("router", "switch", "llm-d", environment=without)
    assert answer.returncode == 3
    assert "--llm-d-epp is not given" in answer.stderr
    assert "docs/llm-d.md" in answer.stderr


def test_a_decode_engine_answers_on_localhost_too_where_a_sidecar_looks_for_it(shell: Shell) -> None:
    for engine in [one for one in written(shell)["members"] if one["role"] == "decode"]:
        port = engine["command"][engine["command"].index("--localhost-port") + 1]
        told = [
            httpx.get(f"{url}/sim/state").json()["engine_id"] for url in (engine["url"], f"http://127.0.0.1:{port}")
        ]
        assert told[0] == told[1]


@pytest.mark.parametrize("config", [envoy.gateway([11001, 10001], 11002, 18500), envoy.door(10001, 11002, 11001)])
def test_envoy_takes_our_configurations(config: dict[str, Any], tmp_path: Path) -> None:
    path = envoy.write(config, tmp_path / "envoy.json")
    checked = subprocess.run(
        [programs.envoy(print), "--mode", "validate", "-c", str(path)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("preset", POLICIES_OF["llm-d"])
def test_a_preset_has_a_profile_for_either_role_and_finds_engines_in_a_file(preset: str, tmp_path: Path) -> None:
    config = llmd_parts.picker_config(preset, tmp_path / "endpoints.yaml")
    assert [one["name"] for one in config["schedulingProfiles"]] == ["prefill", "decode"]
    used = {plugin["pluginRef"] for profile in config["schedulingProfiles"] for plugin in profile["plugins"]}
    there = {plugin.get("name", plugin["type"]) for plugin in config["plugins"]}
    assert used <= there
    assert config["dataLayer"]["discovery"]["pluginRef"] in there


def test_an_envoy_that_has_gone_or_hangs_up_has_no_requests_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"

        def hang_up() -> None:
            server.accept()[0].close()

        closing = threading.Thread(target=hang_up)
        closing.start()
        assert envoy.drain(url, 5) == 0
        closing.join()
    assert envoy.drain(url, 5) == 0
