"""Going on with a stream on another engine: what must be asked, and how its answer becomes the rest of the first.

The way that is exact is by token ids. vLLM tells them with `return_token_ids`; a completion whose prompt is the
prompt's ids and those already generated computes the very state that was lost. Text is not enough: cut into tokens
again it may become other ones (`docs/decisions/0003-continue-by-token-ids.md`). A conversation goes on as such a
completion too, and its chunks are told as chat chunks again. Only text can: before it there may be reasoning, which a
completion would tell as text. A conversation of which nothing was said yet is asked once more.

Text may lag behind ids: vLLM holds back what may be the beginning of a stop string, and characters whose last bytes are
not there yet; a prompt that ends inside of a character is even answered with its whole text first. So the continuation
begins at the last token whose text was sent for sure (an event of one id with text), and what it then repeats is
compared with what was sent and dropped. Where stop strings are told too, text does not lag; but an engine looks for
them only in what it generates itself, so the continuation begins before whatever may be the beginning of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from pdrouter.openai.asked import CHAT

IDS_FIELD = "return_token_ids"
# Of the chat API alone; a completion refuses or ignores them.
_CHAT_ONLY = (
    "messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt", "continue_final_message",
    "chat_template", "chat_template_kwargs", "documents", "tool_choice", "parallel_tool_calls", "reasoning_effort",
    "include_reasoning", "mm_processor_kwargs",
)  # fmt: skip
_DROPPED = ("echo", "truncate_prompt_tokens")  # the prompt's ids are what was left of it
_STATEFUL = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structural_tag", "tools", "functions", "bad_words", "logits_processors", "thinking_token_budget",
    "repetition_detection",
)  # fmt: skip

# What vLLM's parsers take out of a conversation's text.
_PARSED = ("reasoning", "reasoning_content", "tool_calls")
_HEAD = ("id", "object", "created", "model")

# vLLM takes more spellings (`"max_tokens": "8"`); these are reckoned with here, so they must be what they seem.
_NUMBERS = ("max_tokens", "max_completion_tokens", "min_tokens")
_FLAGS = ("include_stop_str_in_output", IDS_FIELD)


def why_not(path: str, body: Mapping[str, Any]) -> str | None:
    """Say why a stream could not go on exactly elsewhere, as one word, or None.

    A grammar's state, a parser of tools, counts of generated tokens for penalties and `bad_words` live in the engine
    and cannot be handed in. Reasoning that the client does not want is in no event, so nobody knows where it ends.
    Several choices are several generations. Log-probabilities of a conversation have bytes that those of a completion
    lack. Pictures are no token ids.
    """
    if body.get("n") not in (None, 1):
        return "n"
    if not all(isinstance(body.get(name), int | None) for name in _NUMBERS) or not all(
        isinstance(body.get(name), bool | None) for name in _FLAGS
    ):
        return "odd_types"
    for name in _STATEFUL:
        value = body.get(name)
        if value and not (isinstance(value, dict) and value.get("type") == "text"):
            return name
    if body.get("echo"):
        return "echo"
    if body.get("presence_penalty") or body.get("frequency_penalty"):
        return "penalties"
    if path == CHAT:
        if body.get("logprobs"):
            return "chat_logprobs"
        if body.get("include_reasoning") not in (None, True):
            return "include_reasoning"
        messages = body.get("messages")
        for message in messages if isinstance(messages, list) else ():
            parts = message.get("content") if isinstance(message, dict) else None
            if isinstance(parts, list) and any(
                not isinstance(part, dict) or part.get("type") != "text" for part in parts
            ):
                return "media"
    elif body.get("prompt_embeds") is not None:
        return "media"
    return None


def held_back(body: Mapping[str, Any]) -> int:
    """Give how many characters at the end of a text may be the beginning of a stop string.

    By so many vLLM's text lags behind its tokens, unless stop strings are told too (`tells_stops`).
    """
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return max((len(one) for one in stops if isinstance(one, str) and one), default=1) - 1


def tells_stops(body: Mapping[str, Any]) -> bool:
    """Whether stop strings are told too, so that no text is held back because of them."""
    return bool(body.get("include_stop_str_in_output"))


class Told:
    """What one event of a stream told: ids, text that went to the client, where logprobs' offsets had come to.

    `parsed` is whether it told reasoning or calls of tools.
    """

    __slots__ = ("finish", "ids", "offset", "parsed", "text")

    def __init__(self, ids: int, text: str, offset: int | None, finish: bool, parsed: bool = False) -> None:
        self.ids = ids
        self.text = text
        self.offset = offset
        self.finish = finish
        self.parsed = parsed

    def serves(self, after: int, held: int) -> bool:
        """Whether a continuation may begin behind it: `after` characters were told since, `held` may lag."""
        return self.ids == 1 and after >= held and self.text != ""

    def joined(self, later: "Told") -> "Told | None":
        """Give it and the next one as one, unless a continuation may begin behind one of them."""
        both = Told(
            self.ids + later.ids, self.text + later.text, later.offset, later.finish, self.parsed or later.parsed
        )
        return None if any(one.serves(0, 0) for one in (self, later, both)) else both


def told_by(chunk: Mapping[str, Any]) -> Told | None:
    """Read a chunk of either API; None when it has no choice."""
    choices = chunk.get("choices")
    if not choices:
        return None
    choice = choices[0]
    delta = choice.get("delta")
    text = choice.get("text") if delta is None else delta.get("content")
    offset = None
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict) and logprobs.get("text_offset"):
        offset = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
    parsed = isinstance(delta, dict) and any(delta.get(name) for name in _PARSED)
    ids = choice.get("token_ids") or ()
    return Told(len(ids), text or "", offset, choice.get("finish_reason") is not None, parsed)


class Cut:
    """Where a continuation begins.

    After `tokens` generated tokens, told by the first `events` of the recent events; it will repeat `repeats`, which
    the client has. `unsent` is text of those tokens that was told by later events because of stop strings. `offset` is
    where log-probabilities' offsets go on.
    """

    __slots__ = ("events", "offset", "repeats", "tokens", "unsent")

    def __init__(self, tokens: int, events: int, unsent: str, repeats: str, offset: int) -> None:
        self.tokens = tokens
        self.events = events
        self.unsent = unsent
        self.repeats = repeats
        self.offset = offset


def cut(
    recent: Sequence[Told], generated: int, held: int, whole: bool, unsaid: str = "", tells: bool = False
) -> Cut | None:
    """Find where to begin.

    Args:
        recent: the last events, oldest first.
        generated: how many ids there are in all.
        held: characters that may be the beginning of a stop string (`held_back`).
        whole: whether `recent` is the whole stream.
        unsaid: what the client has beyond the text of `recent`.
        tells: whether it has those `held` characters, too (`tells_stops`).

    Returns:
        None when the place lies before `recent`.
    """
    after = unsaid
    tokens = generated
    for number in range(len(recent) - 1, -1, -1):
        told = recent[number]
        if told.serves(len(after), held):
            lag = 0 if tells else held
            return Cut(tokens, number + 1, after[:lag], after[lag:], told.offset or 0)
        tokens -= told.ids
        after = told.text + after
    return Cut(0, 0, "", after, 0) if whole else None


def continued_body(
    path: str, body: Mapping[str, Any], prompt: Sequence[int], generated: Sequence[int], room: int | None
) -> dict[str, Any] | None:
    """Give the completion that goes on; None when nobody knows how much is left to generate.

    Args:
        path: of the first request.
        body: its JSON.
        prompt: the prompt's ids.
        generated: the ids to go on from.
        room: the longest context that the engine takes, if known; a conversation without a limit needs it.
    """
    limit = body.get("max_tokens")
    if path == CHAT:
        limit = body.get("max_completion_tokens") or limit
        if limit is None and room is not None:
            limit = room - len(prompt)
    elif limit is None:
        limit = 16
    if limit is None or limit <= len(generated):
        return None
    told = {
        name: value for name, value in body.items() if name not in _DROPPED and (path != CHAT or name not in _CHAT_ONLY)
    }
    told["prompt"] = [*prompt, *generated]
    told["max_tokens"] = limit - len(generated)
    if body.get("min_tokens"):
        told["min_tokens"] = max(0, body["min_tokens"] - len(generated))
    if path == CHAT:
        told.pop("logprobs", None)
    told["stream"] = True
    told[IDS_FIELD] = True
    return told


class Rest:
    """Turns the chunks of a continuation into the rest of the stream that its client knows."""

    def __init__(
        self, path: str, first: Mapping[str, Any], start: Cut, prompt: int, told: Sequence[int], shows_ids: bool,
        keeps_ids: bool, continuous: bool,
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            path: of the client's request.
            first: a chunk of the first stream: id, time and model are its.
            start: where the continuation began.
            prompt: tokens of the client's prompt.
            told: the ids after that place that were told already.
            shows_ids: whether the client has seen what they are, by ids or log-probabilities.
            keeps_ids: whether the client asked for ids.
            continuous: whether each chunk tells usage.
        """
        self._chat = path == CHAT
        self._first = first
        self._start = start
        self._prompt = prompt
        self._told = list(told)
        self._shows_ids = shows_ids
        self._keeps_ids = keeps_ids
        self._continuous = continuous
        self._repeats = start.repeats

    def left(self) -> tuple[str, list[int]]:
        """Give text and ids that the client has and that were not repeated yet."""
        return self._repeats, self._told

    def usage(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Count what was generated before as generated and not as prompt."""
        completion = int(told.get("completion_tokens") or 0) + self._start.tokens
        kept = dict(told)
        kept |= {"prompt_tokens": self._prompt, "total_tokens": self._prompt + completion}
        kept["completion_tokens"] = completion
        return kept

    def chunk(self, chunk: dict[str, Any]) -> tuple[bytes, list[int], Told | None]:
        """Give an event for the client (empty when it has nothing new), its ids, and what it told.

        Raises:
            ValueError: what is repeated differs from what was sent.
        """
        told: dict[str, Any] = {name: self._first.get(name) for name in _HEAD}
        usage = chunk.get("usage")
        choices = chunk.get("choices") or []
        if not choices:
            told |= {"choices": [], "usage": None if usage is None else self.usage(usage)}
            if "system_fingerprint" in chunk:
                told["system_fingerprint"] = chunk["system_fingerprint"]
            return _event(told), [], None
        choice = choices[0]
        said = told_by(chunk)
        assert said is not None
        if said.offset is not None:
            said.offset += self._start.offset
        ids = choice.get("token_ids") or []
        repeated = self._repeated(ids)
        text = self._new(said.text)
        if not text and not said.finish and repeated == len(ids):
            return b"", ids, said
        told["choices"] = [self._choice(choice, text, ids, repeated)]
        if usage is not None and self._continuous:
            told["usage"] = self.usage(usage)
        if "system_fingerprint" in chunk:
            told["system_fingerprint"] = chunk["system_fingerprint"]
        return _event(told), ids, said

    def _repeated(self, ids: list[int]) -> int:
        """Count the ids that were told already."""
        count = min(len(self._told), len(ids))
        if count:
            if self._shows_ids and self._told[:count] != ids[:count]:
                raise ValueError("the other engine generated other tokens")
            self._told = self._told[count:]
        return count

    def _new(self, text: str) -> str:
        if not self._repeats:
            return text
        common = min(len(self._repeats), len(text))
        if self._repeats[:common] != text[:common]:
            raise ValueError("the other engine generated another text")
        self._repeats = self._repeats[common:]
        return text[common:]

    def _choice(self, choice: Mapping[str, Any], text: str, ids: list[int], repeated: int) -> dict[str, Any]:
        shown = ids[repeated:] if self._keeps_ids else None
        finish = choice.get("finish_reason")
        if self._chat:
            told = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
            if finish is not None:
                told["stop_reason"] = choice.get("stop_reason")
            return told | {"token_ids": shown}
        kept = dict(choice)
        kept |= {"text": text, "token_ids": shown}
        if "prompt_token_ids" in kept:
            kept["prompt_token_ids"] = None
        logprobs = kept.get("logprobs")
        if isinstance(logprobs, dict):
            kept["logprobs"] = self._logprobs(logprobs, repeated)
        return kept

    def _logprobs(self, logprobs: Mapping[str, Any], repeated: int) -> dict[str, Any]:
        kept = {name: told[repeated:] if isinstance(told, list) else told for name, told in logprobs.items()}
        if kept.get("text_offset"):
            kept["text_offset"] = [at + self._start.offset for at in kept["text_offset"]]
        return kept


class Again(Rest):
    """Turns the chunks of a conversation that is asked once more into the rest of one that has said nothing yet."""

    def chunk(self, chunk: dict[str, Any]) -> tuple[bytes, list[int], Told | None]:
        """Give an event for the client (empty when it has nothing new), its ids, and what it told.

        Raises:
            ValueError: what is repeated differs from what was sent.
        """
        chunk |= {name: self._first.get(name) for name in _HEAD}
        said = told_by(chunk)
        if said is None:
            return _event(chunk), [], None
        choice = chunk["choices"][0]
        ids = choice.get("token_ids") or []
        repeated = self._repeated(ids)
        choice["token_ids"] = ids[repeated:] if self._keeps_ids and ids else None
        if chunk.get("prompt_token_ids") is not None:
            chunk["prompt_token_ids"] = None
        delta = choice["delta"]
        if delta.pop("role", None) is not None and not any(delta.values()):
            return b"", ids, said
        return _event(chunk), ids, said


def _event(told: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(told)
