"""What is sent: a description that names a workload completely, and the requests that it stands for."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

from pdctl.bench.arrivals import Ramp, arrivals
from pdctl.bench.prompts import Words, words_of
from pdctl.bench.trace import Trace
from pdctl.errors import ExitCode, PdctlError

Spelling = Literal["text", "ids"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Args:
        number: its place in the workload.
        prompt: text or token ids; of a later turn only what the user adds.
        output_tokens: tokens to generate.
        due: seconds after the beginning at which it is to be sent; nothing: as soon as there is room.
        conversation: which conversation it belongs to, where the workload has any.
        turn: its turn in the conversation.
        abort_after: tokens after which the client leaves.
    """

    number: int
    prompt: str | list[int]
    output_tokens: int
    due: float | None = None
    conversation: int | None = None
    turn: int = 0
    abort_after: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload: two that are equal send the same requests in the same order at the same times.

    Args:
        data: where prompts come from: `random`, `conversations` or `trace`.
        num_prompts: requests in all.
        input_len: tokens of a random prompt, or that a user adds in a turn.
        output_len: tokens that each request generates (`ignore_eos`); a trace has its own.
        concurrency: requests (conversations) at once at most; nothing: as many as come.
        rate: requests a second (open loop); nothing: the next one is sent when one has ended (closed loop).
        burstiness: shape of the gamma distribution of the gaps: 1 is Poisson, less is burstier, `inf` is even.
        ramp: a rate that grows from the first to the last request, instead of `rate`.
        seed: of prompts, arrivals and aborts.
        spelling: prompts as `text` or as token `ids`.
        turns: turns of each conversation.
        shared_prefix: tokens that all prompts (conversations) begin with.
        think_seconds: pause of the user between an answer and the next turn.
        abort_share: share of the requests whose client leaves at a random token.
        warmup: requests sent before, of other prompts and not counted.
        trace: the trace's file name.
        trace_sha256: its content.
        trace_speed: how much faster than recorded it is sent.
        longest_input: requests of a trace with more prompt tokens are left out.
    """

    data: Literal["random", "conversations", "trace"] = "random"
    num_prompts: int = 100
    input_len: int = 2000
    output_len: int = 2000
    concurrency: int | None = 16
    rate: float | None = None
    burstiness: float = 1.0
    ramp: Ramp | None = None
    seed: int = 0
    spelling: Spelling = "text"
    turns: int = 1
    shared_prefix: int = 0
    think_seconds: float = 0.0
    abort_share: float = 0.0
    warmup: int = 0
    trace: str | None = None
    trace_sha256: str | None = None
    trace_speed: float = 1.0
    longest_input: int | None = None

    @property
    def open_loop(self) -> bool:
        """Whether requests come by the clock and not when others end."""
        return self.rate is not None or self.ramp is not None or self.data == "trace"

    def told(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self) | {"burstiness": _rate_told(self.burstiness)}

    @classmethod
    def read(cls, told: dict[str, Any]) -> "Workload":
        """Read what `told` gave."""
        ramp = told.get("ramp")
        return cls(**told | {"burstiness": float(told["burstiness"]), "ramp": ramp and Ramp(**ramp)})

    def title(self) -> str:
        """Say in one line what is sent."""
        if self.data == "trace":
            what = f"{self.num_prompts} requests of {self.trace} at {self.trace_speed:g} times its speed"
        else:
            what = f"{self.num_prompts} prompts, {self.input_len} tokens in, {self.output_len} out"
        if self.data == "conversations":
            what += f", {self.turns} turns each"
        if self.shared_prefix:
            what += f", the first {self.shared_prefix} shared"
        if self.ramp:
            what += f", {self.ramp.start:g} to {self.ramp.end:g} requests a second ({self.ramp.strategy})"
        elif self.rate is not None:
            what += f", {self.rate:g} requests a second, burstiness {self.burstiness:g}"
        if self.concurrency is not None:
            what += f", {self.concurrency} at once"
        if self.abort_share:
            what += f", {self.abort_share:.0%} left by their client"
        return what

    def requests(self, file: Path | None = None) -> list[Request]:
        """Make the requests, in the order in which they are sent.

        Args:
            file: where the trace is.

        Raises:
            PdctlError: the trace cannot be read or holds too little.
        """
        made = list(self._of_trace(file) if self.data == "trace" else self._drawn())
        if not self.abort_share:
            return made
        draw = Random(f"{self.seed} aborts")
        return [
            replace(one, abort_after=draw.randint(1, max(1, one.output_tokens - 1)))
            if draw.random() < self.abort_share
            else one
            for one in made
        ]

    def warmups(self) -> list[Request]:
        """Make the requests that are sent before and not counted; none begins as a counted one does."""
        words, length = words_of(self.spelling), min(self.input_len, self.longest_input or self.input_len)
        output = min(self.output_len, 64)
        return [
            Request(number, words.draw(f"{self.seed} warm-up {number}", length), output)
            for number in range(self.warmup)
        ]

    def _times(self, count: int) -> list[float | None]:
        if self.rate is None and self.ramp is None:
            return [None] * count
        return list(arrivals(count, self.rate, self.burstiness, self.ramp, self.seed))

    def _drawn(self) -> Iterator[Request]:
        words = words_of(self.spelling)
        conversations = -(-self.num_prompts // self.turns)
        times = self._times(conversations)
        for number in range(self.num_prompts):
            conversation, turn = divmod(number, self.turns)
            shared = 0 if turn else self.shared_prefix
            prompt = words.draw(
                f"{self.seed} {conversation} {turn}", self.input_len, begins=turn == 0, prefix=f"{self.seed} shared",
                shared=shared,
            )  # fmt: skip
            talks = conversation if self.data == "conversations" else None
            yield Request(number, prompt, self.output_len, times[conversation] if turn == 0 else None, talks, turn)

    def _of_trace(self, file: Path | None) -> Iterator[Request]:
        assert file is not None
        words: Words = words_of(self.spelling)
        lines = Trace.read(file).lines
        if self.longest_input is not None:
            lines = [line for line in lines if line.input_length <= self.longest_input]
        if len(lines) < self.num_prompts:
            raise PdctlError(
                f"{file} has {len(lines)} requests that fit, fewer than {self.num_prompts}",
                "ask for fewer prompts, or raise --longest-input",
                ExitCode.USAGE,
            )
        begin = lines[0].seconds
        for number, line in enumerate(lines[: self.num_prompts]):
            due = (line.seconds - begin) / self.trace_speed
            yield Request(number, words.blocks(line, self.seed), line.output_length, due)


def _rate_told(value: float) -> float | str:
    return "inf" if value == float("inf") else value
