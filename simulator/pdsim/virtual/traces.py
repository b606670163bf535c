"""Recorded traffic: Mooncake's and Bailian's JSONL, BurstGPT's and Azure's CSV."""

import csv
from collections.abc import Iterator
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import orjson

from pdsim.virtual.workload import Asked, Workload

ENGINE_BLOCK = 128
MOONCAKE_BLOCK = 512
BAILIAN_BLOCK = 16
TOGETHER = 3  # requests of one moment, on average, from which times must have been rounded


class TraceError(Exception):
    """A file is no trace that is known, with the reason."""


def read_trace(path: Path, limit: int | None = None, sessions: bool = False) -> Workload:
    """Read a trace; its form is told by its first line.

    Args:
        path: the file.
        limit: how many requests to read; None for all.
        sessions: whether requests name a session, which these traces lack: the conversation's first block that is not
            shared by everybody (the second), or the chat that they tell.

    Raises:
        TraceError: it cannot be read, or the form is unknown.
    """
    try:
        with path.open("rb") as file:
            head = file.readline()
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    if head.lstrip().startswith(b"{"):
        return _jsonl(path, limit, sessions)
    return _table(path, limit)


def _lines(path: Path, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                told = orjson.loads(line)
                if not isinstance(told, dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise TraceError(f"{path}, line {number}: no JSON object ({error})") from error
            yield number, told


def _jsonl(path: Path, limit: int | None, sessions: bool) -> Workload:
    found: list[Asked] = []
    block = MOONCAKE_BLOCK
    for number, told in _lines(path, limit):
        try:
            bailian = "parent_chat_id" in told or "chat_id" in told
            block = int(told.get("block_size", BAILIAN_BLOCK if bailian else MOONCAKE_BLOCK))
            scale = 1.0 if bailian else 1000.0
            session = None
            if sessions:
                ids = told["hash_ids"]
                session = str(told["chat_id"]) if bailian else str(ids[min(1, len(ids) - 1)]) if ids else None
            found.append(_asked(told, float(told["timestamp"]) / scale, block, session, number))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise TraceError(f"{path}, line {number}: not of a known trace ({error!r})") from error
    found.sort(key=lambda one: one.arrival)
    coarse = max(block, ENGINE_BLOCK)
    return Workload(path.name, found, coarse, _resolution(found))


def _resolution(found: list[Asked]) -> float:
    """Give to how many seconds times were rounded: Mooncake's are about 3 s apart, with ten requests each."""
    times = sorted({one.arrival for one in found})
    if len(times) < 2 or len(found) < TOGETHER * len(times):
        return 0.0
    return median(after - before for before, after in pairwise(times))


def _asked(told: dict[str, Any], arrival: float, block: int, session: str | None, number: int) -> Asked:
    tokens, blocks = max(1, int(told["input_length"])), [int(one) for one in told["hash_ids"]]
    if block < ENGINE_BLOCK:
        # An engine reuses whole blocks of its own size, so the number of the last of them tells as much.
        step = ENGINE_BLOCK // block
        rest = blocks[-1:] if tokens % ENGINE_BLOCK else []
        blocks, block = [*blocks[step - 1 : tokens // block : step], *rest], ENGINE_BLOCK
    output = max(1, int(told["output_length"]))
    return Asked(arrival, tokens, output, blocks, block, session, f"request:{number}")


_COLUMNS = (
    # time, prompt tokens, answer tokens, session
    ("Timestamp", "Request tokens", "Response tokens", "Session ID"),  # BurstGPT
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens", ""),  # Azure 2023 and 2024
)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        whole, _, rest = text.partition(".")
        fraction = float("0." + "".join(one for one in rest if one.isdigit())) if rest else 0.0
        return datetime.fromisoformat(whole).timestamp() + fraction


def _table(path: Path, limit: int | None) -> Workload:
    """Read a CSV; such traces tell no content, so every prompt is new."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or []
        for columns in _COLUMNS:
            if all(column in names for column in columns[:3]):
                time, prompt, answer, session = columns
                break
        else:
            known = "; ".join(", ".join(column for column in columns if column) for columns in _COLUMNS)
            raise TraceError(f"{path}: neither JSONL nor a CSV with known columns ({known})")
        found: list[Asked] = []
        begin, unique = None, 0
        for number, row in enumerate(islice(rows, limit), 2):
            try:
                at, tokens, output = _seconds(row[time]), int(row[prompt]), int(row[answer])
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{path}, line {number}: {error}") from error
            begin = at if begin is None else begin
            tokens = max(1, tokens)
            count = -(-tokens // ENGINE_BLOCK)
            blocks = list(range(unique, unique + count))
            unique += count
            named = row.get(session) or None if session else None
            found.append(Asked(at - begin, tokens, max(1, output), blocks, ENGINE_BLOCK, named, f"request:{number}"))
    found.sort(key=lambda one: one.arrival)
    return Workload(path.name, found, ENGINE_BLOCK)
