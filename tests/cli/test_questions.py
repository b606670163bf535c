"""Questions at a terminal can be left by the first Ctrl-C."""

import os
import sys
from pathlib import Path

from support.api import Api, Request
from support.terminal import Terminal

HELM = "#!/bin/sh\n[ $1 = version ] && exec echo v3.18.0\necho Error: release: not found >&2\nexit 1\n"


def answer(one: Request) -> None:
    if one.command != "GET":
        one.refuse(500, "", "nothing may be changed")
    elif "/secrets" in one.path:
        one.tell(200, items=[{"metadata": {"name": "a-token"}}])
    else:
        one.tell(200, metadata={"name": "space", "uid": "1"}, items=[], groups=[], resources=[])


def test_the_first_ctrl_c_at_the_question_of_cleanup_ends_it(tmp_path: Path) -> None:
    helm = tmp_path / "helm"
    helm.write_text(HELM)
    helm.chmod(0o755)
    with Api(answer) as api:
        environment = os.environ | {
            "KUBECONFIG": str(api.kubeconfig(tmp_path)), "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "XDG_STATE_HOME": str(tmp_path), "NO_COLOR": "1", "TERM": "xterm",
        }  # fmt: skip
        command = [sys.executable, "-m", "pdctl", "cleanup", "--namespace", "space"]
        with Terminal(command, environment, tmp_path) as terminal:
            terminal.until("Remove this")
            terminal.press("\x03")
            terminal.until("interrupted; nothing was changed", 20)
            assert terminal.end(20) == 130
