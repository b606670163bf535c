"""scripts/tools.sh: what is on PATH is linked, what is missing is said with the next step."""

import os
import pathlib
import shutil
import subprocess

import pytest

from .conftest import ROOT


@pytest.fixture
def elsewhere(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a folder with the script and a PATH of its own that has what the script itself needs, but no Go."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/tools.sh", tmp_path / "scripts")
    (tmp_path / "path").mkdir()
    for name in (
        "bash",
        "awk",
        "grep",
        "sed",
        "dirname",
        "mkdir",
        "ln",
        "nproc",
        "uname",
        "mktemp",
        "mv",
        "rm",
        "tail",
        "flock",
    ):
        program = shutil.which(name)
        if program:
            (tmp_path / "path" / name).symlink_to(program)
    return tmp_path


def tools(folder: pathlib.Path, *names: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(folder / "path"), "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        ["bash", folder / "scripts/tools.sh", *names],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def program(folder: pathlib.Path, name: str, said: str) -> None:
    file = folder / "path" / name
    file.write_text(f"#!{shutil.which('bash')}\necho '{said}'\n")
    file.chmod(0o755)


def test_a_program_on_path_of_a_fitting_version_is_linked(elsewhere: pathlib.Path) -> None:
    program(elsewhere, "helm", "v4.3.1")
    program(elsewhere, "kubeconform", "v0.8.0")
    done = tools(elsewhere, "helm", "kubeconform")
    assert done.returncode == 0, done.stderr
    for name in ("helm", "kubeconform"):
        assert os.readlink(elsewhere / ".tools/bin" / name) == str(elsewhere / "path" / name)


@pytest.mark.parametrize("version", ["v3.18.6", "v4.1.0", "v5.0.0", "not a version"])
def test_a_program_of_another_version_is_not_linked(elsewhere: pathlib.Path, version: str) -> None:
    program(elsewhere, "helm", version)
    done = tools(elsewhere, "helm")
    assert done.returncode == 1
    assert not (elsewhere / ".tools/bin/helm").exists()
    assert "install Go 1.26 or newer" in done.stderr


def test_what_writes_compared_files_is_never_another_version(elsewhere: pathlib.Path) -> None:
    program(elsewhere, "helm-docs", "helm-docs version 1.14.2")
    assert tools(elsewhere, "helm-docs").returncode == 1


def test_without_go_it_says_what_to_install(elsewhere: pathlib.Path) -> None:
    done = tools(elsewhere, "helmfile")
    assert done.returncode == 1
    assert done.stderr == (
        "tools: helmfile: nothing that fits is on PATH, and no go to build it with; install Go 1.26 or newer\n"
    )


def test_a_build_that_fails_shows_its_last_lines_and_leaves_nothing(elsewhere: pathlib.Path) -> None:
    file = elsewhere / "path/go"
    file.write_text(f"#!{shutil.which('bash')}\necho 'no route to the module proxy' >&2\nexit 1\n")
    file.chmod(0o755)
    done = tools(elsewhere, "kubeconform")
    assert done.returncode == 1
    assert "no route to the module proxy" in done.stderr
    assert "kubeconform cannot be built" in done.stderr
    assert [path.name for path in (elsewhere / "cache/pdctl/tools").iterdir()] == [".kubeconform.lock"]


def test_what_was_built_once_is_linked_by_the_next_checkout(elsewhere: pathlib.Path) -> None:
    file = elsewhere / "path/go"
    file.write_text(f'#!{shutil.which("bash")}\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n: > go.sum\n')
    file.chmod(0o755)
    first = tools(elsewhere, "kubeconform")
    assert first.returncode == 0, first.stderr
    assert "kubeconform v0.7.0: building" in first.stderr
    file.unlink()
    shutil.rmtree(elsewhere / ".tools")
    second = tools(elsewhere, "kubeconform")
    assert (second.returncode, second.stderr) == (0, "")
    assert (elsewhere / ".tools/bin/kubeconform").read_text() == "built\n"


def test_a_name_that_it_does_not_know_is_told_with_those_that_it_knows(elsewhere: pathlib.Path) -> None:
    done = tools(elsewhere, "kubctl")
    assert done.returncode == 1
    assert "there is no kubctl; known: helm helm3 helmfile" in done.stderr
