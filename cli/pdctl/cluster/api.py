"""The Kubernetes API as pdctl asks it. kr8s reads the kubeconfig and gives credentials; requests are httpx's.

The kubeconfig is only read. kr8s writes keys that stand in it as data to temporary files; `scratch` gives them a folder
that goes when pdctl ends, and they go as soon as they are loaded.
"""

import asyncio
import atexit
import contextlib
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import httpx
import httpx_ws
import orjson
from wsproto.utilities import ProtocolError

from pdctl.console import err
from pdctl.errors import ExitCode, PdctlError

Object = Mapping[str, Any]

MANAGER = "pdctl"  # field manager of server-side apply
CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0
LOGIN_SECONDS, QUIET_SECONDS = 60.0, 3.0  # for a program of the kubeconfig that logs in; before it is told about
PAGE = 500
# Stream resets and half-open connections come with an API server that is restarted or a tunnel that breaks.
_OUTAGES = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_BUSY = (429, 502, 503, 504)


class ApiError(PdctlError):
    """The API answered with a refusal.

    Args:
        status: of HTTP.
        reason: in the API's own vocabulary: `NotFound`, `Forbidden`, `AlreadyExists`, …
    """

    def __init__(self, status: int, reason: str, message: str, what: str) -> None:
        step = {
            401: "log in again: the cluster does not accept the credentials of this context",
            403: "ask who runs the cluster for this right, or choose another --context",
        }.get(status, "see the message; pdctl doctor checks the rest")
        lacking = status in (401, 403)
        super().__init__(f"{what}: {message}", step, ExitCode.PREFLIGHT if lacking else ExitCode.FAILURE)
        self.status, self.reason, self.message = status, reason, message


class Unreachable(PdctlError):  # noqa: N818
    """The API does not answer."""

    def __init__(self, server: str, why: str) -> None:
        super().__init__(
            f"the Kubernetes API at {server} does not answer: {why}",
            "check the network and VPN, or choose another --context (kubectl config get-contexts)",
            ExitCode.PREFLIGHT,
        )


def scratch() -> Path:
    """Give this process's own folder for temporary files; nobody else can read it, and it goes when pdctl ends."""
    if tempfile.tempdir is None or not Path(tempfile.tempdir).name.startswith("pdctl-"):
        folder = tempfile.mkdtemp(prefix="pdctl-")
        tempfile.tempdir = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(tempfile.tempdir)


@contextlib.asynccontextmanager
async def _logging_in(context: str | None) -> AsyncIterator[None]:
    """Say what is waited for and what fails while credentials are had, for which a kubeconfig may name a program.

    Nobody sees what that program asks for: kr8s keeps its output, so it is not waited for without limit.

    Raises:
        PdctlError: there is no such context, or there are no credentials.
    """
    where = f"context {context!r}" if context else "the current context"
    waiting = asyncio.get_running_loop().call_later(
        QUIET_SECONDS, lambda: err.print(f"waiting for the login of {where}", style="dim", soft_wrap=True)
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions that kr8s was not tried with
            with anyio.fail_after(
                LOGIN_SECONDS
            ):  # after asyncio's own timeout anyio would go on waiting for the program
                yield
    except (ValueError, KeyError, IndexError, FileNotFoundError) as error:
        raise PdctlError(
            f"the kubeconfig has nothing for {where} that can be used: {error}",
            "see kubectl config get-contexts; choose one with --context, or another file with KUBECONFIG",
            ExitCode.PREFLIGHT,
        ) from None
    except TimeoutError:
        raise PdctlError(
            f"the login of {where} did not end within {LOGIN_SECONDS:g} s",
            "log in as your cluster's provider says, where it can ask you, then run the command again",
            ExitCode.PREFLIGHT,
        ) from None
    except Exception as error:  # what a program of the kubeconfig makes of a failure differs from one to the next
        raise PdctlError(
            f"the credentials of {where} cannot be had: {type(error).__name__}: {error}",
            "log in again as your cluster's provider says", ExitCode.PREFLIGHT,
        ) from None  # fmt: skip
    finally:
        waiting.cancel()


@dataclass(slots=True)
class Cluster:
    """One cluster, reached through one context.

    Args:
        context: its name in the kubeconfig; empty within a pod.
        server: the API's address.
        patience: seconds for which calls are tried again while the API does not answer.
        on_outage: called with the seconds that the API has been silent for.
    """

    context: str
    server: str
    patience: float = 10.0
    on_outage: Callable[[float], None] = lambda seconds: None
    version: str = ""
    _auth: Any = None
    _client: httpx.AsyncClient | None = None
    _old: list[httpx.AsyncClient] = field(default_factory=list)
    _renewing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @classmethod
    async def connect(cls, context: str | None = None) -> "Cluster":
        """Find the cluster of a context, the current one when none is named.

        Raises:
            PdctlError: there is no such context, or no answer.
        """
        # Half a second, which no other command need wait for. kr8s.api() would ask for /version without a time limit.
        from kr8s._auth import KubeAuth  # noqa: PLC0415

        scratch()
        async with _logging_in(context):
            auth = KubeAuth(context=context)
            await auth.reauthenticate()
            made = cls(auth.active_context, auth.server, _auth=auth)
            made._client = await made._new_client()
        made.version = (await made.get("/version")).get("gitVersion", "")
        return made

    async def _new_client(self) -> httpx.AsyncClient:
        auth = self._auth
        verify = await auth.ssl_context()
        for path in (auth.client_key_file, auth.client_cert_file):
            if path and Path(path).is_relative_to(scratch()):  # kr8s wrote it, and will do so anew for another client
                Path(path).unlink(missing_ok=True)
        headers = {"user-agent": "pdctl"} | ({"authorization": f"Bearer {auth.token}"} if auth.token else {})
        return httpx.AsyncClient(
            base_url=auth.server, headers=headers, verify=verify, proxy=auth.proxy,
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            event_hooks={"response": [_keep_alive, _read_refusal]},
        )  # fmt: skip

    async def close(self) -> None:
        """Close all connections."""
        for client in (*self._old, self._client):
            if client is not None:
                await client.aclose()

    @property
    def client(self) -> httpx.AsyncClient:
        """The client with the credentials."""
        assert self._client is not None
        return self._client

    @property
    def extensions(self) -> dict[str, Any]:
        """What a request must carry where the kubeconfig names another TLS server."""
        return {"sni_hostname": self._auth.tls_server_name} if self._auth.tls_server_name else {}

    async def _renew(self, old: httpx.AsyncClient) -> None:
        async with self._renewing:
            if self._client is old:
                async with _logging_in(self.context):
                    await self._auth.reauthenticate()
                    self._old.append(old)  # others still use it
                    self._client = await self._new_client()

    async def call(
        self,
        method: str,
        path: str,
        what: str,
        *,
        body: Object | None = None,
        kind: str = "application/json",
        **query: Any,
    ) -> Any:
        """Ask for JSON; an API that does not answer is asked again for `patience` seconds.

        `what` is the call in words, for errors.

        Raises:
            ApiError: it refuses.
            Unreachable: it does not answer.
        """
        response = await self._answer(method, path, body, kind, query)
        if response.status_code >= 400:
            raise _refused(response, what)
        return _told(response)

    async def _answer(
        self, method: str, path: str, body: Object | None, kind: str, query: Mapping[str, Any]
    ) -> httpx.Response:
        content = None if body is None else orjson.dumps(body)
        began, delay, renewed = time.monotonic(), 0.1, False
        while True:
            client = self.client
            try:
                response = await client.request(
                    method, path, params=query, content=content, headers={"content-type": kind},
                    extensions=self.extensions,
                )  # fmt: skip
            except _OUTAGES as error:
                why = _why(error)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
                raise PdctlError(
                    f"the Kubernetes API at {self.server} cannot be asked: {error}",
                    "correct the server and the credentials of this context in the kubeconfig", ExitCode.PREFLIGHT,
                ) from None  # fmt: skip
            else:
                if response.status_code == 401 and not renewed:
                    renewed = True
                    await self._renew(client)
                    continue
                if response.status_code not in _BUSY:
                    return response
                why = f"it answers {response.status_code}"
                if "webhook" in response.text:
                    return response  # not the API itself, and the message tells which
            silent = time.monotonic() - began
            if silent + delay > self.patience:
                raise Unreachable(self.server, why)
            self.on_outage(silent)
            await asyncio.sleep(delay)
            delay = min(2.0, delay * 2)

    async def get(self, path: str, **query: Any) -> Any:
        """Read an object."""
        return await self.call("GET", path, f"cannot read {path.rsplit('/', 1)[-1]}", **query)

    async def find(self, path: str) -> Any | None:
        """Read an object; None when it does not exist."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, path: str, labels: str = "", fields: str = "") -> list[Any]:
        """Read all objects of a kind."""
        query: dict[str, Any] = {"limit": PAGE} | ({"labelSelector": labels} if labels else {})
        query |= {"fieldSelector": fields} if fields else {}
        found: list[Any] = []
        while True:
            page = await self.call("GET", path, f"cannot list {path.rsplit('/', 1)[-1]}", **query)
            found += page.get("items") or []
            if not (more := page.get("metadata", {}).get("continue")):
                return found
            query["continue"] = more

    async def apply(
        self, path: str, thing: Object, *, dry_run: bool = False, manager: str = MANAGER, force: bool = True
    ) -> Any:
        """Make an object so by server-side apply; with `dry_run` tell what it would become."""
        query = {"fieldManager": manager, "force": str(force).lower()} | ({"dryRun": "All"} if dry_run else {})
        what = f"cannot apply {thing['kind']} {thing['metadata']['name']}"
        return await self.call("PATCH", path, what, body=thing, kind="application/apply-patch+yaml", **query)

    async def create(self, path: str, thing: Object) -> Any:
        """Make a new object."""
        return await self.call("POST", path, f"cannot make {thing['kind']} {thing['metadata']['name']}", body=thing)

    async def replace(self, path: str, thing: Object) -> Any:
        """Replace an object by a newer version of itself."""
        return await self.call("PUT", path, f"cannot update {thing['kind']} {thing['metadata']['name']}", body=thing)

    async def delete(self, path: str, version: str | None = None) -> None:
        """Delete an object and, first, what it owns; one that does not exist is no error.

        Raises:
            ApiError: it refuses; with a version: also because it is no longer of that (409).
        """
        options: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
        options |= {"preconditions": {"resourceVersion": version}} if version else {}
        try:
            await self.call("DELETE", path, f"cannot delete {path.rsplit('/', 1)[-1]}", body=options)
        except ApiError as error:
            if error.status != 404:
                raise

    async def allowed(
        self, verb: str, resource: str, namespace: str = "", group: str = "", subresource: str = ""
    ) -> bool:
        """Whether these credentials may do something."""
        wanted = {
            "verb": verb, "resource": resource, "namespace": namespace, "group": group, "subresource": subresource,
        }  # fmt: skip
        review = {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
            "metadata": {"name": ""}, "spec": {"resourceAttributes": {k: v for k, v in wanted.items() if v}},
        }  # fmt: skip
        told = await self.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
        return bool(told["status"].get("allowed"))

    async def log(self, namespace: str, pod: str, **query: Any) -> str:
        """Read a container's log; empty when there is none."""
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        response = await self._answer("GET", path, None, "application/json", query)
        return response.text if response.status_code == 200 else ""

    async def follow(self, namespace: str, pod: str, **query: Any) -> AsyncIterator[str]:
        """Give a container's log line by line until it ends or the connection does."""
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        with contextlib.suppress(*_OUTAGES):
            for _ in range(2):
                client = self.client
                async with client.stream(
                    "GET", path, params={"follow": "true", **query}, timeout=timeout, extensions=self.extensions
                ) as response:
                    if response.status_code == 200:
                        async for line in response.aiter_lines():
                            yield line
                    if response.status_code != 401:
                        return
                await self._renew(client)

    @contextlib.asynccontextmanager
    async def websocket(
        self, path: str, protocol: str, what: str, **query: Any
    ) -> AsyncIterator[httpx_ws.AsyncWebSocketSession]:
        """Open a websocket; `what` is it in words, for errors.

        Raises:
            ApiError: the API refuses it.
            Unreachable: it cannot be had for now, or the connection broke while it was used.
        """
        try:
            async with contextlib.AsyncExitStack() as held:
                yield await self._opened(held, path, protocol, query)
        except ExceptionGroup as group:  # httpx-ws runs a task group around whoever uses the socket
            raise self._broken(group.exceptions[0], what) from None
        except (httpx_ws.HTTPXWSException, httpx.HTTPError) as error:
            raise self._broken(error, what) from None

    async def _opened(
        self, held: contextlib.AsyncExitStack, path: str, protocol: str, query: Mapping[str, Any]
    ) -> httpx_ws.AsyncWebSocketSession:
        renewed = False
        while True:
            client = self.client
            try:
                return await held.enter_async_context(
                    httpx_ws.aconnect_ws(
                        path, client, subprotocols=[protocol], params=query, keepalive_ping_interval_seconds=None,
                        extensions=self.extensions,
                    )
                )  # fmt: skip
            except httpx_ws.WebSocketUpgradeError as error:
                if error.response.status_code != 401 or renewed:
                    raise
            renewed = True
            await self._renew(client)

    def _broken(self, error: BaseException, what: str) -> BaseException:
        """Say in our words why a websocket could not be had, or broke; what is not about it stays as it is."""
        if isinstance(error, httpx_ws.WebSocketUpgradeError):
            status = error.response.status_code
            if status == 429 or status >= 500:
                return Unreachable(self.server, f"{what}: {_refused(error.response, what).message} ({status})")
            return _refused(error.response, what)
        if isinstance(error, (httpx_ws.HTTPXWSException, ProtocolError)):
            return Unreachable(self.server, "the connection broke")
        return Unreachable(self.server, _why(error)) if isinstance(error, httpx.HTTPError) else error


async def _keep_alive(response: httpx.Response) -> None:
    """Have the system find out when the other end of a connection is gone: streams may say nothing for hours."""
    connection = response.extensions["network_stream"].get_extra_info("socket")
    if connection is None:  # TLS within a proxy's TLS does not tell
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _read_refusal(response: httpx.Response) -> None:
    """Read why a websocket is refused: httpx-ws raises its error after closing the answer."""
    if "upgrade" in response.request.headers and response.status_code != 101:
        await response.aread()


def _told(response: httpx.Response) -> Any:
    try:
        return orjson.loads(response.content)
    except orjson.JSONDecodeError:
        return {"message": response.text[:300]}


def _refused(response: httpx.Response, what: str) -> ApiError:
    told = _told(response)
    return ApiError(response.status_code, told.get("reason", ""), told.get("message", "no reason given"), what)


def _why(error: BaseException) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.ProxyError):
        return f"its proxy says {error}"
    told = str(error) or type(error).__name__
    return told.removeprefix("[Errno 111] ")
