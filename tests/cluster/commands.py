"""pdctl as a person calls it, against a cluster of the tests."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import yaml

from .control_plane import BIN, Cluster

TOKEN = "hf_thisIsTheTokenOfTheTests0123456789"
VALUES: dict[str, Any] = {
    "engines": {
        "model": {"name": "tiny"},
        "huggingFace": {"existingSecret": ""},
        "cache": {"size": "1Gi"},
        "shmSize": "64Mi",
        "startupSeconds": 60,
        "shutdown": {"leaveSeconds": 1, "drainSeconds": 10},
        "env": {"PD_SIM_FLAGS": "--speed=4 --seed=1 --num-gpu-blocks=2000"},
    },
    "router": {"shutdown": {"leaveSeconds": 1, "drainSeconds": 10}, "config": {"health_interval_secs": 0.3}},
}


class Running:
    """pdctl as it runs: its output so far, signals to it."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: pathlib.Path) -> None:
        self.process = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.out, self.err = "", ""
        self._readers = [threading.Thread(target=self._read, args=(name,)) for name in ("out", "err")]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        stream = self.process.stdout if name == "out" else self.process.stderr
        assert stream is not None
        for line in stream:
            setattr(self, name, getattr(self, name) + line)

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait until it has printed something."""
        deadline = time.monotonic() + seconds
        while text not in self.out + self.err:
            over = self.process.poll() is not None
            if over or time.monotonic() > deadline:
                self.process.kill()
                self._ended()
                why = f"it ended before {text!r}" if over else f"no {text!r} in {seconds} s"
                raise AssertionError(f"{why}: {self.out}{self.err}")
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        self.process.send_signal(signal.SIGINT)

    def end(self, seconds: float = 120) -> "Ended":
        """Wait for its end; fail with what it said, what it waits for and where it is when the end does not come."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            children = psutil.Process(self.process.pid).children(recursive=True)
            waited_for = [one.cmdline() for one in children]
            self.process.send_signal(signal.SIGABRT)  # faulthandler then tells where each thread is
            self.process.wait()
            for one in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            self._ended()
            told = f"it does not end within {seconds} s: {self.out}{self.err}\nits processes: {waited_for}"
            raise AssertionError(told) from None
        self._ended()
        return Ended(self.process.returncode, self.out, self.err)

    def _ended(self) -> None:
        self.process.wait()
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class Ended:
    """What a call came to."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def says(self, code: int, *words: str) -> "Ended":
        """Check its exit status and that it says these, however wide tables are, without a traceback."""
        said = re.sub(r" +", " ", self.out + self.err)
        assert self.code == code, f"exit status {self.code}, not {code}:\n{said}"
        assert "Traceback" not in said
        for word in words:
            assert re.sub(r" +", " ", word) in said, f"{word!r} is not said:\n{said}"
        return self


class Pdctl:
    """Runs pdctl with a state folder of its own against a namespace.

    Args:
        plane: the cluster.
        folder: for its state and for values.
        namespace: given to every command.
    """

    def __init__(self, plane: Cluster, folder: pathlib.Path, namespace: str) -> None:
        self.plane = plane
        self.folder = folder
        self.namespace = namespace
        self.environment = os.environ | plane.environment
        self.environment |= {
            "XDG_STATE_HOME": str(folder / "state"), "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_DATA_HOME": str(folder / "data"), "NO_COLOR": "1", "PYTHONFAULTHANDLER": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens: no test asks the hub
        }  # fmt: skip
        self.environment.pop("PYTHONPATH", None)
        self.environment.pop("HF_TOKEN", None)

    @property
    def state(self) -> pathlib.Path:
        """Where it keeps what it knows."""
        return self.folder / "state/pdctl"

    def values(self, **changed: Any) -> str:
        """Write a values file, for small engines but for what is changed: `engines={"decode": …}`."""
        told = {part: {**VALUES[part], **changed.get(part, {})} for part in ("engines", "router")}
        file = self.folder / f"values-{len(list(self.folder.glob('values-*')))}.yaml"
        file.write_text(yaml.safe_dump(told))
        return str(file)

    def start(self, verb: str, *arguments: str, **environment: str) -> Running:
        """Start a command."""
        where = [] if "--namespace" in arguments else ["--namespace", self.namespace]
        command = [sys.executable, "-m", "pdctl", verb, *arguments, *where]
        return Running(command, self.environment | environment, self.folder)

    def run(self, verb: str, *arguments: str, seconds: float = 180, **environment: str) -> Ended:
        """Run a command to its end."""
        return self.start(verb, *arguments, **environment).end(seconds)

    def locally(self, *arguments: str, seconds: float = 180) -> Ended:
        """Run a command that is told no namespace."""
        command = [sys.executable, "-m", "pdctl", *arguments]
        return Running(command, self.environment, self.folder).end(seconds)

    def deploy(
        self, *arguments: str, prefill: int = 1, decode: int = 1, values: str | None = None, **more: Any
    ) -> Ended:
        """Deploy small engines."""
        return self.run("deploy", *self.deployment(*arguments, prefill=prefill, decode=decode, values=values), **more)

    def deployment(
        self, *arguments: str, prefill: int = 1, decode: int = 1, values: str | None = None
    ) -> tuple[str, ...]:
        """Give the arguments of `deploy` for small engines."""
        file = values or self.values()
        return ("-y", "-f", file, "--prefill", str(prefill), "--decode", str(decode), *arguments)

    def told(self, verb: str, *arguments: str) -> Any:
        """Give what a command says as JSON."""
        ended = self.run(verb, "-o", "json", *arguments)
        return json.loads(ended.out)

    def fault(self, name: str, value: str, role: str = "decode", **more: Any) -> dict[str, Any]:
        """Give values of engines of which a role's pods have a fault."""
        return {"engines": {role: {"podAnnotations": {f"fault.pdctl.test/{name}": value}, **more}}}

    def evidence(self) -> pathlib.Path:
        """Give the newest folder of evidence."""
        return max((self.state / "namespaces" / self.namespace / "evidence").iterdir())

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """Poll."""
        return self.plane.until(condition, what, seconds)
