"""Engines from the EndpointSlices that Kubernetes keeps for a Service: one list, then a watch of what changes.

Which slices belong to a role is said by a label selector. Slices carry the labels of their Service (not those of its
pods) and `kubernetes.io/service-name=NAME`. Two ways to set it up:

* one source for each role, with a selector each: `kubernetes.io/service-name=vllm-prefill` names one Service,
  `app.kubernetes.io/instance=mine,app.kubernetes.io/component=prefill` all Services with these labels;
* one source for both, with a selector of what they have in common, where each Service has the label
  `llm-d.ai/role=prefill` or `llm-d.ai/role=decode`.

A label `llm-d.ai/role` on a slice decides before the role that the source was given.

The router's service account needs a Role with
`{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}` in the engines' namespace.
"""

import logging
import random
import time

import orjson

from pdrouter.discovery.attempts import Attempts, Failure, Repeated
from pdrouter.discovery.found import Found, Sink
from pdrouter.discovery.kubernetes import Account, Api, Refused
from pdrouter.discovery.slices import Reading, read
from pdrouter.discovery.watched import Gone, Malformed, Watched, WatchError

RULE = "{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}"
_AS_BEFORE = (401, 403, 429, 500, 502, 503)  # answers that say nothing against the version that was asked for
_SHORT = 1.0  # seconds; a watch that ends sooner was not ended by its own time limit
_log = logging.getLogger(__name__)


class EndpointSliceSource:
    """Watches the EndpointSlices of one namespace that a label selector matches.

    Args:
        sink: Takes what is found.
        account: Where the API is and as whom it is asked.
        selector: A label selector as `kubectl get -l` takes it.
        reading: Role, port and identity of what is found.
        namespace: Where the engines are; the pod's own namespace when None.
        attempts: When to try again; for tests.
        watch_seconds: After about how long a watch is asked anew, which bounds how old the view can be when the
            network loses a connection without a word.
    """

    def __init__(
        self,
        sink: Sink,
        account: Account,
        selector: str,
        reading: Reading,
        namespace: str | None = None,
        attempts: Attempts | None = None,
        watch_seconds: float = 120.0,
    ) -> None:
        namespace = namespace or account.namespace
        self.name = f"kubernetes:{reading.role or 'both'}:{namespace}/{selector}"
        self.found: tuple[Found, ...] | None = None
        self._sink = sink
        self._selector = selector
        self._reading = reading
        self._watch_seconds = watch_seconds
        path = f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        self._api = Api(account, path, f"EndpointSlices (discovery.k8s.io/v1) in namespace {namespace}", RULE)
        self._attempts = attempts or Attempts(self.name)
        self._watched = Watched()
        self._problems: tuple[str, ...] = ()
        self._repeated = Repeated(self._attempts, self._step)

    @property
    def age(self) -> float:
        """Seconds since the API last said something (it does so about once a minute); infinite before the first."""
        return self._attempts.age

    def start(self) -> None:
        """Begin to look."""
        self._repeated.start()

    async def stop(self) -> None:
        """Look no more."""
        await self._repeated.stop()
        await self._api.close()

    async def _step(self) -> float:
        try:
            if self._watched.version is None:
                await self._list()
            else:
                await self._watch(self._watched.version)
        except Gone as error:
            self._watched.version = None
            raise Failure(
                "the API no longer has the changes since the last one; reading all anew", passing=True
            ) from error
        except WatchError as error:
            if error.code not in _AS_BEFORE:
                self._watched.version = None
            raise Failure(f"the API ended the watch: {error} ({error.code})", passing=True) from error
        except Malformed as error:
            raise Failure(f"the API's answer is not understood: {error}; reading all anew") from error
        except Refused as error:
            if error.status not in _AS_BEFORE:
                self._watched.version = None
            raise
        except Failure:
            raise
        except Exception:
            self._watched.version = None  # so that what could not be reported is reported
            raise
        return 0.0

    async def _list(self) -> None:
        # Without a resourceVersion the API gives the newest state, never one older than what is known already.
        self._watched.replace(await self._api.read_all({"labelSelector": self._selector}))
        self._attempts.succeeded()
        self._report()

    async def _watch(self, version: str) -> None:
        began = time.monotonic()
        seconds = self._watch_seconds * random.uniform(0.75, 1.25)  # so that many routers do not ask in step
        query = {"labelSelector": self._selector, "resourceVersion": version}
        async with self._api.watch(query, seconds) as batches:
            self._attempts.succeeded()
            async for batch in batches:
                self._attempts.succeeded()
                try:
                    for line in batch:
                        self._watched.apply(_event(line))
                finally:
                    self._report()  # also what came before an error: the next watch begins after it
        if time.monotonic() - began < min(_SHORT, self._watch_seconds / 2):
            raise Failure("the API ended the watch at once", passing=True)

    def _report(self) -> None:
        told = read(self._watched.objects, self._reading)
        if told.problems != self._problems:
            for problem in told.problems:
                if problem not in self._problems:
                    _log.warning("source=%s %s", self.name, problem)
            self._problems = told.problems
        if told.found != self.found:
            self._sink(self.name, told.found)
            self.found = told.found


def _event(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None  # which is no event
