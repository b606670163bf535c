"""A Kubernetes API that takes connections and never answers."""

import json
import socket
from pathlib import Path

from support.shell import Shell


def test_an_api_that_never_answers_is_told_with_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"https://127.0.0.1:{silent.getsockname()[1]}"
        told = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "me", "user": {"token": "secret"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(json.dumps(told))
        environment = {"KUBECONFIG": str(tmp_path / "kubeconfig")}
        answer = Shell(tmp_path).run("status", "--namespace", "x", environment=environment)
    assert answer.returncode == 3
    assert f"the Kubernetes API at {server} does not answer" in answer.stderr
    assert "choose another --context" in answer.stderr
    assert "Traceback" not in answer.stderr
