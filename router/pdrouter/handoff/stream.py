"""A stream on its way to the client that another engine could go on with.

The engine is asked to tell token ids; they are kept here and cut out again, so that the client gets what it asked for.
Kept besides are the last events, which tell where a continuation may begin (`pdrouter.openai.continuation`).
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson

from pdrouter.openai.asked import CHAT
from pdrouter.openai.continuation import (
    IDS_FIELD,
    Again,
    Rest,
    Told,
    continued_body,
    cut,
    held_back,
    tells_stops,
    told_by,
)
from pdrouter.openai.errors import error_body

DONE = b"data: [DONE]\n\n"
_IDS = b'"token_ids":['
_PROMPT_IDS = b'"prompt_token_ids":['
ERROR = b'data: {"error":'
# vLLM ends what it has under way like this when it is paused, put to sleep or shut down. In a text, quotes are escaped.
ABORTED = b'"finish_reason":"abort"'
ABORT = error_body(500, "The decode engine ended the request before it was complete.", "decode")
_ENOUGH = 16384  # bytes of events after which it is looked at which of them are needed
_MOST = 262144  # characters without a place to go on from, which no ordinary stream has
_TOLD = 256  # bytes that are counted for an event that was read


class CannotGoOnError(Exception):
    """A stream cannot be continued exactly; the message says why."""


def _numbers(told: bytes) -> list[int]:
    return [int(number) for number in told.split(b",") if number]


class Stream:
    """One generation, over as many engines as it takes."""

    __slots__ = (
        "_body", "_continuous", "_cut_prompt", "_first", "_fresh", "_generated", "_held", "_keeps_ids", "_path",
        "_prompt", "_recent", "_rest", "_rewrite", "_usage_told", "_whole", "begun", "complete", "differs", "error",
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
        self._held = held_back(body)
        self._prompt: bytes | None = None
        self._cut_prompt = False
        self._generated = bytearray()
        self._recent: deque[bytes | Told] = deque()
        self._fresh = 0
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

        After an error event, or one that tells that the engine gave up, `error` is set, after a continuation that
        contradicts what the client has `differs`; what follows is dropped.
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
        at = data.find(ABORTED)
        if at >= 0:
            before, gap, _ = data[:at].rpartition(b"\n\n")
            data = b"%b%bdata: %b\n\n" % (before, gap, ABORT)
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
        self._recent.append(one)
        self._fresh += len(one) if isinstance(one, bytes) else _TOLD + len(one.text)
        if self._fresh > _ENOUGH:
            self._shorten()
        self.begun = True

    def _shorten(self) -> None:
        """Drop what lies before the last event behind which a continuation may begin.

        Events are read from the last one back until there is one, which is soon as a rule. Of those behind it is kept
        what they told, of neighbours their sum where none may begin there.
        """
        recent, after = self._recent, 0
        kept: deque[bytes | Told] = deque()
        later: Told | None = None
        self._recent, self._fresh = kept, 0
        if self._prompt is None:  # it cannot go on
            recent.clear()
            self._whole = False
        while recent:
            one = recent.pop()
            events: list[bytes | Told] = list(one.split(b"\n\n")) if isinstance(one, bytes) else [one]
            for event in reversed(events):
                try:
                    told = self._told_by(event) if isinstance(event, bytes) else event
                except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                    kept.appendleft(event)  # `go_on` says that it cannot be read
                    self._whole = False
                    return
                if told is None:
                    continue
                both = None if later is None else told.joined(later)
                if both is None:
                    kept.appendleft(told)
                    later = told
                else:
                    kept[0] = later = both
                if told.serves(after, self._held):
                    self._whole = False
                    return
                after += len(told.text)
        if after > _MOST:
            kept.clear()
            self._whole = False

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
                said = self._told_by(event)
                if said is not None:
                    told.append(said)
        return told

    def _told_by(self, event: bytes) -> Told | None:
        if not event.startswith(b"data: {"):
            return None
        chunk = orjson.loads(event[6:])
        if self._first is None:
            self._first = chunk
        said = told_by(chunk)
        if said is None:
            self._usage_told = self._usage_told or chunk.get("usage") is not None
        return said

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
        # Of a continuation that broke off before it had told anything new, the client has more than is in `recent`.
        unsaid, untold = ("", []) if self._rewrite is None else self._rewrite.left()
        start = cut(recent, len(generated), self._held, self._whole, unsaid, tells_stops(self._body))
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
        self._recent = deque([*recent[: start.events], Told(0, start.unsent, None, False)])
        self._fresh = 0
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
