"""The charts as releases in a cluster, and what the cluster says of them."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .control_plane import BIN, Cluster, ClusterError

MODEL = "tiny"
ENGINES = {
    "model": {"name": MODEL},
    "cache": {"size": "1Gi"},
    "shmSize": "64Mi",
    "startupSeconds": 60,
    "shutdown": {"leaveSeconds": 1, "drainSeconds": 10},
    "env": {"PD_SIM_FLAGS": "--speed=4 --seed=1 --num-gpu-blocks=2000"},
}
ROUTER = {
    "shutdown": {"leaveSeconds": 1, "drainSeconds": 10},
    "config": {"health_interval_secs": 0.3},
}
"""Values for simulated engines whose life is short."""


class Releases:
    """Releases of the charts in one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace

    def helm(self, *arguments: str, values: Any = None, seconds: float = 180) -> subprocess.CompletedProcess[str]:
        """Call helm in the namespace; values go through its standard input."""
        given = [] if values is None else ["-f", "-"]
        told = None if values is None else json.dumps(values)
        done = self.cluster.run("helm", *arguments, "-n", self.namespace, *given, stdin=told, seconds=seconds)
        assert done.returncode == 0, f"helm {arguments}: {done.stdout}{done.stderr}{self.told()}"
        return done

    def engines(self, release: str, prefill: int, decode: int, **values: Any) -> None:
        """Install or upgrade a release of engines."""
        told = ENGINES | {"prefill": {"replicas": prefill}, "decode": {"replicas": decode}} | values
        self.helm("upgrade", "--install", release, "charts/pd-engines", values=told)

    def router(self, release: str, engines: str, **values: Any) -> None:
        """Install or upgrade a release of the router before a release of engines."""
        told = ROUTER | {"engines": {"release": engines}} | values
        self.helm("upgrade", "--install", release, "charts/pd-router", values=told)

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 60) -> str:
        """Call kubectl in the namespace and give what it prints."""
        done = self.cluster.run("kubectl", "-n", self.namespace, *arguments, stdin=stdin, seconds=seconds)
        assert done.returncode == 0, f"kubectl {arguments}: {done.stderr}{self.told()}"
        return done.stdout

    def own_rights(self, account: str) -> set[tuple[str, ...]]:
        """Give resource and verbs of what an account of the namespace may do beyond what every account may."""

        def rights(namespace: str, name: str) -> set[tuple[str, ...]]:
            groups = ("--as-group=system:serviceaccounts", "--as-group=system:authenticated")
            who = f"--as=system:serviceaccount:{namespace}:{name}"
            told = self.kubectl("auth", "can-i", "--list", "--no-headers", who, *groups)
            return {tuple(part for part in line.split() if part != "[]") for line in told.splitlines()}

        return rights(self.namespace, account) - rights("default", "default")

    @contextmanager
    def forwarded(self, what: str, port: int) -> Iterator[str]:
        """Forward a port of a pod or Service and give the address of its other end."""
        command = [BIN / "kubectl", "-n", self.namespace, "port-forward", what, f":{port}"]
        environment = os.environ | self.cluster.environment
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            said = process.stdout.readline()  # Forwarding from 127.0.0.1:40123 -> 8200
            try:
                yield "http://" + said.split()[2]
            finally:
                process.kill()

    def pods(self, release: str, role: str | None = None) -> list[dict[str, Any]]:
        """Give the pods of a release that are not on their way out."""
        selector = f"app.kubernetes.io/instance={release}" + (f",llm-d.ai/role={role}" if role else "")
        found = self.cluster.items(f"/api/v1/namespaces/{self.namespace}/pods", labelSelector=selector)
        return [one for one in found if "deletionTimestamp" not in one["metadata"]]

    def addresses(self, release: str, role: str | None = None) -> set[str]:
        """Give the addresses of a release's ready pods."""
        return {one["status"]["podIP"] for one in self.pods(release, role) if is_ready(one)}

    def until_ready(self, release: str, count: int, seconds: float = 90) -> None:
        """Wait until a release has so many ready pods and no other."""
        try:
            self.cluster.until(
                lambda: [is_ready(one) for one in self.pods(release)] == [True] * count,
                f"{release} has {count} ready pods and no other",
                seconds,
            )
        except ClusterError as error:
            raise AssertionError(f"{error}{self.told()}") from error

    def until_restarted(self, pod: dict[str, Any], restarts: int, reason: str | None = None) -> None:
        """Wait until a pod's container has restarted so many times and is Ready, and ended last for this reason."""

        def restarted() -> bool:
            told = self.cluster.api.get(f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}").json()
            [container] = told["status"]["containerStatuses"]
            ended = container["lastState"].get("terminated", {}).get("reason")
            return container["restartCount"] >= restarts and is_ready(told) and reason in (None, ended)

        self.cluster.until(restarted, "the pod restarts and is Ready")

    def told(self) -> str:
        """Give the pods and the last events, for messages of tests."""
        pods = self.cluster.run("kubectl", "-n", self.namespace, "get", "pods", "-o", "wide").stdout
        events = self.cluster.run("kubectl", "-n", self.namespace, "get", "events").stdout
        return f"\n{pods}\n" + "\n".join(events.splitlines()[-10:])


def is_ready(pod: dict[str, Any]) -> bool:
    """Whether the API calls a pod Ready."""
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", ()))
