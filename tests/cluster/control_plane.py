"""A control plane of Kubernetes as processes on loopback: etcd, API server, controllers, scheduler.

They are the real programs (`make tools`), on free ports, with state in a folder that is thrown away. Nodes are another
matter: `fake_nodes` and `real_nodes` add them.
"""

import contextlib
import ctypes
import ipaddress
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx
import trustme
import yaml

ROOT = pathlib.Path(__file__).parents[2]
BIN = ROOT / ".tools/bin"
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl")

_NO_RIGHTS_NEEDED = "/healthz,/readyz,/livez,/metrics"
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class ClusterError(Exception):
    """The cluster cannot be started here; the message says why."""


class NotPossible(ClusterError):  # noqa: N818
    """This machine does not allow such a cluster; tests that need it are skipped with the message."""


def die_with_parent() -> None:
    """End this process when the thread that forked it ends, also by SIGKILL: for `preexec_fn`."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Give ports that nobody listens on."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((address, 0))
        return [one.getsockname()[1] for one in sockets]


class Programs:
    """Child processes by name, each with a log, ended together."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._commands: dict[str, tuple[list[str], dict[str, str] | None]] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._starter = ThreadPoolExecutor(1)  # whoever calls: a program ends with the thread that started it

    def start(self, name: str, *command: str | pathlib.Path, environment: dict[str, str] | None = None) -> int:
        """Start a program and give its process id; its log is NAME.log in the folder."""
        self._commands[name] = ([str(part) for part in command], environment)
        return self.start_again(name)

    def _start(self, name: str) -> int:
        command, environment = self._commands[name]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=environment,
                start_new_session=True, preexec_fn=die_with_parent,  # noqa: PLW1509 it takes no lock
            )  # fmt: skip
        return self._running[name].pid

    def kill(self, name: str) -> None:
        """Kill a program; what they keep is thrown away anyhow, and SIGTERM would take 15 seconds."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def start_again(self, name: str) -> int:
        """Start a killed program as before."""
        return self._starter.submit(self._start, name).result()

    def close(self) -> None:
        """Kill all, the last started first."""
        for process in reversed(self._running.values()):
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def log(self, name: str) -> str:
        """Give what a program wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def check(self) -> None:
        """Fail when one has ended by itself.

        Raises:
            ClusterError: with the end of its log.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                raise ClusterError(f"{name} ended with {process.returncode}:\n{self.log(name)[-2000:]}")


class Cluster:
    """A cluster as its users see it.

    Attributes:
        url: The API server's address.
        programs: What runs for it on this machine.
        kubeconfig: For a person who may do everything, the context `local`.
        api: A client of the API as that person. Errors are raised by whoever asks (`raise_for_status`).
    """

    def __init__(self, folder: pathlib.Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self.programs = Programs(folder)
        self.kubeconfig = folder / "admin.kubeconfig"
        self.api: httpx.Client

    def connect(self) -> None:
        """Make the client, once the certificates are there."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        context.load_cert_chain(self.folder / "admin.crt", self.folder / "admin.key")
        self.api = httpx.Client(base_url=self.url, verify=context, timeout=30, trust_env=False)

    def check(self) -> None:
        """Fail when what the cluster consists of has ended, and was not killed here.

        Raises:
            ClusterError: it has.
        """
        self.programs.check()

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
        """Poll until the condition is true and give its value; an exception of it counts as false.

        Raises:
            ClusterError: the cluster ended meanwhile, or it never becomes true.
        """
        deadline = time.monotonic() + seconds
        why: Exception | None = None
        while time.monotonic() < deadline:
            self.check()
            try:
                value = condition()
            except (httpx.HTTPError, OSError, KeyError) as error:
                why = error
            else:
                if value:
                    return value
            time.sleep(0.05)
        raise ClusterError(f"not within {seconds:g} s: {what}" + (f" ({why})" if why else ""))

    def answers(self) -> bool:
        """Whether the API server is ready."""
        return self.api.get("/readyz").text == "ok"

    def run(self, *command: str, stdin: str | None = None, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a program of `make tools` (kubectl, helm, helmfile) on this cluster, in the repository."""
        name, *arguments = command
        told = os.environ | self.environment
        return subprocess.run(
            [BIN / name, *arguments],
            cwd=ROOT, env=told, input=stdin, capture_output=True, text=True, check=False, timeout=seconds,
        )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to find this cluster, and nothing of the person who runs the tests."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return {
            "KUBECONFIG": str(self.kubeconfig),
            "HOME": str(home),
            "HELM_PLUGINS": "/nonexistent",
            "NO_PROXY": "127.0.0.1,localhost,10.0.0.0/8",
            "no_proxy": "127.0.0.1,localhost,10.0.0.0/8",
        }

    def items(self, path: str, **query: str) -> list[dict[str, Any]]:
        """List objects: `items("/api/v1/pods", labelSelector="…")`."""
        answer = self.api.get(path, params=query)
        answer.raise_for_status()
        listed: list[dict[str, Any]] = answer.json()["items"]
        return listed


class ControlPlane(Cluster):
    """etcd, API server, controllers and scheduler; a context that starts and ends them.

    Args:
        folder: Where everything is kept; it must exist and have a short name, since sockets may be made in it.
        ports: Of its programs (`slots.ports`).
        address: Where the API server can be reached by nodes; loopback when nodes are fake.
        services: Range of the Services' addresses.
        node_grace: Seconds without a sign of life until a node counts as lost.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        ports: Sequence[int],
        address: str = "127.0.0.1",
        services: str = "10.96.0.0/16",
        node_grace: float = 200.0,
    ) -> None:
        missing = [name for name in PROGRAMS if not (BIN / name).exists()]
        if missing:
            raise ClusterError(f"{', '.join(missing)} are not in {BIN}; call make tools")
        self.api_port, self._etcd, self._peers, self._controllers, self._scheduler = ports[:5]
        super().__init__(folder, f"https://{address}:{self.api_port}")
        self.services = services
        self._address = address
        self._node_grace = node_grace

    def __enter__(self) -> Self:
        """Start; the API answers and pods are taken and scheduled when it returns.

        Raises:
            ClusterError: something does not start.
        """
        try:
            self._start()
        except BaseException:
            self.programs.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.api.close()
        self.programs.close()

    def _start(self) -> None:
        first = str(ipaddress.ip_network(self.services)[1])
        self._authority = trustme.CA(organization_name="pdctl tests")
        (self.folder / "ca.crt").write_bytes(self._authority.cert_pem.bytes())
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1", "::1", first)
        self.certificate("admin", *names, self._address, group="system:masters")
        self.write_kubeconfig("admin")
        self.connect()

        etcd, peers = f"http://127.0.0.1:{self._etcd}", f"http://127.0.0.1:{self._peers}"
        self.programs.start(
            "etcd", BIN / "etcd", "--name=only", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync=true",
            f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}", f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=only={peers}", "--log-level=warn",
        )  # fmt: skip
        self.until(lambda: '"true"' in httpx.get(f"{etcd}/health", trust_env=False).text, "etcd answers")

        everywhere = self._address != "127.0.0.1"
        self.programs.start(
            "kube-apiserver", BIN / "kube-apiserver", f"--etcd-servers={etcd}", f"--secure-port={self.api_port}",
            f"--bind-address={'0.0.0.0' if everywhere else '127.0.0.1'}",
            *([f"--advertise-address={self._address}"] if everywhere else ["--endpoint-reconciler-type=none"]),
            "--kubelet-preferred-address-types=InternalIP,Hostname",
            "--tls-cert-file=admin.crt", "--tls-private-key-file=admin.key", "--client-ca-file=ca.crt",
            "--service-account-key-file=admin.key", "--service-account-signing-key-file=admin.key",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--kubelet-client-certificate=admin.crt", "--kubelet-client-key=admin.key",
            "--proxy-client-cert-file=admin.crt", "--proxy-client-key-file=admin.key",
            "--authorization-mode=Node,RBAC", "--allow-privileged=true",
            f"--service-cluster-ip-range={self.services}",
            "--max-requests-inflight=0", "--max-mutating-requests-inflight=0", "--enable-priority-and-fairness=false",
            "--profiling=false",
        )  # fmt: skip
        self.until(self.answers, "the API server answers")

        common = [
            f"--kubeconfig={self.kubeconfig}", "--bind-address=127.0.0.1", "--leader-elect=false",
            f"--authorization-always-allow-paths={_NO_RIGHTS_NEEDED}", "--kube-api-qps=5000", "--kube-api-burst=10000",
        ]  # fmt: skip
        self.programs.start(
            "kube-controller-manager", BIN / "kube-controller-manager", *common, f"--secure-port={self._controllers}",
            "--root-ca-file=ca.crt", "--service-account-private-key-file=admin.key",
            "--use-service-account-credentials=false",
            f"--node-monitor-grace-period={self._node_grace:g}s", f"--node-monitor-period={self._node_grace / 8:g}s",
        )  # fmt: skip
        self.programs.start(
            "kube-scheduler", BIN / "kube-scheduler", *common, f"--secure-port={self._scheduler}"
        )  # fmt: skip
        for what, port in (("controllers", self._controllers), ("scheduler", self._scheduler)):
            ready = f"https://127.0.0.1:{port}/readyz" if what == "scheduler" else f"https://127.0.0.1:{port}/healthz"
            self.until(
                lambda ready=ready: httpx.get(ready, verify=False, trust_env=False).is_success,  # its own certificate
                f"the {what} answer",
            )
        # Pods are refused before it exists.
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        self.until(lambda: self.api.get(account).is_success, "the namespace default is complete")

    def certificate(self, name: str, *names: str, group: str, user: str | None = None) -> None:
        """Issue NAME.crt and NAME.key, for a server of these names and for a client that is `user` of `group`."""
        made = self._authority.issue_cert(*names, common_name=user or name, organization_name=group)
        (self.folder / f"{name}.key").write_bytes(made.private_key_pem.bytes())
        (self.folder / f"{name}.crt").write_bytes(made.cert_chain_pems[0].bytes())

    def write_kubeconfig(self, name: str) -> pathlib.Path:
        """Write NAME.kubeconfig for who NAME.crt says."""
        file = self.folder / f"{name}.kubeconfig"
        cluster = {"server": self.url, "certificate-authority": str(self.folder / "ca.crt")}
        user = {f"client-{part}": str(self.folder / f"{name}.{end}") for part, end in PARTS}
        context = {"cluster": "local", "user": name}
        told = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "local",
            "clusters": [{"name": "local", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "local", "context": context}],
        }
        file.write_text(yaml.safe_dump(told))
        file.chmod(0o600)
        return file

    def stop_api_server(self) -> None:
        """Kill the API server: watches break, calls are refused."""
        self.programs.kill("kube-apiserver")

    def start_api_server(self) -> None:
        """Start it again on the same port and wait until it answers."""
        self.programs.start_again("kube-apiserver")
        self.until(self.answers, "the API server answers again")

    def forget_history(self) -> None:
        """Let etcd forget all but the present: a watch that was broken off cannot go on where it was."""
        etcd = f"http://127.0.0.1:{self._etcd}/v3/kv"
        range_of_nothing = httpx.post(f"{etcd}/range", json={"key": "AA=="}, trust_env=False).raise_for_status()
        revision = range_of_nothing.json()["header"]["revision"]
        httpx.post(f"{etcd}/compaction", json={"revision": revision}, trust_env=False).raise_for_status()


PARTS = (("certificate", "crt"), ("key", "key"))
