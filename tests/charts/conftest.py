"""The programs that the tests of the charts call, and rendering with them."""

import os
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from .variants import VARIANTS

ROOT = pathlib.Path(__file__).parents[2]
NAMESPACE = "vllm-router-pd-llama31"
SCRIPT = ROOT / "scripts/tools.sh"

Objects = list[dict[str, Any]]


@pytest.fixture(scope="session")
def tools() -> pathlib.Path:
    """Give the folder of the programs, made when one is missing; a failure, never a skip, when they cannot be had."""
    made = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False, timeout=3600)
    if made.returncode != 0:
        pytest.fail(f"the tools are not complete; call make tools\n{made.stderr}", pytrace=False)
    return ROOT / ".tools/bin"


@pytest.fixture(scope="session")
def call(tools: pathlib.Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Give a function that runs one of the programs in the repository."""

    def run(name: str, *arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
        # Helm must find neither a cluster nor plugins of the person who runs the tests.
        nowhere = {"KUBECONFIG": "/nonexistent", "HELM_PLUGINS": "/nonexistent"}
        return subprocess.run(
            [tools / name, *arguments],
            cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def render(call: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Objects]:
    """Give a function that renders a chart and reads the objects."""

    def rendered(chart: str, *arguments: str, release: str | None = None, helm: str = "helm") -> Objects:
        release = release or {"pd-engines": "ms-llama31", "pd-router": "vllm-router-llama31"}.get(chart, chart)
        kubernetes = ("--kube-version", "v1.36.0")  # otherwise that of the libraries in each Helm
        done = call(helm, "template", release, f"charts/{chart}", "-n", NAMESPACE, *kubernetes, *arguments)
        assert done.returncode == 0, done.stderr
        return [one for one in yaml.safe_load_all(done.stdout) if one]

    return rendered


@pytest.fixture(scope="session")
def everything(render: Callable[..., Objects]) -> dict[str, Objects]:
    """Give what is rendered from each of the variants."""
    return {name: render(*arguments) for name, arguments in VARIANTS.items()}
