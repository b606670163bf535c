"""The Kubernetes API as a pod reaches it: its own token, the cluster's certificate, lists and watches.

httpx is imported here and nowhere else in the router, so a router that does not watch Kubernetes never loads it.
"""

import logging
import os
import re
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson

from pdrouter.discovery.attempts import Failure
from pdrouter.discovery.watched import Gone, Lines

POD_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TOKEN = re.compile(r"[\x21-\x7e]+")
_CONNECT_TIMEOUT = 5.0
_ANSWER_TIMEOUT = 15.0

# A node that vanishes sends no FIN. The kernel asks after 10 quiet seconds and gives up after 15 more, so a dead watch
# is known long before its read timeout.
_KEEPALIVE = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)] + [
    (socket.IPPROTO_TCP, getattr(socket, name), value)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
]


class Refused(Failure):
    """The API answered, and not with what was asked for."""

    def __init__(self, status: int, message: str, after: float | None = None) -> None:
        super().__init__(message, after=after)
        self.status = status


class NotInCluster(Exception):  # noqa: N818
    """The router does not run in a pod, or the pod has no token; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Account:
    """Where the API is and as whom it is asked.

    Attributes:
        url: The API's address, `https://host:port`.
        namespace: The pod's own namespace.
        token_file: Holds the bearer token. The kubelet replaces it before the token ends (about hourly), so it is read
            for each request.
        ca_file: Holds the certificates by which the API's is checked; None only where `url` is plain HTTP.
    """

    url: str
    namespace: str
    token_file: Path
    ca_file: Path | None

    @classmethod
    def of_this_pod(cls, environment: Mapping[str, str] = os.environ, folder: Path = POD_FOLDER) -> "Account":
        """Read what Kubernetes gives to each pod.

        Raises:
            NotInCluster: it gave nothing.
        """
        host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise NotInCluster(
                "KUBERNETES_SERVICE_HOST is not set, so this is no pod of a Kubernetes cluster; run the router in the "
                "cluster, or name the engines by --prefill and --decode"
            )
        token_file, ca_file = folder / "token", folder / "ca.crt"
        for needed in (token_file, ca_file):
            if not needed.is_file():
                raise NotInCluster(
                    f"there is no {needed}; "
                    "the router's pod or service account needs automountServiceAccountToken: true"
                )
        try:
            namespace = (folder / "namespace").read_text().strip()
        except OSError:
            namespace = ""
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", namespace or "default", token_file, ca_file)


class Api:
    """Lists and watches one kind of object; one call at a time.

    Args:
        account: Where and as whom.
        path: The objects' path, such as `/apis/discovery.k8s.io/v1/namespaces/default/endpointslices`.
        what: The objects in words, for messages.
        rule: The RBAC rule that allows both calls, for messages.
    """

    def __init__(self, account: Account, path: str, what: str, rule: str) -> None:
        self._account = account
        self._path = path
        self._what = what
        self._rule = rule
        self._client: httpx.AsyncClient | None = None
        self._trusted: bytes | None = None
        # httpx tells each request at INFO and httpcore each header of the answer at DEBUG: noise in a router's log.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def read_all(self, query: Mapping[str, str]) -> Any:
        """Read all objects.

        Raises:
            Failure: there is no answer; Refused: there is another one.
            Gone: the API cannot give one state of them all.
        """
        async with self._get(query, "list", _ANSWER_TIMEOUT) as response:
            try:
                return orjson.loads(await response.aread())
            except orjson.JSONDecodeError as error:
                raise Failure(f"the list of {self._what} from {self._account.url} is not JSON: {error}") from error

    @asynccontextmanager
    async def watch(self, query: Mapping[str, str], seconds: float) -> AsyncIterator[AsyncIterator[list[bytes]]]:
        """Watch for `seconds` at most; gives batches of lines, each the JSON of an event.

        Raises:
            Failure: there is no answer, or the connection broke; Refused: there is another answer.
            Gone: the version is too old.
        """
        told = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(max(1, int(seconds)))}
        get = self._get({**query, **told}, "watch", seconds + _ANSWER_TIMEOUT)
        async with get as response, aclosing(self._lines(response)) as lines:
            yield lines

    async def _lines(self, response: httpx.Response) -> AsyncGenerator[list[bytes], None]:
        # Not httpx's aiter_lines: it also cuts at U+0085 and other ends of lines that JSON may hold within a string.
        lines = Lines()
        async for data in response.aiter_bytes():
            if complete := lines.feed(data):
                yield complete
        if lines.begun:
            raise Failure(f"the watch of {self._what} ended within a line", passing=True)

    @asynccontextmanager
    async def _get(self, query: Mapping[str, str], verb: str, silence: float) -> AsyncIterator[httpx.Response]:
        url = self._account.url
        headers = {"authorization": f"Bearer {self._token()}", "accept": "application/json"}
        timeout = httpx.Timeout(_CONNECT_TIMEOUT, read=silence)
        try:
            client = await self._current_client()
            async with client.stream("GET", self._path, params=query, headers=headers, timeout=timeout) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise self._refusal(response, verb)
                yield response
        except httpx.ConnectTimeout as error:
            raise Failure(
                f"the Kubernetes API at {url} takes no connection within {_CONNECT_TIMEOUT:g}s; does a NetworkPolicy "
                "forbid it to the router?"
            ) from error
        except httpx.ConnectError as error:
            hint = ""
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                hint = f"; its certificate must be signed by {self._account.ca_file} and name this host"
            raise Failure(f"the Kubernetes API at {url} cannot be reached: {error}{hint}") from error
        except httpx.TimeoutException as error:
            raise Failure(
                f"the Kubernetes API at {url} said nothing for {silence:g}s ({verb})", passing=True
            ) from error
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise Failure(
                f"the connection to the Kubernetes API at {url} broke ({verb}): {why}", passing=True
            ) from error

    def _token(self) -> str:
        file = self._account.token_file
        try:
            token = file.read_text(encoding="ascii").strip()
        except OSError as error:
            raise Failure(f"the token file {file} cannot be read: {error.strerror}") from error
        except UnicodeError:
            token = ""
        # Checked here because the messages of HTTP libraries show the header that they refuse.
        if not _TOKEN.fullmatch(token):
            raise Failure(f"the token file {file} does not hold a token")
        return token

    async def _current_client(self) -> httpx.AsyncClient:
        """Give the client, a new one when the cluster's certificates were replaced."""
        ca_file, trusted, context = self._account.ca_file, b"", None
        if ca_file is not None:
            try:
                trusted = ca_file.read_bytes()
            except OSError as error:
                raise Failure(f"the certificate file {ca_file} cannot be read: {error.strerror}") from error
        if self._client is not None and trusted == self._trusted:
            return self._client
        await self.close()
        if ca_file is not None:
            try:
                context = ssl.create_default_context(cadata=trusted.decode("ascii"))
            except (ssl.SSLError, UnicodeError) as error:
                raise Failure(f"the certificate file {ca_file} does not hold certificates (PEM)") from error
        self._trusted = trusted
        # trust_env=False: a proxy for the world outside is no way to the API of the cluster, and no place for a token.
        transport = httpx.AsyncHTTPTransport(
            verify=True if context is None else context, trust_env=False, socket_options=_KEEPALIVE
        )
        self._client = httpx.AsyncClient(base_url=self._account.url, transport=transport, trust_env=False)
        return self._client

    def _refusal(self, response: httpx.Response, verb: str) -> Exception:
        status, url = response.status_code, self._account.url
        try:
            said = str(orjson.loads(response.content)["message"])[:500]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            said = "no message"
        if status == 410:
            return Gone()
        after = None
        if status == 401:
            why = (
                f"the Kubernetes API at {url} does not accept the token (401: {said}); the kubelet replaces "
                f"{self._account.token_file} before it ends, and it is read again at each attempt"
            )
        elif status == 403:
            why = (
                f"the Kubernetes API does not allow to {verb} {self._what} (403: {said}); give the router's service "
                f"account a Role with the rule {self._rule} and a RoleBinding in that namespace"
            )
        elif status == 404:
            why = f"the Kubernetes API at {url} has no {self._what} (404: {said}); it must be Kubernetes 1.21 or newer"
        elif status == 400:
            why = f"the Kubernetes API refuses to {verb} {self._what} (400: {said}); is the label selector right?"
        else:
            why = f"the Kubernetes API at {url} answers {status} to {verb} {self._what}: {said}"
            pause = response.headers.get("retry-after", "")
            after = float(pause) if pause.isdecimal() else None
        return Refused(status, why, after)
