"""Runs within a pod, by its Python and nothing else: `VERB NAME [JSON]`; answers with one line of JSON.

    start NAME [[COMMAND…]…]   run commands one after the other, whoever stays connected
    stay  NAME [[COMMAND…]…]   the same as a container's own process: restarted, it goes on where it was; it stays until
                               the folder is taken away
    look  NAME OFFSET          how far it is, and the log from a byte on
    fetch NAME [FILE, OFFSET]  a file from a byte on
    take  NAME                 take the folder away, and end what runs

Commands run in a folder of their own, in a session of their own; an empty standard input stays open.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

CHUNK = 1 << 20
FORGET_SECONDS = 24 * 3600

State = dict[str, Any]
Commands = list[list[str]]


def folder_of(name: str) -> str:
    """Give the folder: /scratch outlives a restart of the container."""
    base = "/scratch" if os.access("/scratch", os.W_OK) else tempfile.gettempdir()
    return os.path.join(base, "pdctl", name)


def read(folder: str) -> State:
    """Give what was written down."""
    with open(os.path.join(folder, "state.json")) as file:
        told: State = json.load(file)
        return told


def write(folder: str, state: State) -> None:
    """Write down how far it is."""
    path = os.path.join(folder, "state.json")
    with open(path + ".new", "w") as file:
        json.dump(state, file)
    os.replace(path + ".new", path)


def born(pid: int) -> str | None:
    """Give when a process began, None when there is none: another one of the same number began at another time."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def run(folder: str, state: State) -> None:
    """Run what is left."""
    state.update(pid=os.getpid(), born=born(os.getpid()))
    write(folder, state)
    with open(os.path.join(folder, "log"), "ab") as log:
        for command in state["commands"][len(state["statuses"]) :]:
            try:
                process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=log, stderr=log)
                status = process.wait()
            except OSError as error:
                log.write(f"{command[0]}: {error.strerror}\n".encode())
                log.flush()
                status = 127
            state["statuses"].append(status)
            write(folder, state)
            if status:
                break
    state["over"] = True
    write(folder, state)


def begin(folder: str, commands: Commands) -> State:
    """Make the folder, or find it as an earlier start left it."""
    os.makedirs(folder, exist_ok=True)
    try:
        return read(folder)
    except FileNotFoundError:
        write(folder, {"commands": commands, "statuses": [], "over": False, "pid": 0, "born": None})
        return read(folder)


def start(folder: str, commands: Commands) -> State:
    """Run commands in a process of nobody's; starting them again changes nothing."""
    state = begin(folder, commands)
    if not state["pid"]:
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(nothing, number)
            run(folder, state)
            os._exit(0)
        os.wait()
    return {"folder": folder}


def stay(folder: str, commands: Commands) -> State:
    """Run commands, and stay for whoever fetches what they wrote."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the first process of a container ignores it otherwise
    state = begin(folder, commands)
    if not state["over"]:
        run(folder, state)
    until = time.time() + FORGET_SECONDS
    while os.path.exists(folder) and time.time() < until:
        time.sleep(1)
    return {"statuses": state["statuses"]}


def look(folder: str, offset: int) -> State:
    """Tell how far it is."""
    try:
        state = read(folder)
    except FileNotFoundError:
        return {"gone": True}
    alive = born(state["pid"]) == state["born"] is not None
    state = read(folder)  # what ended between the two is not called dead
    told = {"statuses": state["statuses"], "over": state["over"], "alive": alive}
    return {**told, "log": fetch(folder, ["log", offset])}


def fetch(folder: str, asked: list[Any]) -> State:
    """Give a part of a file."""
    name, offset = asked
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {"missing": True, "data": "", "next": offset, "size": offset}
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(offset)
        data = file.read(CHUNK)
    return {"data": base64.b64encode(zlib.compress(data)).decode(), "next": offset + len(data), "size": size}


def take(folder: str, _: object) -> State:
    """Take the folder away; what runs ends."""
    try:
        state = read(folder)
    except FileNotFoundError:
        return {"gone": True}
    if not state["over"] and born(state["pid"]) == state["born"]:
        os.killpg(os.getpgid(state["pid"]), signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)
    return {"gone": False}


if __name__ == "__main__":
    verb, name, *rest = sys.argv[1:]
    verbs: dict[str, Callable[[str, Any], State]] = {
        "start": start, "stay": stay, "look": look, "fetch": fetch, "take": take,
    }  # fmt: skip
    try:
        answer = verbs[verb](folder_of(name), json.loads(rest[0]) if rest else None)
    except OSError as error:
        answer = {"error": f"{error.filename or name}: {error.strerror}"}
    print(json.dumps(answer), flush=True)
