"""Addresses and files that cannot be what they are given as."""

from pathlib import Path

import pytest

from support.shell import Shell


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("bench 20 2 --url http://127.0.0.1:port", 1, "does not tell a model"),
        ("calibrate http://127.0.0.1:port", 1, "could not be measured"),
        ("record start --admin http://127.0.0.1:port", 2, "is no address"),
    ],
)
def test_an_address_whose_port_is_no_number_is_told(words: str, code: int, said: str, tmp_path: Path) -> None:
    answer = Shell(tmp_path).run(*words.split())
    assert answer.returncode == code
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("engines: {note: caf\xe9}".encode("latin-1"), "values.yaml is not YAML: 'utf-8' codec can't decode"),
        (b"engines: {since: 2024-99-01}", "values.yaml is not YAML: month must be"),
        (b"1: one\nx: two\n", "values.yaml has 1, x at its top"),
    ],
)
def test_a_values_file_that_cannot_be_is_told(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_bytes(content)
    answer = Shell(tmp_path).run("render", "-f", "values.yaml")
    assert answer.returncode == 2
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_configuration_file_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes("name = 'caf\xe9'".encode("latin-1"))
    answer = Shell(tmp_path).run("status", environment={"PDCTL_CONFIG": str(file)})
    assert answer.returncode == 2
    assert "config.toml cannot be used: 'utf-8' codec can't decode" in answer.stderr
    assert "Traceback" not in answer.stderr
