"""`pdctl record`: the router's flight recorder, over its admin port."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from pdctl.console import bytes_text, err, out
from pdctl.errors import ExitCode, PdctlError, check_writable, writing


class Action(StrEnum):
    """What to do with the recorder."""

    START = "start"
    STOP = "stop"
    FETCH = "fetch"


def record(
    action: Annotated[Action, typer.Argument(help="Let it write, let it stop, or fetch what it wrote.")],
    admin: Annotated[str, typer.Option(help="The router's admin port (--admin-port), as http://127.0.0.1:9000.")],
    output: Annotated[Path, typer.Option(help="Where a fetched trace goes.")] = Path("recorded.jsonl"),
) -> None:
    """Record what a router serves as an anonymised trace, for pdctl replay, plan and tune.

    The router must have been started with --record-dir.
    """
    base = admin.rstrip("/")
    try:
        made = httpx.Client(base_url=base, timeout=30)
    except httpx.InvalidURL as error:
        raise PdctlError(
            f"{base} is no address: {error}", "give --admin as http://127.0.0.1:9000", ExitCode.USAGE
        ) from error
    with made as client:
        if action is Action.FETCH:
            _fetch(client, output)
        else:
            told = _asked(client, "POST", f"/record/{action}")
            out.print("recording" if told["recording"] else "stopped")


def _asked(client: httpx.Client, method: str, path: str) -> Any:
    try:
        answer = client.request(method, path)
        told = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise PdctlError(
            f"no router's admin port answers at {client.base_url}: {error or type(error).__name__}",
            "start the router with --admin-port, and give its address by --admin",
            ExitCode.PREFLIGHT,
        ) from error
    if answer.status_code != 200:
        message = told.get("error", {}).get("message", answer.text) if isinstance(told, dict) else answer.text
        raise PdctlError(str(message), "see pd-router --help: --record-dir", ExitCode.PREFLIGHT)
    return told


def _fetch(client: httpx.Client, output: Path) -> None:
    check_writable(output, "--output")
    files = _asked(client, "GET", "/record")["files"]
    lines = 0
    with writing(output, "--output"), output.open("w", encoding="utf-8") as file:
        for name in files:
            offset = 0
            while text := _asked(client, "GET", f"/record?file={name}&offset={offset}")["text"]:
                file.write(text)
                offset += len(text.encode())
                lines += text.count("\n")
    if not lines:
        err.print("nothing was recorded yet")
    out.print(f"{lines} requests, {bytes_text(output.stat().st_size)}: {output}", soft_wrap=True)
