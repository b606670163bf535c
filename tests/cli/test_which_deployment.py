"""Which deployment a command means that is told none."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from pdctl.deployment import Deployment
from support.shell import Shell


def known(shell: Shell, *namespaces: str, local: bool = False) -> None:
    for name in namespaces:
        folder = shell.state / "namespaces" / name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text("{}")
    if local:
        assert shell.run("deploy", "--local", "--prefill", "1", "--decode", "1", "-y").returncode == 0


@pytest.mark.parametrize("words", ["scale decode=2", "rollout --restart decode", "diff", "port-forward"])
def test_a_command_of_kubernetes_says_that_it_knows_none_or_several(words: str, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    none = shell.run(*words.split())
    assert (none.returncode, "no deployment on Kubernetes is known here" in none.stderr) == (2, True)
    known(shell, "one", "two")
    several = shell.run(*words.split())
    assert several.returncode == 2
    assert "deployed on Kubernetes are: one, two" in several.stderr
    assert "say which one: --namespace" in several.stderr


def test_a_deployment_on_this_machine_does_not_stand_in_its_way(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    try:
        known(shell, "one", local=True)
        environment = {"KUBECONFIG": str(tmp_path / "absent")}
        answer = shell.run("scale", "decode=2", environment=environment)
        assert answer.returncode == 3, "it meant the one on Kubernetes, and has found no way there"
        assert "no deployment" not in answer.stderr
        either = shell.run("status", environment=environment)
        assert "say which: --name, or --namespace" in either.stderr
    finally:
        shell.run("cleanup", "--name", "local", "-y")


def test_a_deployment_of_another_pdctl_is_told_and_harms_no_other(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    folder = shell.state / "newer"
    folder.mkdir(parents=True)
    told = asdict(Deployment("newer", 1, "m", 1.0, "random", "http://127.0.0.1:1", "http://127.0.0.1:2"))
    (folder / "deployment.json").write_text(json.dumps(told | {"since_then": 1}))
    for command in ("status", "cleanup"):
        answer = shell.run(command, "--name", "newer")
        assert answer.returncode == 1
        assert f"{folder}/deployment.json cannot be read" in answer.stderr
        assert "'since_then'" in answer.stderr
        assert "use the version of pdctl that wrote it" in answer.stderr
        assert "Traceback" not in answer.stderr
    try:
        known(shell, local=True)
    finally:
        shell.run("cleanup", "-y")
