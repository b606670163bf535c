"""A stream on its way to the client that another engine could go on with.

The engine is asked to tell token ids; they are kept here and cut out again, so that the client gets what it asked for.
Kept besides are the last events, which tell where a continuation may begin (`pdrouter.openai.continuation`).
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson

from pdrouter.openai.asked import CHAT
from pdrouter.openai.continuation import IDS_FIELD, Again, Rest, Told, continued_body, cut, held_back, told_by

DONE = b"data: [DONE]\n\n"
_IDS = b'"token_ids":['
_PROMPT_IDS = b'"prompt_token_ids":['
ERROR = b'data: {"error":'
_RECENT = 48  # events; more than stop strings and incomplete characters make text lag behind
_RECENT_BYTES = 65536  # of all of them: a slow client's events come hundreds at a time


class CannotGoOnError(Exception):
    """A stream cannot be continued exactly; the message says why."""


def _numbers(told: bytes) -> list[int]:
    return [int(number) for number in told.split(b",") if number]


class Stream:
    """One generation, over as many engines as it takes."""

    __slots__ = (
        "_body", "_continuous", "_cut_prompt", "_first", "_generated", "_held", "_keeps_ids", "_path", "_prompt",
        "_recent", "_recent_bytes", "_rest", "_rewrite", "_usage_told", "_whole", "begun", "complete", "differs",
        "error",
    )  # fmt: skip

    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        """Prepare.

        Args:
            path: of the client's request.
            body: its JSON, which asks for a stream of one choice.
        """
        self.error: bytes | None = None
        self.differs: str | None = None
        self.begun = False
        self.complete = False
        self._path = path
        self._body = body
        options = body.get("stream_options")
        self._continuous = bool(isinstance(options, dict) and options.get("continuous_usage_stats"))
        self._keeps_ids = bool(body.get(IDS_FIELD))
        self._held = -1
        self._prompt: bytes | None = None
        self._cut_prompt = False
        self._generated = bytearray()
        self._recent: deque[bytes | Told] = deque()
        self._recent_bytes = 0
        self._whole = True
        self._rest = b""
        self._first: dict[str, Any] | None = None
        self._rewrite: Rest | None = None
        self._usage_told = False

    @property
    def generated(self) -> int:
        """How many tokens were told."""
        return self._generated.count(b",")

    def attempt(self) -> None:
        """An engine is asked: what the one before left unfinished does not count. `begun` tells when this one began."""
        self._rest = b""
        self.error = None
        self.begun = False

    def feed(self, data: bytes) -> bytes:
        """Take bytes of an engine's answer; give what goes to the client, whole events only.

        After an error event `error` is set, after a continuation that contradicts what the client has `differs`; what
        follows is dropped.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(b"\n\n"):
            end = data.rfind(b"\n\n")
            if end < 0:
                self._rest = data
                return b""
            self._rest, data = data[end + 2 :], data[: end + 2]
        at = data.find(ERROR)
        if at >= 0:
            self.error = data[at + 6 : data.find(b"\n\n", at)]
            data = data[:at]
            if not data:
                return b""
        if self._rewrite is not None:
            return self._rewritten(data)
        if not self._cut_prompt:
            data = self._without_prompt(data)
        self._keep(data)
        parts = data.split(_IDS)
        if len(parts) > 1:
            for number in range(1, len(parts)):
                part = parts[number]
                at = part.find(b"]")
                if at > 0:
                    self._generated += part[:at]
                    self._generated += b","
                parts[number] = part[at + 1 :]
            if not self._keeps_ids:
                data = b'"token_ids":null'.join(parts)
        if data.endswith(DONE):
            self.complete = True
        return data

    def _keep(self, one: bytes | Told) -> None:
        recent = self._recent
        if isinstance(one, bytes):
            if len(one) > _RECENT_BYTES:
                one = self._last_events(one)
            self._recent_bytes += len(one)
        recent.append(one)
        while len(recent) > _RECENT or (self._recent_bytes > _RECENT_BYTES and len(recent) > 1):
            gone = recent.popleft()
            if isinstance(gone, bytes):
                self._recent_bytes -= len(gone)
            self._whole = False
        self.begun = True

    def _last_events(self, data: bytes) -> bytes:
        """Give the last events of many; one at least, however long it is."""
        at = data.find(b"\n\n", len(data) - _RECENT_BYTES) + 2
        if at == len(data):
            at = data.rfind(b"\n\n", 0, len(data) - 2) + 2
        if at > 1:
            self._whole = False
            return data[at:]
        return data

    def _without_prompt(self, data: bytes) -> bytes:
        at = data.find(_PROMPT_IDS)
        if at >= 0:
            begin = at + len(_PROMPT_IDS)
            end = data.find(b"]", begin)
            self._prompt = data[begin:end]
            self._cut_prompt = True
            if not self._keeps_ids:
                return b'%b"prompt_token_ids":null%b' % (data[:at], data[end + 1 :])
        elif len(self._recent) > 1:
            self._cut_prompt = True  # this engine tells none
        return data

    # when the engine is gone

    def _read(self) -> list[Told]:
        """Read the recent events, which stay raw while all goes well."""
        told: list[Told] = []
        for one in self._recent:
            if isinstance(one, Told):
                told.append(one)
                continue
            for event in one.split(b"\n\n"):
                if not event.startswith(b"data: {"):
                    continue
                chunk = orjson.loads(event[6:])
                if self._first is None:
                    self._first = chunk
                said = told_by(chunk)
                if said is None:
                    self._usage_told = self._usage_told or chunk.get("usage") is not None
                else:
                    told.append(said)
        return told

    def go_on(self, room: int | None) -> dict[str, Any] | bytes | None:
        """Give the body of the completion that goes on, or the events that are missing where only the end is.

        None says that the same is to be asked once more: it is a conversation of which the client has no word yet.

        Args:
            room: the longest context that engines take, if known.

        Raises:
            CannotGoOnError: it would not be exact.
        """
        if self.complete:  # only the connection broke off
            return b""
        if self._prompt is None:
            raise CannotGoOnError("the engine does not tell token ids")
        try:
            recent = self._read()
            prompt, generated = _numbers(self._prompt), _numbers(bytes(self._generated))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CannotGoOnError(f"the stream cannot be read: {error}") from None
        first = self._first
        if first is None:
            raise CannotGoOnError("it has no event that tells anything")
        if any(one.parsed for one in recent):
            raise CannotGoOnError("the engine parses reasoning or tools out of the text")
        if recent and recent[-1].finish:
            return self._end(len(prompt), len(generated))
        if self._held < 0:
            self._held = held_back(self._body)
        # Of a continuation that broke off before it had told anything new, the client has more than is in `recent`.
        unsaid, untold = ("", []) if self._rewrite is None else self._rewrite.left()
        start = cut(recent, len(generated), self._held, self._whole, unsaid)
        if start is None:
            raise CannotGoOnError("its text lags too far behind its tokens")
        nothing = self._whole and not unsaid and not any(one.text for one in recent)
        kind: type[Rest] = Rest
        body: dict[str, Any] | None = None
        if nothing and self._path == CHAT:
            kind = Again
        else:
            body = continued_body(self._path, self._body, prompt, generated[: start.tokens], room)
            if body is None:
                raise CannotGoOnError("how many tokens it may still have is not known")
        told = generated[start.tokens :] + untold
        self._generated = bytearray(b"".join([b"%d," % one for one in generated[: start.tokens]]))
        recent = [*recent[: start.events], Told(0, start.unsent, None, False)]
        self._whole = self._whole and len(recent) <= _RECENT
        self._recent = deque(recent[-_RECENT:])
        self._recent_bytes = 0
        shows_ids = self._keeps_ids or self._body.get("logprobs") is not None
        self._rewrite = kind(self._path, first, start, len(prompt), told, shows_ids, self._keeps_ids, self._continuous)
        return body

    def _end(self, prompt: int, generated: int) -> bytes:
        options = self._body.get("stream_options")
        if not (isinstance(options, dict) and options.get("include_usage")) or self._usage_told:
            return DONE
        assert self._first is not None
        told = {name: self._first.get(name) for name in ("id", "object", "created", "model")}
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}
        return b"data: %b\n\n" % orjson.dumps(told | {"choices": [], "usage": usage}) + DONE

    def _rewritten(self, data: bytes) -> bytes:
        assert self._rewrite is not None
        out: list[bytes] = []
        for event in data.split(b"\n\n"):
            if event == b"data: [DONE]":
                self.complete = True
                out.append(DONE)
            elif event.startswith(b"data: {"):
                try:
                    told, ids, said = self._rewrite.chunk(orjson.loads(event[6:]))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    self.differs = str(error)
                    break
                out.append(told)
                self._generated += b"".join([b"%d," % one for one in ids])
                if said is None:
                    self._usage_told = True
                else:
                    self._keep(said)
        return b"".join(out)
