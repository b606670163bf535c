"""Files that cannot be written."""

from pathlib import Path

import pytest

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
