"""Going on with a stream on another engine: what must be asked, and how its answer becomes the rest of the first.

The way that is exact is by token ids. vLLM tells them with `return_token_ids`; a completion whose prompt is the
prompt's ids and those already generated computes the very state that was lost. Text is not enough: cut into tokens
again it may become other ones (`docs/decisions/0003-continue-by-token-ids.md`). A conversation goes on as such a
completion too, and its chunks are told as chat chunks again.

Text may lag behind ids: vLLM holds back what may be the beginning of a stop string, and characters whose last bytes are
not there yet; a prompt that ends inside of a character is even answered with its whole text first. So the continuation
begins at the last token whose text was sent for sure (an event of one id with text), and what it then repeats is
compared with what was sent and dropped.
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
_STATEFUL = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structural_tag", "tools", "functions", "bad_words", "logits_processors", "thinking_token_budget",
)  # fmt: skip


def why_not(path: str, body: Mapping[str, Any]) -> str | None:
    """Say why a stream could not go on exactly elsewhere, as one word, or None.

    A grammar's state, a parser of tools, counts of generated tokens for penalties and `bad_words` live in the engine
    and cannot be handed in. Several choices are several generations. Log-probabilities of a conversation have bytes
    that those of a completion lack. Pictures are no token ids.
    """
    if isinstance(body.get("n"), int) and body["n"] > 1:
        return "n"
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
    """Give how many characters vLLM's text lags behind its tokens because of stop strings."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    if not stops or body.get("include_stop_str_in_output"):
        return 0
    return max((len(one) for one in stops if isinstance(one, str)), default=1) - 1


class Told:
    """What one event of a stream told: ids, text that went to the client, where logprobs' offsets had come to."""

    __slots__ = ("finish", "ids", "offset", "text")

    def __init__(self, ids: int, text: str, offset: int | None, finish: bool) -> None:
        self.ids = ids
        self.text = text
        self.offset = offset
        self.finish = finish


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
    return Told(len(choice.get("token_ids") or ()), text or "", offset, choice.get("finish_reason") is not None)


class Cut:
    """Where a continuation begins: after how many generated tokens, and which text it will repeat."""

    __slots__ = ("offset", "repeats", "tokens")

    def __init__(self, tokens: int, repeats: str, offset: int) -> None:
        self.tokens = tokens
        self.repeats = repeats
        self.offset = offset


def cut(recent: Sequence[Told], generated: int, held: int, whole: bool) -> Cut | None:
    """Find where to begin.

    Args:
        recent: the last events, oldest first.
        generated: how many ids there are in all.
        held: characters by which text lags (`held_back`).
        whole: whether `recent` is the whole stream.

    Returns:
        None when the place lies before `recent`.
    """
    after = ""
    tokens = generated
    for told in reversed(recent):
        if told.text and told.ids == 1 and len(after) >= held:
            return Cut(tokens, after[held:], told.offset or 0)
        tokens -= told.ids
        after = told.text + after
    return Cut(0, after, 0) if whole else None


def continued_body(
    path: str, body: Mapping[str, Any], prompt: Sequence[int], generated: Sequence[int], room: int | None
) -> dict[str, Any] | None:
    """Give the completion that goes on; None when nothing is left to generate.

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
    elif limit is None:
        limit = 16
    if not isinstance(limit, int):
        limit = None if room is None else room - len(prompt)
    told = {name: value for name, value in body.items() if path != CHAT or name not in _CHAT_ONLY}
    told["prompt"] = [*prompt, *generated]
    if limit is not None:
        if limit <= len(generated):
            return None
        told["max_tokens"] = limit - len(generated)
    least = body.get("min_tokens")
    if isinstance(least, int):
        told["min_tokens"] = max(0, least - len(generated))
    told.pop("echo", None)
    if path == CHAT:
        told.pop("logprobs", None)
    told["stream"] = True
    told[IDS_FIELD] = True
    return told


class Rest:
    """Turns the chunks of a continuation into the rest of the stream that its client knows."""

    def __init__(
        self, path: str, first: Mapping[str, Any], start: Cut, prompt: int, keeps_ids: bool, continuous: bool
    ) -> None:
        """Prepare.

        Args:
            path: of the client's request.
            first: a chunk of the first stream: id, time and model are its.
            start: where the continuation began.
            prompt: tokens of the client's prompt.
            keeps_ids: whether the client asked for ids.
            continuous: whether each chunk tells usage.
        """
        self._chat = path == CHAT
        self._first = first
        self._start = start
        self._prompt = prompt
        self._keeps_ids = keeps_ids
        self._continuous = continuous
        self._repeats = start.repeats

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
        told: dict[str, Any] = {name: self._first.get(name) for name in ("id", "object", "created", "model")}
        usage = chunk.get("usage")
        choices = chunk.get("choices") or []
        if not choices:
            told |= {"choices": [], "usage": None if usage is None else self.usage(usage)}
            if "system_fingerprint" in chunk:
                told["system_fingerprint"] = chunk["system_fingerprint"]
            return _event(told), [], None
        choice = choices[0]
        ids = choice.get("token_ids") or []
        text = self._new(choice.get("text") or "")
        finish = choice.get("finish_reason")
        said = told_by(chunk)
        assert said is not None
        offset = None if said.offset is None else said.offset + self._start.offset
        if not text and finish is None and not (self._keeps_ids and not self._repeats):
            return b"", ids, Told(len(ids), "", offset, False)
        told["choices"] = [self._choice(choice, text, ids)]
        if usage is not None and self._continuous:
            told["usage"] = self.usage(usage)
        if "system_fingerprint" in chunk:
            told["system_fingerprint"] = chunk["system_fingerprint"]
        return _event(told), ids, Told(len(ids), text, offset, finish is not None)

    def _new(self, text: str) -> str:
        if not self._repeats:
            return text
        common = min(len(self._repeats), len(text))
        if self._repeats[:common] != text[:common]:
            raise ValueError("the other engine generated another text")
        self._repeats = self._repeats[common:]
        return text[common:]

    def _choice(self, choice: Mapping[str, Any], text: str, ids: list[int]) -> dict[str, Any]:
        shown = ids if self._keeps_ids else None
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
        if isinstance(logprobs, dict) and logprobs.get("text_offset"):
            kept["logprobs"] = logprobs | {"text_offset": [at + self._start.offset for at in logprobs["text_offset"]]}
        return kept


def _event(told: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(told)
