"""The flight recorder: finished requests as an anonymised trace that `pdctl replay` reads, in Mooncake's form.

A line has no text, no key and no header: when a request came, how many tokens went in and out, which engines served it,
how it ended, and a number for each 512 tokens of its prompt. Numbers are keyed hashes (BLAKE2b, 8 bytes, a key of its
own for each recording, which is in no file), so that equal beginnings are equal and nobody can try texts on them.

Requests with several prompts, and those for anything but text, are left out.
"""

import logging
import secrets
from hashlib import blake2b
from pathlib import Path
from time import perf_counter, time
from typing import IO

import orjson

from pdrouter.observe.record import Record
from pdrouter.policies.block_chain import BLOCK_TOKENS

_log = logging.getLogger(__name__)
BLOCK = 512  # tokens of a number, as in Mooncake's traces
FILES = 4  # a recording is kept in so many files; the oldest goes when there would be more
_EACH = BLOCK // BLOCK_TOKENS
_POSITIVE = (1 << 63) - 1
_STOPPED = "stopped"
_LOOK = 1.0
_PIECE = 1 << 20


class RecorderError(Exception):
    """There can be no recording; the message says why."""


class Recorder:
    """Writes `trace-WORKER-START-N.jsonl` in a folder, up to a size in all; what earlier recordings left counts too.

    Each line is written at once, so that it is there whatever becomes of the process. While the folder has a file named
    `stopped`, nothing is written by any of the router's processes.
    """

    __slots__ = (
        "_began",
        "_engines",
        "_file",
        "_files",
        "_folder",
        "_looked",
        "_most",
        "_name",
        "_number",
        "_running",
        "_salt",
        "_size",
        "broken",
    )

    def __init__(
        self, folder: Path, most_bytes: int, salt: bytes | None = None, worker: int = 0, began: float | None = None
    ) -> None:
        """Begin a recording.

        Args:
            folder: where files go; it is made if it is missing.
            most_bytes: of all files together.
            salt: keys the numbers; workers of one router share it. None draws one.
            worker: which of the router's processes this is; each writes files of its own.
            began: from when times are counted (`perf_counter`), the same for all processes; None for now.

        Raises:
            RecorderError: the folder cannot be written.
        """
        self._folder = folder
        self._most = most_bytes // FILES
        self._salt = salt or secrets.token_bytes(16)
        self._began = perf_counter() if began is None else began
        self._looked = 0.0
        self._running = True
        self._engines: dict[str, int] = {}
        self._number = self._size = 0
        self._name = f"trace-{worker}-{int(time())}"
        self.broken = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = sorted(folder.glob(f"trace-{worker}-*.jsonl"))
            self._file = self._next()
        except OSError as error:
            raise RecorderError(f"--record-dir {folder} cannot be written: {error.strerror}") from error

    def _next(self) -> IO[bytes]:
        path = self._folder / f"{self._name}-{self._number:06d}.jsonl"
        self._number += 1
        self._size = 0
        self._files = [*(one for one in self._files if one != path), path]
        while len(self._files) > FILES:
            self._files.pop(0).unlink(missing_ok=True)
        return path.open("wb", buffering=0)

    def note(self, record: Record, ended: float) -> None:
        """Write a request that ended, if it is one that a trace can tell."""
        asked = record.asked
        if asked is None or self.broken:
            return
        if ended - self._looked > _LOOK or not self._looked:
            self._looked = ended
            self._running = self.running
        if not self._running:
            return
        tokens = record.prompt_tokens or asked.tokens
        numbers = asked.chain.numbers
        salt = self._salt
        hashes = [self._hash(salt, numbers[at]) for at in range(_EACH - 1, len(numbers), _EACH)]
        if len(hashes) * BLOCK < tokens and numbers:
            hashes.append(self._hash(salt, numbers[-1]))
        first = record.first_byte_at
        line = orjson.dumps(
            {
                "timestamp": round((record.started - self._began) * 1000),
                "input_length": tokens,
                "output_length": max(1, record.completion_tokens or record.generated),
                "hash_ids": hashes,
                "ttft_ms": None if first is None else round((first - record.started) * 1000, 2),
                "total_ms": round((ended - record.started) * 1000, 2),
                "prefill": self._engine(record.prefill),
                "decode": self._engine(record.decode),
                "status": record.status,
                "reason": record.reason,
                "retries": record.retries,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        try:
            self._write(line)
        except OSError as error:
            self.broken = True
            _log.error(
                "record_dir=%s cannot be written: %s; nothing is recorded any more", self._folder, error.strerror
            )

    @staticmethod
    def _hash(salt: bytes, number: int) -> int:
        told = blake2b(number.to_bytes(8, "little", signed=True), digest_size=8, key=salt).digest()
        return int.from_bytes(told, "little") & _POSITIVE

    def _engine(self, urls: list[str]) -> int | None:
        """Give an engine's number in this recording; None for none."""
        if not urls or urls[-1] == "none":
            return None
        return self._engines.setdefault(urls[-1], len(self._engines))

    def _write(self, line: bytes) -> None:
        if self._size + len(line) > self._most and self._size:
            self._file.close()
            self._file = self._next()
        self._file.write(line)
        self._size += len(line)

    @property
    def running(self) -> bool:
        """Whether anything is written."""
        return not self.broken and not (self._folder / _STOPPED).exists()

    def start(self) -> None:
        """Write again; other processes do within a second.

        Raises:
            OSError: the folder cannot be written.
        """
        (self._folder / _STOPPED).unlink(missing_ok=True)
        self._looked = 0.0

    def stop(self) -> None:
        """Write no more, also after a restart.

        Raises:
            OSError: the folder cannot be written.
        """
        (self._folder / _STOPPED).touch()
        self._looked = 0.0

    def files(self) -> dict[str, int]:
        """Give the sizes of all files, by name."""
        return {path.name: path.stat().st_size for path in sorted(self._folder.glob("trace-*.jsonl"))}

    def piece(self, name: str, offset: int) -> str:
        """Give whole lines of a file from an offset on, a megabyte at most; nothing at its end.

        Raises:
            KeyError: there is no such file.
            OSError: it cannot be read.
        """
        if name not in self.files():
            raise KeyError(name)
        with (self._folder / name).open("rb") as file:
            file.seek(offset)
            told = file.read(_PIECE)
        return told[: told.rfind(b"\n") + 1].decode()

    def close(self) -> None:
        """End the recording."""
        self._file.close()
