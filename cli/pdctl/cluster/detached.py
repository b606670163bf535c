"""Work within a pod that goes on whatever becomes of the connection to it.

`within.py` runs there; here it is asked how far it is. Calls are asked again while the API or the pod's node does not
answer: nothing depends on one connection.
"""

import base64
import contextlib
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from pdctl.cluster.api import ApiError, Unreachable
from pdctl.errors import PdctlError

LOOK_SECONDS = 1.0
CUT_SHORT = 20  # so many answers in a row without a line of JSON come from no broken connection
_LOADER = "import sys,zlib,base64;exec(zlib.decompress(base64.urlsafe_b64decode(sys.argv.pop(1))))"

Execute = Callable[[str, str, Sequence[str]], str]  # pod, container, command: what it printed


def command(verb: str, name: str, told: object = None) -> list[str]:
    """Give the command line of `within.py`, its text included: it is short enough for the address of a request."""
    text = (files("pdctl.cluster") / "within.py").read_bytes()
    packed = base64.urlsafe_b64encode(zlib.compress(text, 9)).decode()
    return ["python3", "-c", _LOADER, packed, verb, name, orjson.dumps(told).decode()]


class GoneError(PdctlError):
    """What ran there is no longer there."""


@dataclass(frozen=True, slots=True)
class Look:
    """How far it is.

    Args:
        statuses: exit statuses of the commands that have ended.
        over: whether no further one comes.
        log: what was written since the last look.
    """

    statuses: tuple[int, ...]
    over: bool
    log: bytes


@dataclass(slots=True)
class Detached:
    """Commands that run in a pod.

    Args:
        execute: runs a command in a container of a pod.
        pod: where they run.
        container: of the pod.
        name: of their folder there.
        tell: told when the connection breaks, and when it is back.
    """

    execute: Execute
    pod: str
    container: str
    name: str
    tell: Callable[[str], None] = lambda text: None
    _offset: int = field(default=0, init=False)

    def start(self, commands: list[list[str]]) -> None:
        """Start them; a second start changes nothing.

        Raises:
            PdctlError: the pod does not run commands.
        """
        self._asked("start", commands)

    def look(self) -> Look:
        """See how far it is.

        Raises:
            GoneError: the pod is gone, or what ran there is.
        """
        told = self._asked("look", self._offset)
        if told.get("gone"):
            raise self._lost("what was measured there was fetched or removed")
        log = told["log"]
        self._offset = log["next"]
        content = zlib.decompress(base64.b64decode(log["data"])) if log["data"] else b""
        over = told["over"] and log["next"] >= log["size"]
        if not told["over"] and not told["alive"]:
            raise self._lost("its process has ended: the container was restarted, or ran out of memory")
        return Look(tuple(told["statuses"]), over, content)

    def follow(self, on_look: Callable[[Look], None]) -> Look:
        """Look again and again until it is over."""
        while True:
            seen = self.look()
            on_look(seen)
            if seen.over:
                return seen
            time.sleep(LOOK_SECONDS)

    def fetch(self, name: str, to: Path) -> None:
        """Fetch a file; it is there whole or not at all.

        Raises:
            PdctlError: there is no such file.
        """
        new = to.with_name(to.name + ".new")
        with new.open("wb") as file:
            if not self._copy(name, file):
                raise PdctlError(f"{self.pod} has no {name} of {self.name}", "look at the log of the run")
        new.replace(to)

    def append(self, name: str, to: Path) -> None:
        """Fetch what was added to a file since the last time; it need not exist yet."""
        with to.open("ab") as file:
            self._copy(name, file)

    def _copy(self, name: str, file: BinaryIO) -> bool:
        while True:
            told = self._asked("fetch", [name, file.tell()])
            if told.get("missing"):
                return False
            file.write(zlib.decompress(base64.b64decode(told["data"])))
            if told["next"] >= told["size"]:
                return True

    def take(self) -> None:
        """Remove its folder there, and end what still runs."""
        with contextlib.suppress(GoneError):  # the pod took it along
            self._asked("take", None)

    def _asked(self, verb: str, told: object) -> dict[str, Any]:
        broken = cut = 0
        while True:
            try:
                said = self.execute(self.pod, self.container, command(verb, self.name, told))
                answer: dict[str, Any] = orjson.loads(said.strip().rpartition("\n")[2])
            except (Unreachable, orjson.JSONDecodeError) as error:
                cut = cut + 1 if isinstance(error, orjson.JSONDecodeError) else 0
                if cut == CUT_SHORT:
                    raise PdctlError(
                        f"python3 in {self.pod} does not answer", "the image must have it; or use --client pdctl"
                    ) from None
                if not broken:
                    why = error.cause if isinstance(error, Unreachable) else "an answer was cut short"
                    self.tell(f"{why}; {self.name} goes on in {self.pod}, which is asked again")
                broken += 1
                time.sleep(LOOK_SECONDS)
                continue
            except ApiError as error:
                raise self._refused(error) from None
            if broken:
                self.tell(f"connected to {self.pod} again")
            if "error" in answer:
                raise PdctlError(f"in {self.pod}: {answer['error']}", "see kubectl describe pod, or run it again")
            return answer

    def _refused(self, error: ApiError) -> PdctlError:
        if error.status == 404:
            return self._lost("the pod is gone, and what it had measured with it")
        if error.status == 403:
            error.cause = f"no command may be run in {self.pod}: {error.message}"
            error.next_step = "ask for the right to create pods/exec; or measure from here: --client pdctl"
        return error

    def _lost(self, why: str) -> GoneError:
        return GoneError(f"{self.name} no longer runs in {self.pod}: {why}", "run the command again for a whole run")
