"""Log lines, as key=value or as JSON, that nothing from outside can break up or forge."""

import asyncio
import logging
import os
import re
import sys
import time
from typing import Any

import orjson

from pdrouter.observe.record import Record

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,\-\[\]]+")
_FLUSH_AFTER = 0.02
# Compiled code makes text of a number slowly: what lines hold most often is at hand.
_TENTHS = [f"{tenths // 10}.{tenths % 10}" for tenths in range(10_000)]
_THOUSANDTHS = [f"{milliseconds:03}" for milliseconds in range(1000)]


def quoted(value: str) -> str:
    """Give a value for a log line: as it is when harmless, else as a JSON string in ASCII."""
    if _PLAIN.fullmatch(value):
        return value
    text = orjson.dumps(value.encode("utf-8", "replace").decode()).decode()
    return text if text.isascii() and text.isprintable() else ascii(text)


def _tenths(seconds: float) -> str:
    """Give milliseconds with one digit behind the point; compiled, `:.1f` would cost ten times as much."""
    tenths = int(seconds * 10_000 + 0.5)
    return _TENTHS[tenths] if 0 <= tenths < 10_000 else f"{tenths // 10}.{tenths % 10}"


def _names(urls: list[str]) -> str:
    return urls[0] if len(urls) == 1 else quoted(",".join(dict.fromkeys(urls)) or "none")


def request_line(record: Record, ended: float) -> str:
    """Give the line of one finished request (`ended`: `perf_counter` seconds).

    Request id, path and engines are harmless as they are: the first two were checked when the request came in, engines'
    URLs when the router started.
    """
    sent, first, took = record.decode_sent_at, record.first_byte_at, record.prefill_seconds
    prefill = "-" if took is None else _tenths(took)
    ttft = "-" if first is None or sent is None else _tenths(first - sent)
    line = (
        f"request_id={record.request_id} path={record.path} status={record.status} "
        f"prefill={_names(record.prefill)} decode={_names(record.decode)} prefill_ms={prefill} "
        f"decode_ttft_ms={ttft} total_ms={_tenths(ended - record.started)} reason={record.reason or '-'}"
    )
    if record.retries:
        line += f" retries={record.retries} continued={record.continued}"
    if record.error_leg is not None:
        line += f" error_leg={record.error_leg} error={quoted(record.error_reason or '-')}"
    return line


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def request_fields(record: Record, ended: float) -> dict[str, Any]:
    """Give what `request_line` tells, for JSON: lists stay lists and what is not known is null."""
    sent, first = record.decode_sent_at, record.first_byte_at
    return {
        "request_id": record.request_id, "path": record.path, "status": record.status, "prefill": record.prefill,
        "decode": record.decode, "prefill_ms": _milliseconds(record.prefill_seconds),
        "decode_ttft_ms": None if first is None or sent is None else _milliseconds(first - sent),
        "total_ms": _milliseconds(ended - record.started), "reason": record.reason or None,
        "prompt_tokens": record.prompt_tokens, "completion_tokens": record.completion_tokens,
        "retries": record.retries, "continued": record.continued,
        "error_leg": record.error_leg, "error": record.error_reason,
    }  # fmt: skip


class _JsonFormatter(logging.Formatter):
    """The router's own messages, one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        told = {"time": _stamp(record.created), "level": record.levelname, "message": record.getMessage()}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(told).decode()


def _stamp(now: float) -> str:
    second = int(now)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{_THOUSANDTHS[int((now - second) * 1000)]}Z"


class RequestLog:
    """Writes the lines of requests to standard error.

    Lines of 20 ms go out in one write: a write for each would cost more than the rest of a request's bookkeeping.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, enabled: bool, style: str = "text") -> None:
        """Prepare.

        Args:
            loop: tells when to write.
            enabled: whether anything is written.
            style: `text` or `json`.
        """
        self._loop = loop
        self._enabled = enabled
        self._json = style == "json"
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._second = 0
        self._stamp = ""

    def write(self, record: Record, ended: float) -> None:
        """Write the line of a finished request, soon."""
        if not self._enabled:
            return
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        stamp = f"{self._stamp}.{_THOUSANDTHS[int((now - second) * 1000)]}Z"
        if self._json:
            told = {"time": stamp, "level": "INFO"} | request_fields(record, ended)
            self._lines.append(f"{orjson.dumps(told).decode()}\n")
        else:
            self._lines.append(f"{stamp} INFO {request_line(record, ended)}\n")
        if self._timer is None:
            self._timer = self._loop.call_later(_FLUSH_AFTER, self.flush)

    def flush(self) -> None:
        """Write what is waiting, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            lines, self._lines = "".join(self._lines), []
            try:
                sys.stderr.flush()
                os.write(sys.stderr.fileno(), lines.encode())
            except OSError:
                self._enabled = False  # the reader is gone; serving goes on


def set_up(level: str, style: str = "text") -> None:
    """Send the router's own messages to standard error, from a level on, as `text` or `json`."""
    setattr(logging.Formatter, "converter", time.gmtime)  # noqa: B010 -- mypyc knows no assignment to it
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    handler.setFormatter(_JsonFormatter() if style == "json" else plain)
    logging.basicConfig(level=level.upper(), handlers=[handler])
