"""Nodes that exist only in the API, kept by kwok, whose pods run as local processes at addresses that answer.

kwok keeps the nodes alive and answers `kubectl logs` and `port-forward`; `kubelet` does for their pods what a kubelet
does. Addresses of pods are made local to this machine, so that whoever binds one is reached there.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .control_plane import BIN, ROOT, Cluster, ClusterError, ControlPlane, NotPossible, free_ports
from .slots import claimed_slot, fake_pods, folder_of, ports

GPUS = 8
PROGRAMS = pathlib.Path(__file__).parent / "programs"  # what `kubectl exec` finds in a pod
CRDS = ("attaches", "clusterexecs", "execs", "logs", "portforwards")


def pod_range(slot: int, node: int) -> str:
    """Give the addresses of a node's pods; no two clusters of one machine have the same."""
    return f"10.250.{slot * 4 + node}.0/24"


@contextlib.contextmanager
def local_addresses(network: str) -> Iterator[None]:
    """Make a network's addresses this machine's own: any process may listen on any of them.

    Raises:
        NotPossible: this process may not.
    """
    if shutil.which("ip") is None:
        raise NotPossible("there is no ip on PATH (Debian: iproute2)")
    made = _ip("replace", network)  # a session that was killed may have left it
    if made.returncode != 0:
        raise NotPossible(f"addresses of pods cannot be made local, which needs root: {made.stderr.strip()}")
    try:
        yield
    finally:
        _ip("del", network)


def _ip(verb: str, network: str) -> subprocess.CompletedProcess[str]:
    command = ["ip", "route", verb, "local", network, "dev", "lo", "table", "local"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _node(name: str, pods: str) -> dict[str, Any]:
    room = {"cpu": "192", "memory": "2000Gi", "pods": "110", "ephemeral-storage": "10Ti", "nvidia.com/gpu": str(GPUS)}
    labels = {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "nvidia.com/gpu.product": "NVIDIA-H200",
    }
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
        "spec": {"podCIDR": pods, "podCIDRs": [pods]},
        "status": {"capacity": room, "allocatable": room},
    }


@contextlib.contextmanager
def fake_nodes(
    plane: Cluster, slot: int, names: Sequence[str] = ("gpu-0", "gpu-1"), address: str = "127.0.0.1"
) -> Iterator[None]:
    """Add nodes of 8 GPUs each, Ready, with a kubelet for all of them; all but kwok's resources go again.

    Args:
        plane: where they are added, beside whatever nodes it has.
        slot: the cluster's.
        names: of the nodes.
        address: of this machine, where the API server reaches it.

    Raises:
        ClusterError: they do not come up.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(local_addresses(fake_pods(slot)))
        kustomize = (BIN / "kwok").resolve().parent / "kustomize"
        for name in CRDS:
            file = kustomize / f"crd/bases/kwok.x-k8s.io_{name}.yaml"
            applied = plane.run("kubectl", "apply", "--server-side", "-f", str(file))
            if applied.returncode != 0:
                raise ClusterError(f"kwok's resources: {applied.stderr}")
        stages = [*(kustomize / "stage/node/fast").glob("node-*.yaml")]
        stages += (kustomize / "stage/node/heartbeat-with-lease").glob("node-*.yaml")
        (plane.folder / "kwok.yaml").write_text("\n---\n".join(file.read_text() for file in stages))
        [port] = free_ports(1, address)
        plane.programs.start(
            "kwok", BIN / "kwok", f"--kubeconfig={plane.kubeconfig}", "--config=kwok.yaml",
            "--manage-all-nodes=false", "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake",
            "--tls-cert-file=admin.crt", "--tls-private-key-file=admin.key", "--node-lease-duration-seconds=40",
            f"--node-ip={address}", "--node-name=localhost", f"--node-port={port}",
            f"--server-address={address}:{port}",
            "--enable-crds=Attach,ClusterExec,Exec,Logs,PortForward",
            environment={"PATH": f"{PROGRAMS}:/usr/bin:/bin", "HOME": "/tmp"},  # what is exec'd is looked for there
        )  # fmt: skip
        held.callback(plane.programs.kill, "kwok")
        for number, name in enumerate(names):
            plane.api.post("/api/v1/nodes", json=_node(name, pod_range(slot, number))).raise_for_status()
            held.callback(plane.api.delete, f"/api/v1/nodes/{name}")
        plane.programs.start(
            "kubelet", sys.executable, "-m", "cluster.kubelet", plane.folder, plane.url, *names,
            environment={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        held.callback(plane.programs.kill, "kubelet")
        plane.until(lambda: all(map(_usable, _those(plane, names))), "the nodes are Ready")
        yield


def _those(plane: Cluster, names: Sequence[str]) -> list[dict[str, Any]]:
    return [one for one in plane.items("/api/v1/nodes") if one["metadata"]["name"] in names]


def _usable(node: dict[str, Any]) -> bool:
    conditions = {one["type"]: one["status"] for one in node["status"].get("conditions", ())}
    return conditions.get("Ready") == "True" and not node["spec"].get("taints")


@contextlib.contextmanager
def fake_cluster() -> Iterator[ControlPlane]:
    """Give a control plane with two nodes of 8 GPUs, all of it gone afterwards.

    Raises:
        ClusterError: it cannot be had here.
    """
    with (
        claimed_slot() as slot,
        folder_of(slot) as folder,
        ControlPlane(folder, ports(slot)) as plane,
        fake_nodes(plane, slot),
    ):
        yield plane
