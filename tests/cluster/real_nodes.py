"""Nodes with real kubelets and containers, closed off from the machine that they run on.

    python -m cluster.real_nodes FOLDER SLOT IMAGE…

All of it (control plane, containerd, kubelets, kube-proxy, CoreDNS, the pods) runs in network, mount and process
namespaces of its own: when their first process is killed, everything in them is gone, whatever state it was in. Only
control groups and the state's folder are left to remove. A pair of virtual interfaces leads in, so pods and Services
can be called from outside by their addresses.

The nodes have this machine's CPUs and memory, and claim GPUs that nobody looks for.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import psutil
import yaml

from .control_plane import (
    BIN,
    ROOT,
    Cluster,
    ClusterError,
    ControlPlane,
    NotPossible,
    die_with_parent,
    free_ports,
)
from .fake_nodes import GPUS
from .slots import GROUPS, beyond, claimed_slot, fake_pods, folder_of, outer_link, ports

PROGRAMS = ("kubelet", "kube-proxy", "coredns", "pause")
SYSTEM = ("containerd", "runc", "nft", "ip", "unshare", "ctr")
PLUGINS = ("/usr/lib/cni", "/opt/cni/bin")
NAMESPACES = "unshare --net --mount --propagation private --pid --fork --kill-child --mount-proc".split()
READY = "ready.json"
IMAGES = ("router", "simulator")


def why_not() -> str | None:
    """Say why no real nodes can be had on this machine, or None."""
    if os.geteuid() != 0:
        return "real kubelets need root"
    lacking = [name for name in SYSTEM if shutil.which(name) is None]
    lacking += [] if _plugins() else ["CNI plugins"]
    lacking += [name for name in PROGRAMS if not (BIN / name).exists()]
    if lacking:
        return f"real kubelets need {', '.join(lacking)}; call make tools as root"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"real kubelets need namespaces of their own: {tried.stderr.strip()}"
    if not (GROUPS / "memory").is_dir():
        return "real kubelets are only tried with control groups of version 1, and this machine has version 2"
    if "VERSION_CODENAME=bookworm" not in pathlib.Path("/etc/os-release").read_text():
        return "their images are made of Debian 12's packages, which only a Debian 12 fetches"
    return None


def _plugins() -> str | None:
    return next((folder for folder in PLUGINS if pathlib.Path(folder, "bridge").exists()), None)


def _image_script() -> ModuleType:
    told = importlib.util.spec_from_file_location("image", ROOT / "scripts/image.py")
    assert told
    assert told.loader
    made = importlib.util.module_from_spec(told)
    told.loader.exec_module(made)
    return made


def images(folder: pathlib.Path) -> dict[str, str]:
    """Assemble the images into archives in a folder; give their names by what they are of.

    Raises:
        ClusterError: they cannot be had.
    """
    script = _image_script()
    try:
        script.build(folder / "router.tar", "router")
        script.build(folder / "simulator.tar", "simulator", {"tests/cluster/bench_serve.py": _bench_serve})
    except script.ImageError as error:
        raise ClusterError(f"images: {error}") from error
    with contextlib.ExitStack() as held:
        root = folder / "pause"
        root.mkdir()
        held.callback(shutil.rmtree, root)
        shutil.copy((BIN / "pause").resolve(), root / "pause")
        layers = {"scripts/pause.go": script.layer(root)}
        script.pack(folder / "pause.tar", "localhost/pause:1", {"Entrypoint": ["/pause"]}, layers)
    return {of: script.tag(of) for of in IMAGES}


def _bench_serve(root: pathlib.Path) -> None:
    """Put what stands in for `vllm bench serve` beside the simulated engine, for these tests only."""
    packages = root / "opt/pd-simulator"
    shutil.copytree(ROOT / "cli/pdctl", packages / "pdctl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(pathlib.Path(__file__).with_name("bench_serve.py"), packages)
    program = packages / "bin/vllm"
    program.parent.mkdir()
    program.write_text(
        "#!/usr/bin/python3\nimport sys\n\nif sys.argv[1] == 'bench':\n    from bench_serve import main\n"
        "else:\n    from pdsim.engine.vllm import main\nmain()\n"
    )
    program.chmod(0o755)


class Node:
    """One node: its containerd and its kubelet."""

    def __init__(self, plane: ControlPlane, slot: int, number: int) -> None:
        self.plane = plane
        self.name = f"gpu-{number}"
        self.address = f"10.252.{slot}.{number + 1}"
        self.pods = f"10.251.{slot * 4 + number}.0/24"
        self.group = f"pdctl-{slot}-{self.name}"
        self.folder = plane.folder / self.name
        self.socket = self.folder / "containerd.sock"
        self.bridge = f"pods{number}"
        self.folder.mkdir()

    def containerd(self, archives: list[pathlib.Path]) -> None:
        """Start containerd and give it the images."""
        network = self.folder / "cni"
        network.mkdir()
        ranges = [[{"subnet": self.pods}]]
        plugin = {
            "type": "bridge",
            "bridge": self.bridge,
            "isGateway": True,
            "ipMasq": False,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.folder / "addresses"),
                "ranges": ranges,
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        told = {"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]}
        (network / "10-pods.conflist").write_text(json.dumps(told))
        (self.folder / "containerd.toml").write_text(CONTAINERD.format(node=self, plugins=_plugins(), cni=network,
                                                                       runc=shutil.which("runc")))  # fmt: skip
        self.plane.programs.start(f"containerd-{self.name}", "containerd", "--config", self.folder / "containerd.toml")
        self.plane.until(lambda: self.ctr("version").returncode == 0, "containerd answers")
        for archive in archives:
            done = self.ctr("-n", "k8s.io", "images", "import", str(archive))
            if done.returncode != 0:
                raise ClusterError(f"{archive.name} cannot be imported: {done.stderr}")

    def ctr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call containerd's own command line."""
        command = ["ctr", "-a", str(self.socket), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    def kubelet(self) -> None:
        """Start the kubelet and wait until the node can be used."""
        for controller in GROUPS.iterdir():
            if controller.is_dir() and controller.name != "unified":
                (controller / self.group).mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):
            (GROUPS / "cpuset" / self.group / file).write_text((GROUPS / "cpuset" / file).read_text())
        self.plane.certificate(
            self.name, self.name, self.address, group="system:nodes", user=f"system:node:{self.name}"
        )
        config = self.plane.write_kubeconfig(self.name)
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        [port], [health] = free_ports(1, self.address), free_ports(1)
        told = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "port": port,
            "healthzPort": health,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self.plane.folder / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(self.plane.folder / f"{self.name}.crt"),
            "tlsPrivateKeyFile": str(self.plane.folder / f"{self.name}.key"),
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.group}",
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "resolvConf": str(self.folder / "resolv.conf"),
            "clusterDNS": [dns_address(self.plane.services)],
            "clusterDomain": "cluster.local",
            "makeIPTablesUtilChains": False,
            "podLogsDir": str(self.folder / "logs"),
            "volumePluginDir": str(self.folder / "plugins"),
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "nodeStatusUpdateFrequency": "5s",
        }
        (self.folder / "kubelet.yaml").write_text(yaml.safe_dump(told))
        self.plane.programs.start(
            f"kubelet-{self.name}", BIN / "kubelet", f"--config={self.folder}/kubelet.yaml", f"--kubeconfig={config}",
            f"--hostname-override={self.name}", f"--node-ip={self.address}", f"--root-dir={self.folder}/kubelet",
            f"--cert-dir={self.folder}/certificates",
        )  # fmt: skip
        path = f"/api/v1/nodes/{self.name}"
        self.plane.until(lambda: self.plane.api.get(path).is_success, f"{self.name} is registered")
        patches = [
            {"op": "add", "path": f"/status/{where}/nvidia.com~1gpu", "value": str(GPUS)}
            for where in ("capacity", "allocatable")
        ]
        claimed = self.plane.api.patch(
            f"{path}/status", json=patches, headers={"Content-Type": "application/json-patch+json"}
        )
        claimed.raise_for_status()
        self.plane.until(lambda: _usable(self.plane.api.get(path).json()), f"{self.name} is Ready with {GPUS} GPUs")


CONTAINERD = """\
version = 2
root = "{node.folder}/containerd-root"
state = "{node.folder}/containerd-state"
[grpc]
  address = "{node.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  disable_apparmor = true
  restrict_oom_score_adj = true # a root without CAP_SYS_RESOURCE may not lower it
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{cni}"
"""


def _usable(node: dict[str, Any]) -> bool:
    ready = {"type": "Ready", "status": "True"}.items()
    return (
        any(ready <= one.items() for one in node["status"]["conditions"])
        and node["status"]["allocatable"].get("nvidia.com/gpu") == str(GPUS)
        and not node["spec"].get("taints")
    )


def dns_address(services: str) -> str:
    """Give the address of the DNS Service in a range."""
    return services.rpartition(".")[0] + ".10"


def proxy(plane: ControlPlane, pods: str) -> None:
    """Start kube-proxy, one for all nodes: they are in one network namespace."""
    health, metrics = free_ports(2)
    plane.programs.start(
        "kube-proxy", BIN / "kube-proxy", f"--kubeconfig={plane.kubeconfig}", "--proxy-mode=nftables",
        "--hostname-override=gpu-0", f"--cluster-cidr={pods}", f"--healthz-bind-address=127.0.0.1:{health}",
        f"--metrics-bind-address=127.0.0.1:{metrics}", "--conntrack-max-per-core=0", "--conntrack-min=0",
        "--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
    )  # fmt: skip


def dns(plane: ControlPlane, address: str) -> None:
    """Start CoreDNS beside the nodes, as the Service kube-dns."""
    [port], [ready] = free_ports(1, address), free_ports(1)
    told = (
        f".:{port} {{\n  bind {address}\n  errors\n  ready 127.0.0.1:{ready}\n"
        f"  kubernetes cluster.local in-addr.arpa {{\n    kubeconfig {plane.kubeconfig} local\n    ttl 2\n  }}\n}}\n"
    )
    (plane.folder / "Corefile").write_text(told)
    plane.programs.start("coredns", BIN / "coredns", "-conf", plane.folder / "Corefile")
    ports = [("dns", "UDP"), ("dns-tcp", "TCP")]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {
            "clusterIP": dns_address(plane.services),
            "ports": [{"name": name, "port": 53, "protocol": kind, "targetPort": port} for name, kind in ports],
        },
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns-1",
            "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": name, "port": port, "protocol": kind} for name, kind in ports],
    }
    plane.api.post("/api/v1/namespaces/kube-system/services", json=service).raise_for_status()
    slices = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices"
    plane.api.post(slices, json=endpoints).raise_for_status()


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")


def inside(folder: pathlib.Path, slot: int, archives: list[pathlib.Path], count: int = 2) -> None:
    """Bring everything up within the namespaces, say so, and stay."""
    _call("mount", "-t", "tmpfs", "tmpfs", "/run")  # what containerd and CNI keep there goes with the namespace
    _call("ip", "link", "set", "lo", "up")
    while subprocess.run(["ip", "link", "show", "outside"], capture_output=True, check=False).returncode != 0:
        time.sleep(0.02)
    services = f"10.97.{slot}.0/24"
    with ControlPlaneIn(folder, slot, services) as plane:
        nodes = [Node(plane, slot, number) for number in range(count)]
        for node in nodes:
            node.containerd(archives)
        for node in nodes:
            node.kubelet()
        proxy(plane, f"10.251.{slot * 4}.0/22")
        dns(plane, nodes[0].address)
        (folder / "ready.new").write_text(json.dumps({"url": plane.url}))
        (folder / "ready.new").rename(folder / READY)
        while True:
            plane.check()
            time.sleep(0.5)


class ControlPlaneIn(ControlPlane):
    """A control plane whose network is there before it starts."""

    def __init__(self, folder: pathlib.Path, slot: int, services: str) -> None:
        for number in (1, 2):
            _call("ip", "addr", "add", f"10.252.{slot}.{number}/24", "dev", "outside")
        _call("ip", "link", "set", "outside", "up")
        _call("ip", "route", "add", fake_pods(slot), "via", beyond(slot))
        pathlib.Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        super().__init__(folder, ports(slot), address=f"10.252.{slot}.1", services=services)


class RealCluster(Cluster):
    """The cluster in its namespaces, from outside."""

    def __init__(self, folder: pathlib.Path, url: str, process: subprocess.Popen[bytes], names: dict[str, str]) -> None:
        super().__init__(folder, url)
        self.images = names
        self.slot = int(folder.name.rpartition("-")[2])
        self._process = process
        self.connect()

    def check(self) -> None:
        """Fail when its first process has ended, with what it said."""
        super().check()
        _check(self._process, self.folder)


def _check(process: subprocess.Popen[bytes], folder: pathlib.Path) -> None:
    if process.poll() is not None:
        told = (folder / "cluster.log").read_text(errors="replace")
        raise ClusterError(f"the cluster ended with {process.returncode}:\n{told[-3000:]}")


@contextlib.contextmanager
def real_cluster() -> Iterator[RealCluster]:
    """Give a cluster with two nodes that run containers, all of it gone afterwards.

    Raises:
        NotPossible: this machine does not allow it.
        ClusterError: it does not come up.
    """
    reason = why_not()
    if reason:
        raise NotPossible(reason)
    with claimed_slot() as slot, folder_of(slot) as folder:
        names = images(folder)
        process = _started(folder, slot)
        try:
            deadline = time.monotonic() + 300
            while not (folder / READY).exists():
                _check(process, folder)
                if time.monotonic() > deadline:
                    raise ClusterError(f"the cluster is not up: {(folder / 'cluster.log').read_text()[-3000:]}")
                time.sleep(0.05)
            told = json.loads((folder / READY).read_text())
            cluster = RealCluster(folder, told["url"], process, names)
            with cluster.api, contextlib.closing(cluster.programs):
                yield cluster
        finally:
            process.kill()
            process.wait()


def _started(folder: pathlib.Path, slot: int) -> subprocess.Popen[bytes]:
    archives = [folder / f"{name}.tar" for name in (*IMAGES, "pause")]
    command = [*NAMESPACES, sys.executable, "-m", "cluster.real_nodes", folder, str(slot), *archives]
    with (folder / "cluster.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent,  # noqa: PLW1509
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children()):
            if time.monotonic() > deadline:
                raise ClusterError(f"unshare: {(folder / 'cluster.log').read_text()}")
            time.sleep(0.01)
        link = outer_link(slot)
        _call("ip", "link", "add", link, "type", "veth", "peer", "name", "outside", "netns", str(children[0].pid))
        _call("ip", "addr", "add", f"{beyond(slot)}/24", "dev", link)
        _call("ip", "link", "set", link, "up")
        for network in (f"10.251.{slot * 4}.0/22", f"10.97.{slot}.0/24"):
            _call("ip", "route", "replace", network, "via", f"10.252.{slot}.1")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process


def left_over(folder: pathlib.Path, slot: int) -> list[str]:
    """Name what is left of a cluster outside its namespaces; empty when all is as before."""
    told = str(folder)
    found = [line for line in pathlib.Path("/proc/mounts").read_text().splitlines() if told in line]
    found += [str(one) for one in GROUPS.glob(f"*/pdctl-{slot}-gpu-*")]
    found += [name for name in os.listdir("/sys/class/net") if name == outer_link(slot)]
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if told in " ".join(one.cmdline()) or one.cwd().startswith(told):
                found.append(f"process {one.pid}: {one.cmdline()}")
    return found


def main() -> None:
    """Run within the namespaces, as their first process."""
    folder, slot, *archives = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        inside(pathlib.Path(folder), int(slot), [pathlib.Path(one) for one in archives])
    except ClusterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
