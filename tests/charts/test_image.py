"""The router's image: what is in it, and that it serves as it is."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator

import pytest
import yaml

from support.processes import Process, engine, new_address, start_all

from .conftest import ROOT

pytestmark = pytest.mark.timeout(900)  # the router is compiled for it
IMAGE = [sys.executable, str(ROOT / "scripts/image.py")]


def image(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*IMAGE, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=900)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    if "VERSION_CODENAME=bookworm" not in pathlib.Path("/etc/os-release").read_text():
        pytest.skip("the image is made of Debian 12's packages, which only a Debian 12 fetches")
    file = tmp_path_factory.mktemp("image") / "router.tar"
    made = image("build", file)
    assert made.returncode == 0, made.stderr
    yield file
    shutil.rmtree(file.parent)  # pytest would keep a few of 250 MB each


@pytest.fixture(scope="module")
def laid_out(archive: pathlib.Path) -> pathlib.Path:
    folder = archive.parent / "laid-out"
    assert image("unpack", archive, folder).returncode == 0
    return folder


def test_nothing_is_in_it_that_does_not_belong_there(laid_out: pathlib.Path) -> None:
    checked = image("check", laid_out)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("usr/bin/gcc", "usr/bin/gcc has no use in the image"),
        ("bin/sh", "bin/sh has no use in the image"),
        ("opt/pd-router/pip/__init__.py", "has no use in the image"),
        ("opt/pd-router/stowaway-1.0.dist-info/METADATA", "stowaway is installed, but the SBOM does not list it"),
    ],
)
def test_what_does_not_belong_there_would_be_seen(laid_out: pathlib.Path, path: str, said: str) -> None:
    file = laid_out / "root" / path
    made = [above for above in file.parents if not above.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("")
    try:
        checked = image("check", laid_out)
    finally:
        file.unlink()
        for above in made:
            above.rmdir()
    assert checked.returncode == 1
    assert said in checked.stdout


def test_its_user_is_a_number_that_is_not_root_and_its_label_names_the_sbom(laid_out: pathlib.Path) -> None:
    config = json.loads((laid_out / "config.json").read_text())
    assert config["User"] == "65532:65532"
    sbom = json.loads((laid_out / "root" / config["Labels"]["org.pdctl.sbom"].lstrip("/")).read_text())
    assert sbom["bomFormat"] == "CycloneDX"
    listed = {one["name"] for one in sbom["components"]}
    assert {"uvloop", "httptools", "orjson", "httpx"} <= listed
    assert not {"pytest", "mypy", "typer", "rich"} & listed


def test_its_ports_and_user_are_those_of_the_chart(laid_out: pathlib.Path) -> None:
    config = json.loads((laid_out / "config.json").read_text())
    values = yaml.safe_load((ROOT / "charts/pd-router/values.yaml").read_text())
    assert set(config["ExposedPorts"]) == {f"{values['service'][key]}/tcp" for key in ("port", "metricsPort")}
    assert config["User"].split(":")[0] == str(values["runAsUser"])


def test_both_stages_are_pinned_by_digest() -> None:
    stages = [
        line for line in (ROOT / "router/Dockerfile").read_text().splitlines() if line.startswith(("FROM", "ARG B"))
    ]
    images = [line.partition("=")[2] for line in stages if line.startswith("ARG")]
    assert len(images) == 2
    assert all("@sha256:" in one for one in images)
    assert all("${" in line for line in stages if line.startswith("FROM"))


def test_the_same_sources_give_the_same_image(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    again = tmp_path / "again.tar"
    assert image("build", again).returncode == 0
    with tarfile.open(archive) as one, tarfile.open(again) as other:
        assert one.getnames() == other.getnames()  # names are digests of what they hold
    again.unlink()


@pytest.fixture(scope="module")
def served(laid_out: pathlib.Path) -> Iterator[tuple[Process, list[Process]]]:
    """Start the image's entry point in its read-only root file system as its user, in front of engines."""
    if os.geteuid() != 0 and subprocess.run(["unshare", "--map-root-user", "true"], check=False).returncode != 0:
        pytest.skip("this machine gives no namespaces to this user")
    engines = [engine("prefill", "--speed", "50"), engine("decode", "--speed", "50")]
    host = new_address()
    told = ["--host", host, "--prometheus-host", host, "--prefill", engines[0].url, "--decode", engines[1].url]
    front = Process([*IMAGE, "run", str(laid_out), *told], f"http://{host}:10001", "/ready")
    start_all([*engines, front])
    yield front, engines
    for one in (front, *engines):
        one.stop()


def test_it_serves_from_a_root_file_system_that_it_cannot_write(served: tuple[Process, list[Process]]) -> None:
    front, engines = served
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True}
    told = front.post("/v1/completions", body).json()
    assert told["usage"]["completion_tokens"] == 4
    assert [one.get("/sim/violations") for one in engines] == [[], []]


def test_its_processes_are_not_roots_and_hold_no_capability(served: tuple[Process, list[Process]]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can start it as another user")
    status = pathlib.Path(f"/proc/{served[0].process.pid}/status").read_text()
    told = dict(line.split(":", 1) for line in status.splitlines())
    assert set(told["Uid"].split()) == {"65532"}
    assert int(told["CapEff"], 16) == 0


def test_the_test_of_the_chart_runs_in_it(served: tuple[Process, list[Process]], laid_out: pathlib.Path) -> None:
    front, _ = served
    files = ROOT / "charts/pd-router/files"
    there = laid_out.parent / "test"
    there.mkdir()
    (there / "kv_moves.py").write_bytes((files / "kv_moves.py").read_bytes())
    told = {"ROUTER": front.url, "METRICS": front.url.replace(":10001", ":29000"), "SECONDS": "30"}
    variables = [part for name, value in told.items() for part in ("--env", f"{name}={value}")]
    done = image(
        "run",
        "--entry-point",
        "/usr/bin/python3",
        "--mount",
        f"{there}:/test",
        *variables,
        laid_out,
        "/test/kv_moves.py",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("KV moves from prefill to decode\n")


def test_sigterm_reaches_the_router_and_ends_it(laid_out: pathlib.Path) -> None:
    host = new_address()
    told = [
        "--host",
        host,
        "--prometheus-host",
        host,
        "--prefill",
        "http://127.0.0.1:1",
        "--decode",
        "http://127.0.0.1:2",
    ]
    front = Process([*IMAGE, "run", str(laid_out), *told], f"http://{host}:10001")
    start_all([front])
    assert front.stop() == 0
