"""A local deployment's life at the command line."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.processes import until
from support.shell import PDCTL, Shell
from support.terminal import Terminal

SMALL = ["--prefill", "1", "--decode", "1", "--speed", "20", "-y"]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for process in made.processes():
        process.kill()


def one_screen(answer: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Check an error: its exit status, cause and next step, no traceback."""
    assert answer.returncode == code, answer.stderr
    assert "Traceback" not in answer.stderr
    assert len(answer.stderr.splitlines()) < 40
    for word in words:
        assert word in answer.stderr


def test_a_deployment_serves_shows_itself_and_leaves_nothing(shell: Shell) -> None:
    deployed = shell.run("deploy", "--local", *SMALL)
    assert deployed.returncode == 0, deployed.stderr
    assert "simulated" in deployed.stdout

    told = shell.told("status")
    assert [part["name"] for part in told["parts"]] == ["prefill-0", "decode-0", "router"]
    assert {part["state"] for part in told["parts"]} == {"ready"}
    assert told["simulated"] is True

    bench = shell.run("bench", "6", "2", "--input-len", "300", "--output-len", "20", "--output", "result.json")
    assert bench.returncode == 0, bench.stderr
    assert "SIMULATED" in bench.stdout
    assert "Serving Benchmark Result" in bench.stdout
    result = json.loads((shell.state.parent / "result.json").read_text())
    assert (result["completed"], result["failed"], result["simulated"]) == (6, 0, True)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (6 * 300, 6 * 20)

    routing = shell.told("routing")
    assert routing["pairs"] == [{"prefill": "prefill-0", "decode": "decode-0", "prompts": 6}]
    # 300 tokens are three blocks of 128 tokens of 131,072 bytes each
    assert routing["transfers"] == [
        {"prefill": "prefill-0", "decode": "decode-0", "transfers": 6, "bytes": 6 * 3 * 128 * 131_072}
    ]
    assert [(edge["prefill"], edge["decode"], edge["closed"]) for edge in routing["edges"]] == [
        ("prefill-0", "decode-0", False)
    ]
    assert routing["edges"][0]["handoffs"] == 6
    assert "prefill-0" in shell.run("routing", "--edges").stdout
    assert routing["violations"] == []

    logs = shell.run("logs", "--role", "router", "--tail", "3")
    assert all(line.startswith("router") for line in logs.stdout.splitlines())
    assert "decode=http://" in logs.stdout

    cleaned = shell.run("cleanup", "-y")
    assert cleaned.returncode == 0, cleaned.stderr
    assert shell.processes() == []
    assert not (shell.state / "local").exists()


def test_two_deployments_stand_side_by_side(shell: Shell) -> None:
    assert shell.run("deploy", "--local", *SMALL).returncode == 0
    assert shell.run("deploy", "--local", "--name", "second", *SMALL).returncode == 0
    routers = {name: shell.told("status", "--name", name)["router"] for name in ("local", "second")}
    assert len(set(routers.values())) == 2
    for url in routers.values():
        assert httpx.get(url + "/ready").status_code == 200
    assert shell.run("cleanup", "-y").returncode == 0
    assert httpx.get(routers["second"] + "/ready").status_code == 200
    assert shell.run("cleanup", "--name", "second", "-y").returncode == 0


def test_status_sees_what_was_killed_by_hand(shell: Shell) -> None:
    shell.run("deploy", "--local", *SMALL)
    victim = next(part for part in shell.told("status")["parts"] if part["role"] == "decode")
    os.kill(victim["pid"], signal.SIGKILL)

    def state() -> str:
        return next(str(part["state"]) for part in shell.told("status")["parts"] if part["role"] == "decode")

    until(lambda: state() == "killed by SIGKILL", 10, "status tells the signal")
    assert shell.run("status").returncode == 1


def test_engines_end_with_a_supervisor_that_is_killed(shell: Shell) -> None:
    shell.run("deploy", "--local", *SMALL)
    supervisor = json.loads((shell.state / "local/deployment.json").read_text())["supervisor_pid"]
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not shell.processes(), 10, "no engine is left")
    assert {part["state"] for part in shell.told("status")["parts"]} == {"gone"}
    assert shell.run("deploy", "--local", *SMALL).returncode == 0, "the name can be used again"


def test_a_taken_name_is_refused_with_what_to_do(shell: Shell) -> None:
    shell.run("deploy", "--local", *SMALL)
    one_screen(shell.run("deploy", "--local", *SMALL), 3, "already runs", "pdctl cleanup --name local", "next:")
    assert {part["state"] for part in shell.told("status")["parts"]} == {"ready"}


def test_a_name_that_is_taken_while_a_question_stands_is_refused_and_nothing_touched(shell: Shell) -> None:
    with Terminal([*PDCTL, "deploy", "--local", *SMALL[:-1]], shell.environment, shell.state.parent) as late:
        late.until("Deploy this")
        assert shell.run("deploy", "--local", *SMALL).returncode == 0
        before = (shell.state / "local/deployment.json").read_bytes()
        late.press("y\r")
        assert late.end() == 3
        assert "already runs" in late.text
    assert (shell.state / "local/deployment.json").read_bytes() == before
    assert {part["state"] for part in shell.told("status")["parts"]} == {"ready"}
    assert shell.run("logs", "--role", "prefill", "--tail", "1").stdout
    assert shell.run("cleanup", "-y").returncode == 0
    assert shell.processes() == []


def test_a_name_that_another_command_is_deploying_is_refused(shell: Shell) -> None:
    folder = shell.state / "local"
    folder.mkdir(parents=True)
    with (folder / "deploy.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        one_screen(shell.run("deploy", "--local", *SMALL), 3, "another pdctl is deploying 'local'", "next:")
    assert shell.processes() == []


def test_a_taken_port_is_refused_before_anything_starts(shell: Shell) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_screen(shell.run("deploy", "--local", "--port", str(port), *SMALL), 3, f"port {port} is taken", "next:")
    assert shell.processes() == []


@pytest.mark.parametrize("command", ["status", "logs", "routing", "bench", "cleanup"])
def test_a_command_without_a_deployment_says_how_to_make_one(shell: Shell, command: str) -> None:
    one_screen(shell.run(command), 1, "nothing is deployed", "pdctl deploy --local")


def test_deploy_without_local_says_so(shell: Shell) -> None:
    one_screen(shell.run("deploy", "-y"), 2, "--local")


@pytest.mark.parametrize(
    "arguments",
    [
        ("deploy", "--local", "--no-such-flag"),
        ("deploy", "--local", "--prefill", "0"),
        ("deploy", "--local", "--policy", "hope", "-y"),
        ("deploy", "--local", "--name", "Not A Name", "-y"),
        ("bench", "none"),
        ("nothing",),
    ],
    ids=" ".join,
)
def test_a_bad_flag_is_a_usage_error(shell: Shell, arguments: tuple[str, ...]) -> None:
    one_screen(shell.run(*arguments), 2)
    assert shell.processes() == []


def test_a_missing_engine_program_is_named_with_how_to_install_it(shell: Shell, tmp_path: Path) -> None:
    # a Python that finds the packages but has no programs beside it
    alone = tmp_path / "bin/python"
    alone.parent.mkdir()
    alone.symlink_to(Path(sys.executable).resolve())
    packages = os.pathsep.join(path for path in sys.path if path)
    answer = subprocess.run(
        [str(alone), "-m", "pdctl", "deploy", "--local", *SMALL], capture_output=True, text=True, check=False,
        env=shell.environment | {"PYTHONPATH": packages, "PATH": "/nowhere"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    one_screen(answer, 3, "pd-engine-sim is not installed", "pip install pd-simulator")


def test_an_engine_that_ends_while_starting_is_shown_with_its_last_words(shell: Shell) -> None:
    answer = shell.run("deploy", "--local", "--name", "small", "--prefill", "1", "--decode", "1", "--speed", "0.01",
                       "--timeout", "0.01", "-y")  # fmt: skip
    one_screen(answer, 4, "not ready within 0.01 s", "next:")
    assert shell.processes() == []
    with socket.socket() as taken:  # decode-0's side channel on the subnet that deploy will choose
        chosen = next(f"127.1.{x}.101" for x in range(1, 255) if _free(f"127.1.{x}.1", 8000))
        taken.bind((chosen, 5600))
        taken.listen()
        answer = shell.run("deploy", "--local", *SMALL)
    one_screen(answer, 1, "decode-0 ended while starting (exit status 1)", "cannot open the side channel", "next:")
    assert shell.processes() == []


def _free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as deploy asks: closed connections do not count
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def test_ctrl_c_in_the_middle_of_deploy_leaves_nothing(shell: Shell) -> None:
    running = shell.start("deploy", "--local", "--prefill", "4", "--decode", "4", "-y")
    until(lambda: len(shell.processes()) > 3, 20, "engines are starting")
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "nothing is left running" in stderr
    assert "Traceback" not in stderr
    until(lambda: not shell.processes(), 5, "all have ended")


def test_ctrl_c_in_the_middle_of_bench_shows_what_was_measured(shell: Shell) -> None:
    shell.run("deploy", "--local", "--prefill", "1", "--decode", "1", "-y")
    url = shell.told("status")["router"].replace(":10001", "")
    running = shell.start("bench", "500", "4", "--input-len", "100", "--output-len", "20", "--output", "part.json")
    until(
        lambda: shell.told("routing")["pairs"] and shell.told("routing")["pairs"][0]["prompts"] > 8,
        30,
        f"some at {url}",
    )
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=20)
    assert running.returncode == 130, stderr
    assert "PARTIAL" in stdout
    assert "Traceback" not in stderr
    result = json.loads((shell.state.parent / "part.json").read_text())
    assert result["pdctl"]["partial"] is True
    assert 0 < result["completed"] < 500
    parts = shell.told("status")["parts"]
    assert {part["state"] for part in parts} == {"ready"}, "the deployment goes on"
    state = parts[1]["url"] + "/sim/state"
    until(lambda: httpx.get(state).json()["running"] == 0, 5, "what was under way is aborted")


def test_failed_requests_are_counted_explained_and_make_the_exit_status(shell: Shell) -> None:
    shell.run("deploy", "--local", *SMALL)
    prefill = next(part for part in shell.told("status")["parts"] if part["role"] == "prefill")
    httpx.post(prefill["url"] + "/sim/fault", json={"kind": "status", "code": 422, "count": 3})
    answer = shell.run("bench", "8", "1", "--input-len", "50", "--output-len", "5")
    one_screen(answer, 1, "3 of 8 requests failed", "status 422", "next:")
    assert "Failed requests:                         3" in answer.stdout


def test_help_names_the_exit_codes(shell: Shell) -> None:
    answer = shell.run("--help")
    assert answer.returncode == 0
    assert "130 Ctrl-C" in " ".join(answer.stdout.split())
