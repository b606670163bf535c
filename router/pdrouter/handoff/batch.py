"""A list of prompts: one pair of engines each, one answer."""

from collections.abc import Callable
from typing import Any

import orjson

from pdrouter.handoff.client import Client
from pdrouter.handoff.delivery import Delivery
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import JSON_HEADERS, Failure, leg_failure
from pdrouter.handoff.pair import Served
from pdrouter.observe.record import Record
from pdrouter.openai.batch import StreamMerge, merge_answers
from pdrouter.upstream.connection import Headers

# Prompts under way at once: a list of thousands must not open as many connections.
_AT_ONCE = 64


class Part:
    """Takes the answer for one prompt of a batch."""

    def __init__(self, batch: "Batch", number: int) -> None:
        self._batch = batch
        self._number = number

    def head(self, status: int, headers: Headers) -> None:
        """Take the head; a batch has one of its own."""

    def body(self, data: bytes) -> None:
        """Take a piece of the body."""
        self._batch.part_body(self._number, data)

    def end(self) -> None:
        """This prompt is done."""
        self._batch.part_end(self._number)

    def failed(self, failure: Failure) -> None:
        """Without this prompt there is no answer."""
        self._batch.fail(failure)


class Batch(Delivery):
    """Serves the prompts of one request side by side and merges what comes back."""

    def __init__(
        self, desk: Desk, client: Client, record: Record, prompts: int, stream: bool,
        make: Callable[[int, Part], Served],
    ) -> None:  # fmt: skip
        """Prepare.

        Args:
            desk: what all requests share.
            client: who asked.
            record: of the whole request.
            prompts: how many there are.
            stream: whether the client asked for events.
            make: makes what serves prompt number i and gives its answer to a part.
        """
        super().__init__(desk, client, record)
        self._prompts = prompts
        self._make = make
        self._next = 0
        self._open = prompts
        self._merge = StreamMerge(prompts) if stream else None
        self._answers: list[list[bytes]] = [[] for _ in range(prompts)]
        self._slow = False

    def run(self) -> None:
        """Serve as soon as there is room."""
        self.begin()

    def admitted(self) -> None:
        """Start as many prompts as may be under way at once (`pdrouter.handoff.admission`)."""
        while self._next < min(self._prompts, _AT_ONCE) and not self.settled:
            self._start_next()

    def _start_next(self) -> None:
        number = self._next
        self._next += 1
        served = self._make(number, Part(self, number))
        self.add(served)
        if self._slow:
            served.pause()

    def client_slow(self) -> None:
        """Hold up all prompts, also those not yet started."""
        self._slow = True
        super().client_slow()

    def client_ready(self) -> None:
        """Go on."""
        self._slow = False
        super().client_ready()

    def _whole_id(self) -> str:
        return f"cmpl-{self.record.request_id}"

    def part_body(self, number: int, data: bytes) -> None:
        """Take a piece of one prompt's answer."""
        if self.settled:
            return
        if self._merge is None:
            self._answers[number].append(data)
            return
        try:
            events = self._merge.feed(number, data, self._whole_id())
        except (ValueError, KeyError, TypeError) as error:
            self.fail(
                leg_failure(502, "decode", "malformed", f"A decode engine sent an event that is no JSON: {error}.")
            )
            return
        if events:
            self._write(events)

    def _write(self, events: bytes) -> None:
        if not self.started:
            self.started = self.event_stream = True
            self.record.first_byte()
            request_id = self.record.request_id.encode()
            self.client.start(
                200, b"content-type: text/event-stream; charset=utf-8\r\nx-request-id: %b\r\n" % request_id
            )
        self.client.write(events)

    def part_end(self, number: int) -> None:
        """One prompt is done; the last one ends the answer."""
        if self.settled:
            return
        self._open -= 1
        if self._next < self._prompts:
            self._start_next()
        if self._open == 0:
            if self._merge is not None:
                self._write(self._merge.close())
                self._count(self._merge.usage)
                self.settle(200)
                self.client.finish()
            else:
                self._respond()

    def _respond(self) -> None:
        try:
            answers = [orjson.loads(b"".join(chunks)) for chunks in self._answers]
            merged = merge_answers(answers, self._whole_id())
        except (ValueError, KeyError, TypeError) as error:
            self.fail(leg_failure(502, "decode", "malformed", f"A decode engine's answer cannot be merged: {error}."))
            return
        self.record.first_byte()
        self._count(merged["usage"])
        self.settle(200)
        request_id = b"x-request-id: %b\r\n" % self.record.request_id.encode()
        self.client.respond(200, orjson.dumps(merged), JSON_HEADERS + request_id)

    def _count(self, usage: dict[str, Any]) -> None:
        if usage:
            self.record.prompt_tokens = usage.get("prompt_tokens")
            self.record.completion_tokens = usage.get("completion_tokens")
