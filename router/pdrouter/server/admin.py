"""The admin port: engines by hand, and why engines were chosen. Never reachable through the public port."""

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs

import orjson

from pdrouter.discovery.found import Found
from pdrouter.fleet.engine import Role
from pdrouter.fleet.fleet import Fleet
from pdrouter.handoff.edges import Edges
from pdrouter.handoff.failure import JSON_HEADERS
from pdrouter.observe.decisions import Decisions
from pdrouter.observe.recorder import Recorder
from pdrouter.openai.errors import error_body
from pdrouter.server.request import ClientRequest
from pdrouter.settings import SettingsError, checked_worker

_FIELDS = ("url", "role", "worker_type")


class AdminError(Exception):
    """A request that cannot be done; the message says why."""


def _asked(request: ClientRequest) -> dict[str, Any]:
    """Read fields from a JSON body or, as vllm-router's clients send them, from the query."""
    query = request.target.partition(b"?")[2].decode("latin-1")
    told: dict[str, Any] = {name: values[-1] for name, values in parse_qs(query).items()}
    if request.body:
        try:
            body = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            raise AdminError(f"The body is not valid JSON: {error}") from None
        if not isinstance(body, dict):
            raise AdminError("The body must be a JSON object.")
        told |= body
    return {name: told[name] for name in _FIELDS if name in told}


def _url(told: dict[str, Any]) -> str:
    try:
        return checked_worker(str(told.get("url", "")))
    except SettingsError as error:
        raise AdminError(f"{error}.") from None


class AdminRoutes:
    """Serves the admin port."""

    def __init__(
        self, fleet: Fleet, edges: Edges, decisions: Decisions | None,
        tell: Callable[[str, dict[str, Any]], None] | None = None, recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            fleet: whom changes go to.
            edges: what `/debug/edges` shows.
            decisions: what `/debug/routing` shows, or None when nothing is kept.
            tell: passes a change on to the router's other processes.
            recorder: writes the trace of finished requests, or None.
        """
        self._fleet = fleet
        self._edges = edges
        self._decisions = decisions
        self._tell = tell
        self._recorder = recorder
        self._paths: dict[bytes, tuple[bytes, Callable[[ClientRequest], object]]] = {
            b"/list_workers": (b"GET", self._list_workers),
            b"/add_worker": (b"POST", self._add_worker),
            b"/remove_worker": (b"POST", self._remove_worker),
            b"/debug/routing": (b"GET", self._routing),
            b"/debug/edges": (b"GET", self._ways),
            b"/record": (b"GET", self._recorded),
            b"/record/start": (b"POST", self._record),
            b"/record/stop": (b"POST", self._record),
        }

    def handle(self, request: ClientRequest) -> None:
        """Serve a request."""
        path = request.target.partition(b"?")[0]
        method, serve = self._paths.get(path, (b"", None))
        if serve is None:
            known = ", ".join(name.decode() for name in self._paths)
            request.respond(404, error_body(404, f"This port has {known}."), JSON_HEADERS)
            return
        if request.method != method:
            allow = b"allow: %b\r\n" % method
            request.respond(405, error_body(405, f"{path.decode()} answers {method.decode()}."), JSON_HEADERS + allow)
            return
        try:
            body = serve(request)
        except AdminError as error:
            request.respond(400, error_body(400, str(error)), JSON_HEADERS)
        else:
            request.respond(200, orjson.dumps(body), JSON_HEADERS)

    def _list_workers(self, request: ClientRequest) -> object:
        # `urls` is what vllm-router's answer has, for scripts that were written for it.
        return {"urls": [engine.url for engine in self._fleet], "workers": [
            {
                "url": engine.url, "name": engine.name, "role": engine.role.value, "healthy": engine.healthy,
                "leaving": engine.leaving, "breaker_open": self._fleet.tripped(engine),
                "in_flight": engine.given,
                "queued_tokens": engine.queued_tokens, "held_tokens": engine.held_tokens, "model": engine.model,
                "waiting": engine.waiting, "running": engine.running, "kv_usage": engine.kv_usage,
                "metrics_age": engine.metrics_age if engine.scraped_at > 0 else None,
            }
            for engine in self._fleet
        ]}  # fmt: skip

    def change(self, name: str, told: dict[str, Any]) -> str:
        """Do what `/add_worker` or `/remove_worker` asks, in this process.

        Raises:
            AdminError: it cannot be done.
        """
        url = _url(told)
        if name == "remove":
            if not self._fleet.remove(url):
                raise AdminError(f"There is no engine {url}; see /list_workers.")
            return f"{url} is removed; what it has under way may end."
        try:
            role = Role(str(told.get("role") or told.get("worker_type")))
        except ValueError:
            raise AdminError('Say which role the engine has: "role": "prefill" or "decode".') from None
        self._fleet.add(Found(url, url, role))
        return f"{url} is added as {role.value}; it is chosen as soon as its /health answers."

    def _change(self, name: str, request: ClientRequest) -> object:
        told = _asked(request)
        message = self.change(name, told)
        if self._tell is not None:
            self._tell(name, told)
        return {"status": "success", "message": message}

    def _add_worker(self, request: ClientRequest) -> object:
        return self._change("add", request)

    def _remove_worker(self, request: ClientRequest) -> object:
        return self._change("remove", request)

    def _routing(self, request: ClientRequest) -> object:
        if self._decisions is None:
            raise AdminError("Decisions are not kept; start the router with --debug-routing 128.")
        return {"decisions": list(self._decisions.shown())}

    def _recording(self) -> Recorder:
        if self._recorder is None:
            raise AdminError("Nothing is recorded; start the router with --record-dir DIR.")
        return self._recorder

    def _record(self, request: ClientRequest) -> object:
        recorder = self._recording()
        try:
            if request.target.partition(b"?")[0] == b"/record/start":
                recorder.start()
            else:
                recorder.stop()
        except OSError as error:
            raise AdminError(f"The folder of --record-dir cannot be written: {error.strerror}.") from None
        return {"recording": recorder.running}

    def _recorded(self, request: ClientRequest) -> object:
        """Tell the files, or a piece of one: `?file=NAME&offset=BYTES`."""
        recorder = self._recording()
        asked = parse_qs(request.target.partition(b"?")[2].decode("latin-1"))
        if "file" not in asked:
            return {"recording": recorder.running, "files": recorder.files()}
        try:
            return {"text": recorder.piece(asked["file"][-1], max(0, int(asked.get("offset", ["0"])[-1])))}
        except (KeyError, ValueError, OSError):
            raise AdminError("There is no such file; GET /record tells which there are.") from None

    def _ways(self, request: ClientRequest) -> object:
        return {"edges": [
            {
                "prefill": edge.prefill.url, "decode": edge.decode.url, "closed": edge.closed,
                "handoffs": edge.handoffs, "failures": edge.failures, "seconds": round(edge.seconds, 4),
                "last_error": edge.last_error or None,
            }
            for edge in self._edges
        ]}  # fmt: skip
