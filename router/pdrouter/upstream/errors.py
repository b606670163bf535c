"""What goes wrong between the router and an engine.

`reason` is a `ClassVar`: the compiler would make it an attribute of each instance, which exceptions never get.
"""

from typing import ClassVar


class UpstreamError(Exception):
    """An engine did not give an answer to the end; `reason` is the value for metrics and logs."""

    reason: ClassVar[str] = "upstream"


class ConnectError(UpstreamError):
    """No connection: the engine has not seen the request, so another engine may get it."""

    reason: ClassVar[str] = "connect"


class ExhaustedError(UpstreamError):
    """The router has no open file left for a connection: its own fault, not the engine's."""

    reason: ClassVar[str] = "no_files"


class ClosedError(UpstreamError):
    """The engine closed the connection before its answer was complete."""

    reason: ClassVar[str] = "closed"


class VanishedError(ClosedError):
    """The engine closed the connection with the request and takes no new one: it has died, perhaps of the request."""


class MalformedError(UpstreamError):
    """The engine's answer is not HTTP/1.1."""

    reason: ClassVar[str] = "malformed"


class TooLateError(UpstreamError):
    """There was a connection only after the request had lost its sense; nothing was sent."""

    reason: ClassVar[str] = "too_late"


class LeaseEndedError(UpstreamError):
    """The KV blocks may be gone that a decode engine was to fetch; it is no longer asked."""

    reason: ClassVar[str] = "lease_ended"


class StalledError(UpstreamError):
    """The engine keeps its connections open but has sent nothing for too long."""

    reason: ClassVar[str] = "stalled"


class RouterFailureError(UpstreamError):
    """The router itself failed on an answer: a bug."""

    reason: ClassVar[str] = "router_failure"


class DeadEndError(RouterFailureError):
    """The router failed on a failure, too: there is nothing left to try, the request has to end."""
