"""Where options come from: a flag before its variable, that before the file, that before the default."""

import os
import pathlib
import subprocess
import sys

import pytest

FILE = """
namespace = "file"
[bench]
input-len = 7
"""


def call(tmp_path: pathlib.Path, text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "config.toml"
    file.write_text(text)
    told = os.environ | {"PDCTL_CONFIG": str(file), "XDG_STATE_HOME": str(tmp_path), "KUBECONFIG": "/nonexistent"}
    told.pop("PDCTL_NAMESPACE", None)
    command = [sys.executable, "-m", "pdctl", *arguments]
    return subprocess.run(
        command, env=told | environment, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )


@pytest.mark.parametrize(
    ("flags", "environment", "wanted"),
    [
        (("--name", "flag"), {"PDCTL_NAMESPACE": ""}, "nothing is deployed under the name 'flag'"),
        ((), {"PDCTL_NAMESPACE": "variable", "PDCTL_CONTEXT": "variable"}, "context 'variable'"),
        ((), {}, "the current context"),
        (("--context", "flag"), {"PDCTL_CONTEXT": "variable"}, "context 'flag'"),
    ],
)
def test_a_flag_decides_before_a_variable_and_that_before_the_file(
    tmp_path: pathlib.Path, flags: tuple[str, ...], environment: dict[str, str], wanted: str
) -> None:
    text = "" if "--name" in flags else FILE
    answer = call(tmp_path, text, "status", *flags, **environment)
    assert wanted in answer.stderr


def test_a_table_holds_for_its_command_only(tmp_path: pathlib.Path) -> None:
    answer = call(tmp_path, "[status]\nname = 'one'\n", "routing")
    assert "'local'" in answer.stderr
    answer = call(tmp_path, "[status]\nname = 'one'\n", "status")
    assert "'one'" in answer.stderr


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("namespac = 'x'", "'namespac', which is no option; is 'namespace' meant?"),
        ("[statu]\nname = 'x'", "'statu', which is no option; is 'status' meant?"),
        ("[status]\nnam = 'x'", "'status.nam', which is no option; is 'status.name' meant?"),
        ("name = ", "cannot be used"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path: pathlib.Path, text: str, said: str) -> None:
    answer = call(tmp_path, text, "status")
    assert answer.returncode == 2
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
