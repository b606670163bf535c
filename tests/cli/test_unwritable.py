"""Files that cannot be written."""

import asyncio
import os
from pathlib import Path
from typing import Any, cast

import pytest

from pdctl.cluster.deploying import Deploying, Plan
from pdctl.cluster.identity import user
from support.shell import Shell


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("bench 20 2 --url http://127.0.0.1:9", "--output"),
        ("compare --routers ours,vllm-router 20 2", "--report"),
        ("calibrate http://127.0.0.1:9", "--output"),
        ("record fetch --admin http://127.0.0.1:9", "--output"),
        ("plan", "--emit-values"),
        ("replay absent.jsonl", "--output"),
        ("replay absent.jsonl", "--report"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_any_work_for_it(words: str, option: str, tmp_path: Path) -> None:
    answer = Shell(tmp_path).run(*words.split(), option, str(tmp_path / "absent" / "file.json"))
    assert answer.returncode == 2
    assert "file.json cannot be written: No such file or directory" in answer.stderr
    assert f"choose another {option}" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_name_that_no_file_can_have_is_told_without_a_traceback(tmp_path: Path) -> None:
    answer = Shell(tmp_path).run("plan", "--emit-values", "x" * 300)
    assert answer.returncode == 2
    assert "cannot be written: File name too long" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_looking_whether_a_file_can_be_written_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("here before")
    (tmp_path / "link.json").symlink_to("nowhere.json")
    for name in ("kept.json", "new.json", "link.json"):
        answer = Shell(tmp_path).run("record", "fetch", "--admin", "http://127.0.0.1:9", "--output", name)
        assert answer.returncode == 3
    assert kept.read_text() == "here before"
    assert not (tmp_path / "new.json").exists()
    assert (tmp_path / "link.json").is_symlink()
    assert not (tmp_path / "nowhere.json").exists()


def test_a_state_folder_that_cannot_be_is_told_with_what_to_set(tmp_path: Path) -> None:
    environment = {"XDG_STATE_HOME": "/dev/null"}
    answer = Shell(tmp_path).run("deploy", "--local", "-y", environment=environment)
    assert answer.returncode == 3
    assert "/dev/null/pdctl/local: Not a directory" in answer.stderr
    assert "set HOME, or XDG_STATE_HOME" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_full_disk_is_told_with_what_to_do(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    folder = shell.state / "local"
    folder.mkdir(parents=True)
    (folder / "deployment.json.new").symlink_to("/dev/full")
    answer = shell.run("deploy", "--local", "--prefill", "1", "--decode", "1", "-y")
    assert answer.returncode == 1
    assert "No space left on device" in answer.stderr
    assert "make room on the disk" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_no_namespace_is_made_for_a_deployment_that_cannot_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        made: tuple[str, ...] = ()

        async def apply(self, path: str, thing: Any) -> None:
            self.made += (path,)
            raise AssertionError("the namespace was made")

    async def lock() -> None:
        async with Deploying(plan, cast(Any, None)).locked():
            pass

    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    api = Api()
    plan = Plan(cast(Any, api), cast(Any, None), "x", (), {}, cast(Any, None), {}, None, [], "")
    with pytest.raises(NotADirectoryError):
        asyncio.run(lock())
    assert api.made == ()


def test_a_user_without_a_name_is_told_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2_000_000_007)
    assert user() == "uid 2000000007"
