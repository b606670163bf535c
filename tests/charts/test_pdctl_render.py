"""What pdctl installs is what helmfile.yaml says."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from .conftest import ROOT

Objects = dict[tuple[str, str], Any]


def by_name(text: str) -> Objects:
    found = [one for one in yaml.load_all(text, yaml.CSafeLoader) if one]
    return {
        (one["kind"], one["metadata"]["name"]): one
        for one in found
        if "helm.sh/hook" not in (one["metadata"].get("annotations") or {})
    }


def render(tools: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdctl", "render", "-n", "x", *arguments]
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PDCTL_CONFIG": "/nonexistent"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(("model", "network"), [("llama31-8b", "none"), ("small", "infiniband")])
def test_pdctl_and_helmfile_render_the_same(
    tools: pathlib.Path, call: Callable[..., subprocess.CompletedProcess[str]], model: str, network: str
) -> None:
    state = f"model={model},network={network}"
    told = call("helmfile", "--helm-binary", tools / "helm", "-n", "x", "--state-values-set", state, "template")
    assert told.returncode == 0, told.stderr
    ours = render(tools, "--model", model, "--network", network)
    assert ours.returncode == 0, ours.stderr
    theirs, mine = by_name(told.stdout), by_name(ours.stdout)
    assert theirs.keys() == mine.keys()
    assert [key for key in mine if mine[key] != theirs[key]] == []


def test_a_misspelt_key_is_told_with_the_one_that_is_meant(tools: pathlib.Path) -> None:
    done = render(tools, "--set", "engines.prefil.replicas=2", "--set", "engines.decode.replica=2")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "the values of ms-llama31 cannot be used" in said
    assert "'prefil' not allowed (meant: prefill?)" in said
    assert "'replica' not allowed (meant: replicas?)" in said
