"""Answers as vLLM 0.32 frames them: field names, their order, and the SSE chunks."""

from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import orjson

from pdsim.engine.detokenizer import name
from pdsim.engine.language import Scored
from pdsim.engine.sequence import Delta, Sequence
from pdsim.engine.tokenizer import Tokenizer

VERSION = "0.32.0"
DONE = b"data: [DONE]\n\n"


def event(message: Any) -> bytes:
    """Frame a message as a server-sent event."""
    return b"data: " + orjson.dumps(message) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Give `usage` as streams carry it."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


def full_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Give `usage` as a whole answer carries it."""
    details = {"prompt_tokens_details": None, "completion_tokens_details": None}
    return usage(prompt_tokens, completion_tokens) | details


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of one answer share."""

    id: str
    created: int
    model: str
    fingerprint: str
    tokenizer: Tokenizer

    def prompt_scores(self, scores: Many[tuple[Scored, ...] | None]) -> list[dict[str, Any] | None]:
        """Give `prompt_logprobs`."""
        before: list[int] = []
        told: list[dict[str, Any] | None] = []
        for position in scores:
            if position is None:
                told.append(None)
                continue
            told.append(
                {
                    str(scored.token): {
                        "logprob": scored.logprob,
                        "rank": scored.rank,
                        "decoded_token": name(self.tokenizer, scored.token, before),
                    }
                    for scored in position
                }
            )
            before.append(position[0].token)
        return told

    def completion_logprobs(
        self, tokens: Iterable[int], scores: Iterable[tuple[Scored, ...] | None], offset: int, before: Iterable[int]
    ) -> dict[str, Any]:
        """Give `logprobs` of the completions API.

        Args:
            tokens: of the answer or of a part of it.
            scores: of each token.
            offset: where the first token's text begins.
            before: tokens that were scored before these.
        """
        told: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        context = list(before)
        for token, scored in zip(tokens, scores, strict=True):
            text = name(self.tokenizer, token, context) if scored else self.tokenizer.text(token)
            told["text_offset"].append(offset)
            told["tokens"].append(text)
            told["token_logprobs"].append(scored[0].logprob if scored else None)
            told["top_logprobs"].append(
                {name(self.tokenizer, one.token, context): one.logprob for one in scored} if scored else None
            )
            offset += len(text)
            context.append(token)
        return told

    def chat_logprobs(
        self, scores: Iterable[tuple[Scored, ...]], top: int, before: Iterable[int] = ()
    ) -> dict[str, Any]:
        """Give `logprobs` of the chat API; `before` are the tokens that were scored before these."""
        context = list(before)

        def entry(scored: Scored) -> dict[str, Any]:
            text = name(self.tokenizer, scored.token, context)
            return {"token": text, "logprob": scored.logprob, "bytes": list(text.encode())}

        content = []
        for scored in scores:
            content.append(entry(scored[0]) | {"top_logprobs": [entry(one) for one in scored[:top]]})
            context.append(scored[0].token)
        return {"content": content}


@dataclass(slots=True)
class Choice:
    """One choice of an answer as it grows."""

    index: int
    sequence: Sequence
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[Scored, ...]] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None
    offset: int = 0  # text offset of the next token of the completions API
    begun: bool = False

    def add(self, delta: Delta) -> None:
        """Add a delta."""
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish, self.stop_reason = delta.finish, delta.stop_reason


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """Answers of /v1/completions."""

    head: Head
    echo: bool
    echo_only: bool  # `max_tokens: 0`: the generated token is not shown
    logprobs: bool
    return_ids: bool
    prompt_texts: list[str]
    per_prompt: int
    prefix: str = "cmpl"

    def whole(self, choices: list[Choice], prompt_tokens: int, ticket: dict[str, Any] | None) -> dict[str, Any]:
        """Give the whole answer."""
        return {
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.model,
            "choices": [self._choice(choice) for choice in choices],
            "service_tier": None,
            "system_fingerprint": self.head.fingerprint,
            "usage": full_usage(prompt_tokens, sum(len(choice.tokens) for choice in choices)),
            "kv_transfer_params": ticket,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        sequence = choice.sequence
        text, tokens, scores = choice.text, list(choice.tokens), list(choice.logprobs)
        shown: list[tuple[Scored, ...] | None] = list(scores)
        if self.echo_only:
            text, tokens, shown = "", [], []
        if self.echo:
            text = self._echoed(choice) + text
            if self.logprobs:
                tokens = sequence.prompt + tokens
                shown = sequence.prompt_scores + shown
        scored = sequence.sampling.prompt_logprobs is not None
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self.head.completion_logprobs(tokens, shown, 0, ()) if self.logprobs else None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.tokens if self.return_ids else None,
            "prompt_logprobs": self.head.prompt_scores(sequence.prompt_scores) if scored else None,
            "prompt_token_ids": sequence.prompt if self.return_ids else None,
            "routed_experts": None,
        }

    def _echoed(self, choice: Choice) -> str:
        """Give the prompt's text for `echo`; vLLM leaves it out where token ids are returned."""
        return "" if self.return_ids else self.prompt_texts[choice.index // self.per_prompt]

    def opening(self, choice: Choice) -> bytes:
        """Completions open with their first token."""
        return b""

    def chunk(self, choice: Choice, delta: Delta, told_usage: dict[str, Any] | None, last: bool) -> bytes:
        """Give one SSE chunk; `last` puts the fingerprint into the final one (when no usage chunk follows)."""
        sequence = choice.sequence
        text, tokens = delta.text, list(delta.tokens)
        scores: list[tuple[Scored, ...] | None] = list(delta.logprobs)
        before = choice.tokens[: len(choice.tokens) - len(tokens)]
        prompt_ids = None
        if not choice.begun:
            choice.begun = True
            if self.echo:
                text = self._echoed(choice) + ("" if self.echo_only else text)
                if self.logprobs:
                    tokens = sequence.prompt + ([] if self.echo_only else tokens)
                    scores = sequence.prompt_scores + ([] if self.echo_only else scores)
            if self.echo or self.return_ids:
                prompt_ids = sequence.prompt
        logprobs = None
        if self.logprobs:
            logprobs = self.head.completion_logprobs(tokens, scores, choice.offset, before)
            choice.offset += sum(map(len, logprobs["tokens"]))
        message: dict[str, Any] = {
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.model,
            "choices": [
                {
                    "index": choice.index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": delta.finish,
                    "stop_reason": delta.stop_reason,
                    "prompt_token_ids": prompt_ids,
                    "token_ids": list(delta.tokens) if self.return_ids else None,
                }
            ],
        }
        if told_usage is not None:
            message["usage"] = told_usage
        if last:
            message["system_fingerprint"] = self.head.fingerprint
        return event(message)

    def usage_chunk(self, told: dict[str, Any]) -> bytes:
        """Give the chunk that ends a stream with `include_usage`."""
        return _usage_chunk(self.head, "text_completion", told)


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """Answers of /v1/chat/completions."""

    head: Head
    logprobs: bool
    top_logprobs: int
    return_ids: bool
    continuous_usage: bool
    prefix: str = "chatcmpl"

    def whole(self, choices: list[Choice], prompt_tokens: int, ticket: dict[str, Any] | None) -> dict[str, Any]:
        """Give the whole answer."""
        first = choices[0].sequence
        scored = first.sampling.prompt_logprobs is not None
        return {
            "id": self.head.id,
            "object": "chat.completion",
            "created": self.head.created,
            "model": self.head.model,
            "choices": [
                {
                    "index": choice.index,
                    "message": {
                        "role": "assistant",
                        "content": choice.text,
                        "refusal": None,
                        "annotations": None,
                        "audio": None,
                        "function_call": None,
                        "reasoning": None,
                    },
                    "logprobs": self.head.chat_logprobs(choice.logprobs, self.top_logprobs) if self.logprobs else None,
                    "finish_reason": choice.finish,
                    "stop_reason": choice.stop_reason,
                    "token_ids": choice.tokens if self.return_ids else None,
                    "routed_experts": None,
                }
                for choice in choices
            ],
            "service_tier": None,
            "system_fingerprint": self.head.fingerprint,
            "usage": full_usage(prompt_tokens, sum(len(choice.tokens) for choice in choices)),
            "prompt_logprobs": self.head.prompt_scores(first.prompt_scores) if scored else None,
            "prompt_token_ids": first.prompt if self.return_ids else None,
            "prompt_text": None,
            "kv_transfer_params": ticket,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _message(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "object": "chat.completion.chunk",
            "created": self.head.created,
            "model": self.head.model,
            "choices": [choice],
        }

    def opening(self, choice: Choice) -> bytes:
        """Give the chunk that names the role; it comes before the first token."""
        delta = {"role": "assistant", "content": ""}
        message = self._message({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
        if self.continuous_usage:
            message["usage"] = usage(len(choice.sequence.prompt), 0) | {"completion_tokens_details": None}
        message["prompt_token_ids"] = choice.sequence.prompt if self.return_ids else None
        message["prompt_text"] = None
        return event(message)

    def chunk(self, choice: Choice, delta: Delta, told_usage: dict[str, Any] | None, last: bool) -> bytes:
        """Give one SSE chunk; `last` puts the fingerprint into the final one (when no usage chunk follows)."""
        before = choice.tokens[: len(choice.tokens) - len(delta.tokens)]
        told: dict[str, Any] = {
            "index": choice.index,
            "delta": {"content": delta.text},
            "logprobs": self.head.chat_logprobs(delta.logprobs, self.top_logprobs, before) if self.logprobs else None,
            "finish_reason": delta.finish,
        }
        if delta.finish is not None:
            told["stop_reason"] = delta.stop_reason
        told["token_ids"] = list(delta.tokens) if self.return_ids else None
        message = self._message(told)
        if told_usage is not None:
            message["usage"] = told_usage | {"completion_tokens_details": None}
        if last:
            message["system_fingerprint"] = self.head.fingerprint
        return event(message)

    def usage_chunk(self, told: dict[str, Any]) -> bytes:
        """Give the chunk that ends a stream with `include_usage`."""
        return _usage_chunk(self.head, "chat.completion.chunk", told)


def _usage_chunk(head: Head, kind: str, told: dict[str, Any]) -> bytes:
    return event(
        {
            "id": head.id,
            "object": kind,
            "created": head.created,
            "model": head.model,
            "choices": [],
            "usage": told,
            "system_fingerprint": head.fingerprint,
        }
    )


Answer = CompletionAnswer | ChatAnswer
