"""A list of objects kept current by the events of a Kubernetes watch, no I/O."""

from collections.abc import Collection, Mapping
from typing import Any


class Gone(Exception):  # noqa: N818
    """The API no longer has the events since the version that was asked for: the list must be read anew."""


class WatchError(Exception):
    """The API reported an error within a watch."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Malformed(Exception):  # noqa: N818
    """An answer is not what the API's documentation says."""


class Watched:
    """Objects of one namespace by name, and the version from which a watch is to go on.

    Attributes:
        version: The `resourceVersion` of the last thing seen; None when the list must be read (anew). What was known
            stays known until then.
    """

    def __init__(self) -> None:
        self.version: str | None = None
        self._objects: dict[str, Mapping[str, Any]] = {}

    @property
    def objects(self) -> Collection[Mapping[str, Any]]:
        """All objects."""
        return self._objects.values()

    def replace(self, listed: Any) -> None:
        """Take a list's answer for everything there is.

        Raises:
            Malformed: it is not a list.
        """
        try:
            objects = {one["metadata"]["name"]: one for one in listed["items"] or ()}
            version = listed["metadata"]["resourceVersion"]
        except (KeyError, TypeError) as error:
            raise Malformed("the list lacks items with names or its resourceVersion") from error
        self._objects = objects
        self.version = str(version)

    def apply(self, event: Any) -> None:
        """Take one event.

        Raises:
            Gone: the version is too old; `version` is None now.
            WatchError: the API reported another error.
            Malformed: it is not an event; `version` is None now, since what it said is lost.
        """
        try:
            kind, subject = event["type"], event["object"]
            if kind == "ERROR":
                code = int(subject.get("code") or 0)
                if code == 410:
                    raise Gone
                raise WatchError(code, str(subject.get("message") or subject.get("reason") or "no message"))
            meta = subject["metadata"]
            version = str(meta["resourceVersion"])
            if kind in ("ADDED", "MODIFIED"):
                self._objects[meta["name"]] = subject
            elif kind == "DELETED":
                self._objects.pop(meta["name"], None)
            elif kind != "BOOKMARK":
                raise Malformed(f"an event has the unknown type {kind!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.version = None
            raise Malformed("an event lacks its type, object, name or resourceVersion") from error
        except (Gone, Malformed):
            self.version = None
            raise
        self.version = version


class Lines:
    """Cuts a stream of bytes into lines; a line without its end is no line."""

    def __init__(self) -> None:
        self._begun: list[bytes] = []

    @property
    def begun(self) -> bool:
        """Whether part of a line has arrived."""
        return bool(self._begun)

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes, give the lines that they complete, without empty ones."""
        first, *rest = data.split(b"\n")
        if not rest:
            if data:
                self._begun.append(data)
            return []
        lines = [b"".join([*self._begun, first]), *rest[:-1]]
        self._begun = [rest[-1]] if rest[-1] else []
        return [line for line in lines if line.strip()]
