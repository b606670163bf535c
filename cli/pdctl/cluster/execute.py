"""Commands within containers, as `kubectl exec` runs them: a websocket with numbered channels."""

import asyncio
import contextlib
from collections.abc import Sequence

import httpx_ws
import orjson

from pdctl.cluster import paths
from pdctl.cluster.api import ApiError, Cluster, Unreachable

PROTOCOL = "v4.channel.k8s.io"
SECONDS = 60.0  # a connection that a sleeping laptop left half open says nothing any more
_OUT, _ERR, _STATUS = 1, 2, 3


async def execute(cluster: Cluster, namespace: str, pod: str, container: str, command: Sequence[str]) -> str:
    """Run a short command in a container and give what it printed.

    Raises:
        ApiError: the API refuses: no such pod (404), no right to `pods/exec` (403); or the command failed (status 0).
        Unreachable: the API or the pod's node is away, the connection broke, or the command did not end within a
            minute; whether it ran is not known.
    """
    path = f"{paths.namespaced('pods', namespace, pod)}/exec"
    query = {"command": list(command), "container": container, "stdout": "true", "stderr": "true"}
    what = f"cannot run a command in {pod}"
    told: dict[int, bytearray] = {_OUT: bytearray(), _ERR: bytearray(), _STATUS: bytearray()}
    try:
        async with asyncio.timeout(SECONDS), cluster.websocket(path, PROTOCOL, what, **query) as socket:
            with contextlib.suppress(httpx_ws.WebSocketDisconnect):
                while not told[_STATUS]:
                    message = await socket.receive_bytes()
                    if message and message[0] in told:
                        told[message[0]] += message[1:]
    except TimeoutError:
        raise Unreachable(cluster.server, f"a command in {pod} did not end within {SECONDS:g} s") from None
    status = orjson.loads(bytes(told[_STATUS]) or b"{}")
    if status.get("status") == "Failure":
        words = told[_ERR].decode(errors="replace").strip()[-500:] or status.get("message", "")
        raise ApiError(0, status.get("reason", ""), words, what)
    return told[_OUT].decode(errors="replace")
