"""A list of prompts: one pair of engines each, one answer.

The prompts of a list must not wait for each other as they wait for others: who waits too long for room is turned away,
and with one prompt the whole answer would be lost. So no further prompt is started while one of the list waits, and one
that has waited too long while others of its list had room, or ended, waits anew.
"""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import orjson

from pdrouter.fleet.engine import Role
from pdrouter.handoff.client import Client
from pdrouter.handoff.delivery import Delivery
from pdrouter.handoff.desk import Desk
from pdrouter.handoff.failure import JSON_HEADERS, Failure, leg_failure, router_failure
from pdrouter.handoff.pair import Pair, State
from pdrouter.handoff.way import Way
from pdrouter.observe.record import Record
from pdrouter.openai.batch import StreamMerge, merge_answers
from pdrouter.openai.features import Prompt
from pdrouter.upstream.connection import Headers, note_own_failure

# Prompts under way at once: a list of thousands must not open as many connections.
_AT_ONCE = 64


class Part:
    """Takes the answer for one prompt of a batch. `ended_before` is how many others had ended when it was started."""

    def __init__(self, batch: "Batch", number: int) -> None:
        self.ended_before = 0
        self._batch = batch
        self._number = number

    def got_going(self) -> None:
        """It does not wait any more."""
        self._batch.start_soon()

    def gave_up(self, seconds: float) -> bool:
        """It has waited too long for room; tell whether the batch lets it wait anew."""
        return self._batch.part_gave_up(self._number, seconds)

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


class PartPair(Pair):
    """Serves one prompt of a batch, and lets the batch know of its waiting."""

    __slots__ = ("part",)

    def __init__(
        self, desk: Desk, way: Way, path: str, body: Mapping[str, Any], bare: bytes, asked: Prompt, record: Record,
        part: Part, deadline: float = inf,
    ) -> None:  # fmt: skip
        """Prepare, as a pair does; the part gets the answer."""
        super().__init__(desk, way, path, body, bare, asked, record, part, deadline)
        self.part = part

    def start(self) -> None:
        """Begin, or begin again."""
        super().start()
        if self.state is not State.WAITING:
            self.part.got_going()

    def gave_up(self, role: Role | None, seconds: float, retry_after: int) -> None:
        """It waited as long as a request may wait; for others of its batch it may wait longer."""
        if role is None and self.state is State.WAITING and self.part.gave_up(seconds):
            return
        super().gave_up(role, seconds, retry_after)


class Batch(Delivery):
    """Serves the prompts of one request side by side and merges what comes back."""

    def __init__(
        self, desk: Desk, client: Client, record: Record, prompts: int, stream: bool,
        make: Callable[[int, Part], PartPair],
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
        self._started: dict[int, PartPair] = {}
        self._held: dict[int, PartPair] = {}
        self._starting = False
        self._merge = StreamMerge(prompts) if stream else None
        self._answers: list[list[bytes]] = [[] for _ in range(prompts)]
        self._slow = False

    def run(self) -> None:
        """Serve as soon as there is room."""
        self.begin()

    def admitted(self) -> None:
        """Start as many prompts as may be under way at once (`pdrouter.handoff.admission`)."""
        self._start_more()

    def _start_more(self) -> None:
        """Start prompts until one has to wait: behind others that wait it gets its turn, and so does the next."""
        self._starting = True
        try:
            while not self.settled and self._may_start():
                self._start_next()
        except Exception:
            note_own_failure()
            self.fail(router_failure())
        finally:
            self._starting = False

    def _may_start(self) -> bool:
        return (
            (bool(self._held) or self._next < self._prompts)
            and len(self._started) < _AT_ONCE
            and all(pair.state is not State.WAITING for pair in self._started.values())
        )

    def _start_next(self) -> None:
        if self._held:
            number = next(iter(self._held))
            pair = self._started[number] = self._held.pop(number)
            pair.part.ended_before = self._ended
            pair.start()
            return
        number = self._next
        self._next += 1
        part = Part(self, number)
        pair = self._started[number] = self._make(number, part)
        part.ended_before = self._ended
        self.add(pair)
        if self._slow:
            pair.pause()

    @property
    def _ended(self) -> int:
        return self._prompts - self._open

    def start_soon(self) -> None:
        """Start more prompts: one waits no more in the queue, or has ended."""
        if not self._starting and (self._held or self._next < self._prompts):
            # Not at once: those who wait are being looked at, or will be first, and none of them must be overtaken.
            self._starting = True
            self.desk.loop.call_soon(self._start_more)

    def part_gave_up(self, number: int, seconds: float) -> bool:
        """Let a prompt that has waited too long for room wait anew, if others of this batch had it meanwhile."""
        pair = self._started[number]
        others = any(one.state is not State.WAITING for one in self._started.values())
        if not others and self._ended == pair.part.ended_before:
            return False
        self._held[number] = self._started.pop(number)
        if seconds or not others:
            self.start_soon()
        # Else the queue was full and still is: it is held back until one of the others ends.
        return True

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
        del self._started[number]
        self.part_over()
        self.start_soon()
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
