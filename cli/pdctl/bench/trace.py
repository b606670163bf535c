"""Recorded traffic in Mooncake's format: when requests came, how long they were, and which prefixes they shared."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import orjson

from pdctl.errors import ExitCode, PdctlError

BLOCK = 512  # tokens that one hash id stands for


@dataclass(frozen=True, slots=True)
class Line:
    """One recorded request.

    Args:
        seconds: when it came.
        input_length: tokens of its prompt.
        output_length: tokens that were generated.
        hash_ids: one a block of 512 prompt tokens, the last one perhaps shorter. Equal ids mean equal blocks behind
            equal prefixes.
    """

    seconds: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace, by time, with the SHA-256 of its file."""

    lines: list[Line]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Read JSON lines of `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

        Raises:
            PdctlError: the file cannot be read, or a line is none of these.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PdctlError(
                f"the trace {path} cannot be read: {error.strerror}", "name another file", ExitCode.USAGE
            ) from None
        lines = []
        for number, text in enumerate(content.splitlines(), 1):
            if not text.strip():
                continue
            try:
                told = orjson.loads(text)
                line = Line(
                    told["timestamp"] / 1000, told["input_length"], max(1, told["output_length"]),
                    tuple(told["hash_ids"]),
                )  # fmt: skip
                if not 0 < line.input_length <= len(line.hash_ids) * BLOCK:
                    raise ValueError(f"{len(line.hash_ids)} blocks of {BLOCK} do not hold {line.input_length} tokens")
            except (ValueError, TypeError, LookupError) as error:
                raise PdctlError(
                    f"line {number} of {path} is no request of a Mooncake trace: {error}",
                    "each line needs timestamp (ms), input_length, output_length and hash_ids of 512-token blocks",
                    ExitCode.USAGE,
                ) from None
            lines.append(line)
        if not lines:
            raise PdctlError(f"{path} holds no request", "name another file", ExitCode.USAGE)
        return cls(sorted(lines, key=lambda line: line.seconds), sha256(content).hexdigest())
