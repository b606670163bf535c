"""The engine core in real time: steps that last as long as the H200's would, transfers, leases, and death.

Each step is planned when it begins and takes effect when its modelled time is over. The next one begins where the last
was to end, so that a late timer does not add up; `clock` tells how late the machine was.
"""

import asyncio
import random
import secrets
import sys
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

from pdsim.engine.answers import VERSION
from pdsim.engine.detokenizer import Detokenizer
from pdsim.engine.kv import Block, BlockPool, Context, mix
from pdsim.engine.language import Language, Scored
from pdsim.engine.leases import Leases, prompt_digest
from pdsim.engine.metrics import EngineMetrics
from pdsim.engine.scheduler import Scheduler, SchedulerAssertionError, Work
from pdsim.engine.sequence import Delta, EngineDeadError, RequestFailedError, Sequence, Status, token_bytes
from pdsim.engine.side_channel import Remote, RemoteUnreachableError, SideChannelServer, UnknownBlockError, fill
from pdsim.engine.tokenizer import Tokenizer
from pdsim.engine.violations import Rule, Violations
from pdsim.timing import Chunk, Profile

TICKET_KEYS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")
UNREACHABLE_SECONDS = 5.0  # real NIXL gives up a handshake with nobody after 5 s
LATE_SECONDS = 0.002
GIVE_UP_LAG_SECONDS = 0.25  # further behind than this, the clock starts anew: the machine cannot keep up


class BrokenEdgeError(Exception):
    """A fault that was asked for: this engine does not reach that side channel, and tries for so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is told at its start; times in seconds, unscaled."""

    role: str
    model: str
    profile: Profile
    block_size: int = 128
    num_blocks: int = 7187
    max_model_len: int = 131_072
    max_num_seqs: int = 1024
    connector: bool = True
    lease_duration: float = 30.0
    load_failure_policy: str = "recompute"
    side_channel_host: str = "127.0.0.1"
    side_channel_port: int = 5600
    speed: float = 1.0
    seed: int | None = None
    keep_requests: int = 0
    version: str = VERSION


@dataclass(slots=True)
class Clock:
    """How well the machine keeps up with the modelled time."""

    steps: int = 0
    late_steps: int = 0
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=2000))
    decode_modelled: float = 0.0
    decode_real: float = 0.0

    def told(self) -> dict[str, float]:
        """Give the figures of `/sim/state`."""
        cuts = quantiles(self.lags, n=100) if len(self.lags) > 1 else [0.0] * 99
        stretch = self.decode_real / self.decode_modelled if self.decode_modelled else 1.0
        return {
            "decode_seconds": self.decode_real,
            "decode_modelled_seconds": self.decode_modelled,
            "steps": self.steps,
            "late_steps": self.late_steps,
            "lag_seconds_p50": cuts[49],
            "lag_seconds_p99": cuts[98],
            "itl_stretch": stretch,
        }


class Engine:
    """One simulated vLLM engine core; everything runs in the event loop that calls `start`."""

    def __init__(self, settings: EngineSettings, tokenizer: Tokenizer, violations: Violations) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.violations = violations
        self.engine_id = str(uuid.uuid4())  # another one in each life, as vLLM's
        self.pool = BlockPool(settings.num_blocks, settings.block_size)
        self.leases = Leases(self.pool, settings.lease_duration / settings.speed, self._wake_soon)
        self.scheduler = Scheduler(
            self.pool, settings.profile.max_num_batched_tokens, settings.max_num_seqs, self._start_fetch
        )
        self.language = Language(tokenizer.words(), tokenizer.eos, tokenizer.vocabulary)
        self.metrics = EngineMetrics(settings, self)
        self.clock = Clock()
        self.dead = False
        self.slowdown = self.link_slowdown = 1.0
        self.hanging = False
        self.drop_remote_request_id = 0
        self.broken_edges: dict[tuple[str, int], float] = {}  # seconds until a read fails
        self.transfers: dict[tuple[str, int, str], list[int]] = {}
        self._leaving: dict[Sequence, None] = {}  # ended by their clients while a step computes them
        self.on_death: Callable[[], None] = lambda: None
        self._random = random.Random(settings.seed)
        self._remotes: dict[tuple[str, int], Remote] = {}
        self._fetches: dict[Sequence, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._releases: list[dict[str, Any]] = []  # for engines that have become known only now
        self._in_flight_transfers = 0
        self._stepping = False
        self._step_begun = self._step_end = 0.0
        self._frontend_free = 0.0
        self._next_look = 0.0
        self._texts_waiting: list[Sequence] = []
        self._texts: dict[bool, list[str]] = {}  # of each token, by whether special ones are skipped
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        """Listen on the side channel and begin to look after leases.

        Raises:
            OSError: the side channel's address cannot be had.

        """
        self._loop = asyncio.get_running_loop()
        named = [self.tokenizer.text(token) for token in range(self.tokenizer.vocabulary)]
        special = self.tokenizer.special
        self._texts = {
            False: named,
            True: ["" if token in special else text for token, text in enumerate(named)],
        }
        self._server = SideChannelServer(
            self.engine_id, self.pool, self.leases, self._loop.time, self.settings.side_channel_host,
            self.settings.side_channel_port,
        )  # fmt: skip
        await self._server.start()
        self._spawn(self._watch_leases())

    async def stop(self) -> None:
        """Close connections and tasks."""
        self._server.close()
        for task in [*self._background, *self._fetches.values()]:
            task.cancel()
        for remote in self._remotes.values():
            remote.close()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # --- requests -----------------------------------------------------------------------------------------------

    def submit(self, sequences: list[Sequence], from_text: bool) -> None:
        """Take the sequences of one request; they reach the scheduler a modelled time after their arrival.

        Raises:
            EngineDeadError: the engine core has died.
        """
        if self.dead:
            raise EngineDeadError
        profile, speed, arrival = self.settings.profile, self.settings.speed, sequences[0].arrival
        if from_text:
            if not self._texts_waiting:
                due = arrival + (profile.frontend_seconds(0) + profile.tokenize_window) / speed
                self._loop.call_at(due, self._tokenize, due)
            self._texts_waiting += sequences
            return
        tokens = sum(len(sequence.prompt) for sequence in sequences)
        # one frontend process reads one request after the other
        after_last = self._frontend_free + (profile.frontend_seconds(tokens) - profile.frontend_seconds(0)) / speed
        self._frontend_free = max(arrival + profile.frontend_seconds(tokens) / speed, after_last)
        self._loop.call_at(self._frontend_free, self._enqueue, sequences, self._frontend_free)

    def _tokenize(self, begin: float) -> None:
        batch, self._texts_waiting = self._texts_waiting, []
        seconds = self.settings.profile.tokenize_seconds(max(len(sequence.prompt) for sequence in batch))
        due = begin + seconds / self.settings.speed
        self._loop.call_at(due, self._enqueue, batch, due)

    def _enqueue(self, sequences: list[Sequence], due: float) -> None:
        for sequence in sequences:
            if self.dead:
                sequence.outbox.fail(EngineDeadError())
            elif sequence.status is not Status.FINISHED:
                self.scheduler.add(sequence)
        self._wake(due)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence whose client went away; what it pinned elsewhere is let go."""
        if sequence.status is Status.FINISHED or self.dead:
            return
        params = sequence.params or {}
        waits_forever = sequence.status is Status.FETCHING and sequence not in self._fetches
        if waits_forever and ("remote_request_id" not in params or "remote_host" not in params):
            # vLLM 0.32: the connector's metadata of the aborted request lacks the key -> KeyError in the engine core
            self.die()
            return
        if sequence.status is Status.RUNNING and self._stepping:
            # The engine core hears of it when the step under way has been computed, before it looks at what came out.
            # Blocks of this step can be found in the prefix cache since it was planned, so they must get their content.
            self._leaving[sequence] = None
            return
        unasked = sequence.status is Status.WAITING and sequence.wants_remote_kv
        if unasked and not self._release(sequence.request_id, params):
            return
        if sequence not in self._fetches:
            self.scheduler.finish(sequence)
        else:
            # The read goes on into the blocks; they are let go when it is done.
            self.scheduler.fetching.remove(sequence)
            sequence.status = Status.FINISHED
        self.metrics.finished(sequence, "abort", self._loop.time())
        self._wake()

    def reject(self, request_id: str, params: dict[str, Any] | None) -> None:
        """Release a ticket whose request was refused before it reached the scheduler."""
        if params and params.get("do_remote_prefill") and not self.dead:
            self._release(request_id, params)

    def _release(self, request_id: str, params: dict[str, Any]) -> bool:
        """Let a prefill engine know that nobody will fetch its blocks; False when this engine died of it.

        Real vLLM does this in an engine step of its own. Where it has not spoken to that engine before, the step only
        begins the handshake; the notification then waits for a later step, which an idle engine does not make.
        """
        missing = [key for key in ("remote_block_ids", *TICKET_KEYS) if key not in params]
        if missing:
            # vLLM 0.32: the connector's metadata of this step lacks the key -> KeyError in the engine core
            self.violations.add(Rule.TICKET_MISSING_KEYS, request_id, missing=missing)
            self.die()
            return False
        self._step_releases()
        if self._remote(params).knows(params["remote_engine_id"]):
            self._spawn(self._notify(params, "done"))
        else:
            self._spawn(self._introduce(params))
        return True

    async def _introduce(self, params: dict[str, Any]) -> None:
        """Shake hands with a prefill engine for the sake of a ticket that is to be released."""
        if params["remote_engine_id"] != self.engine_id and await self._remote(params).hello(
            params["remote_engine_id"]
        ):
            self._releases.append(params)

    def _step_releases(self) -> None:
        """Send what the last step left to this one."""
        for params in self._releases:
            self._spawn(self._notify(params, "done"))
        self._releases.clear()

    def die(self) -> None:
        """Let the engine core die, as on an assertion or KeyError in it: every request fails, the process ends soon."""
        if self.dead:
            return
        self.dead = True
        for sequence in [*self.scheduler.running, *self.scheduler.waiting, *self.scheduler.fetching]:
            sequence.outbox.fail(EngineDeadError())
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        self.scheduler.fetching.clear()
        self._loop.call_later(0.5, self.on_death)

    # --- steps --------------------------------------------------------------------------------------------------

    def _wake(self, due: float | None = None) -> None:
        """Begin to step if idle; at the modelled time `due` of the work, also when this machine is behind it."""
        if not self._stepping and not self.dead and not self.hanging:
            now = self._loop.time()
            self._step_begun = now
            late = due is not None and now - GIVE_UP_LAG_SECONDS < due < now
            self._step(max(due or now, self._step_end) if late else now)

    def _wake_soon(self) -> None:
        """Begin to step after all that was seen in the same look."""
        self._loop.call_soon(self._wake)

    def resume(self) -> None:
        """Go on after `hanging`."""
        self.hanging = False
        self._wake()

    def _step(self, begin: float) -> None:
        """Plan a step that begins at `begin` and arrange its end."""
        try:
            work = self.scheduler.plan()
        except SchedulerAssertionError:
            self.die()
            return
        if not work:
            self._stepping = False
            return
        self._stepping = True
        if self._releases:
            self._step_releases()
        chunks: list[Chunk] = []
        decodes = context = joining = 0
        for item in work:
            if item.sequence.scheduled_at is None:
                item.sequence.scheduled_at = begin
            if item.count == 1:  # a new token, or the last prompt token behind fetched KV: both run as decodes
                decodes += 1
                context += item.start
                joining += not item.sequence.outputs
            else:
                chunks.append(Chunk(item.count, item.start))
        lasts = self.settings.profile.step_seconds(chunks, decodes, context, joining)
        modelled = lasts * self.slowdown / self.settings.speed
        self._step_end = begin + modelled
        self._loop.call_at(self._step_end, self._end_step, work, modelled, not chunks)

    def _end_step(self, work: list[Work], modelled: float, pure_decode: bool) -> None:
        if self.dead:
            return
        if self.hanging:
            self._loop.call_later(0.05, self._end_step_later, work, modelled)
            return
        now = self._loop.time()
        lag = now - self._step_end
        clock = self.clock
        clock.steps += 1
        clock.lags.append(lag)
        clock.late_steps += lag > LATE_SECONDS
        if lag > GIVE_UP_LAG_SECONDS:
            self._step_end = now
        if pure_decode:
            clock.decode_modelled += modelled
            clock.decode_real += now - self._step_begun
        self._step_begun = now
        self.metrics.iteration_tokens.observe(sum(item.count for item in work))
        leaving, self._leaving = self._leaving, {}
        for item in work:
            self._apply(item, now, item.sequence not in leaving)
        for sequence in leaving:
            self.scheduler.finish(sequence)
            self.metrics.finished(sequence, "abort", now)
        self._step(self._step_end)

    def _end_step_later(self, work: list[Work], modelled: float) -> None:
        if self.hanging and not self.dead:
            self._loop.call_later(0.05, self._end_step_later, work, modelled)
            return
        self._step_end = self._loop.time()
        self._end_step(work, modelled, False)

    def _apply(self, item: Work, now: float, wanted: bool) -> None:
        """Write the KV of the step's tokens; where the sequence is complete and still wanted, sample its next token."""
        sequence = item.sequence
        context = sequence.context
        if context is None:
            # Only now: cached blocks may belong to a sequence of the same step, computed just before this one.
            context = sequence.context = Context.read(sequence.blocks, item.start, self.settings.block_size)
        if sequence.sampling.prompt_logprobs is not None and item.start < len(sequence.prompt):
            self._score_prompt(sequence, item, context)
        else:
            context.compute(sequence.blocks, item.start, self.scheduler.tokens_of(item))
        if wanted and sequence.status is Status.RUNNING and item.start + item.count == sequence.length:
            self._sample(sequence, context.state, now)

    def _score_prompt(self, sequence: Sequence, item: Work, context: Context) -> None:
        wanted = sequence.sampling.prompt_logprobs or 0
        if not sequence.prompt_scores:
            sequence.prompt_scores.append(None)
        for position in range(item.start, item.start + item.count):
            if 0 < position == len(sequence.prompt_scores):
                chosen = self.language.logprob(context.state, sequence.prompt[position])
                ranked = self.language.ranked(context.state)[:wanted] if wanted else []
                sequence.prompt_scores.append((chosen, *(s for s in ranked if s.token != chosen.token)))
            token = token_bytes([(sequence.prompt + sequence.outputs)[position]])
            context.compute(sequence.blocks, position, token)

    def _choose(self, sequence: Sequence, state: int) -> tuple[int, tuple[Scored, ...]]:
        sampling = sequence.sampling
        barred: tuple[int, ...] = ()
        if sampling.min_tokens > len(sequence.outputs):
            barred = (self.tokenizer.eos, *sampling.stop_token_ids)
        if sampling.plain:
            return self.language.first(state, barred), ()
        ranked = self.language.ranked(state, barred, sampling.allowed, sampling.bias)
        if sampling.temperature == 0:
            chosen = ranked[0]
        else:
            draw = mix(sampling.seed, len(sequence.outputs))
            chosen = self.language.sample(ranked, sampling.temperature, sampling.top_p, sampling.top_k, draw)
        if sampling.logprobs is None:
            return chosen.token, ()
        return chosen.token, (chosen, *(s for s in ranked[: sampling.logprobs] if s.token != chosen.token))

    def _sample(self, sequence: Sequence, state: int, now: float) -> None:
        sampling = sequence.sampling
        token, scored = self._choose(sequence, state)
        sequence.outputs.append(token)
        sequence.data += token_bytes([token])
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self.metrics.first_token(sequence, now)
        elif sequence.last_token_at is not None:
            self.metrics.inter_token.observe(now - sequence.last_token_at)
        sequence.last_token_at = now

        finish: str | None = None
        reason: str | int | None = None
        if len(sequence.outputs) >= sampling.min_tokens:
            if token == self.tokenizer.eos and not sampling.ignore_eos:
                finish = "stop"
            elif token in sampling.stop_token_ids:
                finish, reason = "stop", token
        text = "" if finish and not sampling.include_stop else self._detokenized(sequence, token)
        if sampling.stop:
            text, finish, reason = self._stop_text(sequence, text, finish, reason)
        if finish is None and (
            len(sequence.outputs) >= sampling.max_tokens or sequence.length >= self.settings.max_model_len
        ):
            finish = "length"
            if sampling.stop:
                text = sequence.text[sequence.sent :]
        if finish is None:
            sequence.outbox.put(Delta(text, (token,), (scored,) if scored else ()))
            sequence.sent += len(text)
            return
        self._finish(sequence, finish, now)
        self._answer(sequence, Delta(text, (token,), (scored,) if scored else (), finish, reason))

    def _detokenized(self, sequence: Sequence, token: int) -> str:
        skip = sequence.sampling.skip_special
        if sequence.detokenizer is None:
            sequence.detokenizer = Detokenizer(self.tokenizer, self._texts[skip], sequence.prompt, skip)
        return sequence.detokenizer.step(token)

    def _stop_text(
        self, sequence: Sequence, text: str, finish: str | None, reason: str | int | None
    ) -> tuple[str, str | None, str | int | None]:
        """Look for stop strings; text that may be the beginning of one is held back, as vLLM's detokenizer does."""
        sampling = sequence.sampling
        before = len(sequence.text)
        sequence.text += text
        if finish is not None:
            return sequence.text[sequence.sent :], finish, reason
        if len(sequence.outputs) > sampling.min_tokens:
            for stop in sampling.stop:
                at = sequence.text.find(stop, max(0, before - len(stop) + 1))
                if at >= 0:
                    end = at + len(stop) if sampling.include_stop else at
                    sequence.text = sequence.text[:end]
                    return sequence.text[sequence.sent :], "stop", stop
        held = 0 if sampling.include_stop else max(map(len, sampling.stop)) - 1
        return sequence.text[sequence.sent : max(sequence.sent, len(sequence.text) - held)], None, None

    def _answer(self, sequence: Sequence, delta: Delta) -> None:
        delay = self.settings.profile.answer_seconds() / self.settings.speed
        if delta.finish is not None and len(sequence.outputs) == 1 and delay > 0:
            self._loop.call_later(delay, sequence.outbox.put, delta)
        else:
            sequence.outbox.put(delta)

    def _finish(self, sequence: Sequence, finish: str, now: float) -> None:
        keep = sequence.for_remote_decode
        if keep:
            sequence.ticket = self._ticket(sequence)
            self.leases.grant(sequence, dict(sequence.ticket), self.settings.model, now)
            if self.drop_remote_request_id > 0:
                self.drop_remote_request_id -= 1
                del sequence.ticket["remote_request_id"]
        self.scheduler.finish(sequence, keep_blocks=keep)
        self.metrics.finished(sequence, finish, now)

    def _ticket(self, sequence: Sequence) -> dict[str, Any]:
        """Give what vLLM 0.32 answers as `kv_transfer_params`, keys in its order."""
        blocks = sequence.blocks[: -(-sequence.computed // self.settings.block_size)]
        ticket: dict[str, Any] = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[block.id for block in blocks]],
            "remote_engine_id": self.engine_id,
            "remote_request_id": sequence.request_id,
            "remote_host": self.settings.side_channel_host,
            "remote_port": self.settings.side_channel_port,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": sequence.computed,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
        }
        if len(sequence.outputs) == 1:
            ticket["remote_prefill_cached_tokens"] = sequence.cached_tokens
        return ticket

    # --- transfers ----------------------------------------------------------------------------------------------

    def _start_fetch(self, sequence: Sequence, blocks: list[Block]) -> None:
        """Begin to fetch remote KV into `blocks`; with none to fill, the remote is told that it may forget them."""
        params = sequence.params or {}
        if not blocks:
            sequence.fetched = True
            self._spawn(self._notify(params, "done"))
            return
        missing = [key for key in TICKET_KEYS if key not in params]
        if not params.get("remote_block_ids"):
            self.violations.add(Rule.TICKET_MISSING_KEYS, sequence.request_id, missing=["remote_block_ids"])
            raise SchedulerAssertionError("num_external_tokens == 0")
        if missing:
            rule = Rule.TICKET_MISSING_REQUEST_ID if missing == ["remote_request_id"] else Rule.TICKET_MISSING_KEYS
            self.violations.add(rule, sequence.request_id, missing=missing)
            if "remote_engine_id" in missing:
                raise SchedulerAssertionError("remote_engine_id")
            return  # vLLM logs `Got invalid KVTransferParams` and the request waits for a transfer that nobody began
        if len(blocks) > len(params["remote_block_ids"][0]):
            self.violations.add(Rule.TICKET_ALTERED, sequence.request_id, remote_block_ids=params["remote_block_ids"])
            raise SchedulerAssertionError("num_local_blocks <= num_remote_blocks")
        if not isinstance(params["remote_port"], int):
            self.violations.add(Rule.TICKET_ALTERED, sequence.request_id, remote_port=params["remote_port"])
            return
        task = asyncio.ensure_future(self._fetch(sequence, params, blocks))
        self._fetches[sequence] = task

    def _remote(self, params: dict[str, Any]) -> Remote:
        address = (str(params["remote_host"]), int(params["remote_port"]))
        if address not in self._remotes:
            self._remotes[address] = Remote(*address)
        return self._remotes[address]

    async def _notify(self, params: dict[str, Any], operation: str) -> None:
        if all(key in params for key in TICKET_KEYS):
            remote = self._remote(params)
            sent = (remote.host, remote.port) not in self.broken_edges and await remote.tell(
                params["remote_engine_id"], operation, str(params["remote_request_id"])
            )
            self.metrics.failed_notifications += not sent

    async def _fetch(self, sequence: Sequence, params: dict[str, Any], blocks: list[Block]) -> None:
        """Read the remote blocks and let the sequence run; NIXL's whole life of one transfer."""
        loaded = False
        ids = [int(number) for number in params["remote_block_ids"][0]][-len(blocks) :]
        self._in_flight_transfers += 1
        try:
            tokens = sequence.external_tokens
            seconds = self.settings.profile.transfer_seconds(tokens, self._in_flight_transfers - 1) * self.link_slowdown
            begin = self._loop.time()
            remote = self._remote(params)
            if (remote.host, remote.port) in self.broken_edges:
                raise BrokenEdgeError(self.broken_edges[remote.host, remote.port])
            if params["remote_engine_id"] == self.engine_id:
                raise RemoteUnreachableError("an engine does not fetch from itself", at_once=True)
            answer = await remote.read(params["remote_engine_id"], str(params["remote_request_id"]), ids)
            self._judge(sequence, params, answer.lease)
            await asyncio.sleep(begin + seconds / self.settings.speed - self._loop.time())
            fill(blocks, answer.contents)
            loaded = True
            moved = len(blocks) * self.settings.block_size * self.settings.profile.kv_bytes_per_token
            edge = self.transfers.setdefault((remote.host, remote.port, params["remote_engine_id"]), [0, 0])
            edge[0] += 1
            edge[1] += moved
            self.metrics.transferred(seconds, moved, len(blocks))
            await self._notify(params, "done")
        except UnknownBlockError:
            self.violations.add(Rule.TICKET_ALTERED, sequence.request_id, remote_block_ids=ids)
            self.die()
            return
        except BrokenEdgeError as error:  # as below, but nothing that the router did: no violation
            self._failed(sequence, params, "this engine does not reach that side channel")
            await asyncio.sleep(error.seconds)
        except RemoteUnreachableError as error:
            fields = {key: params[key] for key in TICKET_KEYS}
            self.violations.add(Rule.TICKET_UNREACHABLE, sequence.request_id, reason=str(error), **fields)
            self._failed(sequence, params, str(error))
            await asyncio.sleep(0 if error.at_once else UNREACHABLE_SECONDS / self.settings.speed)
        finally:
            self._in_flight_transfers -= 1
            self._fetches.pop(sequence, None)
        if loaded:
            await self._noticed()
            # What was aborted meanwhile leaves its blocks unused and uncached, whatever they hold.
            if sequence.status is not Status.FINISHED:
                self._judge_time(sequence, params, answer.lease)
        self._fetched(sequence, blocks, loaded)

    def _failed(self, sequence: Sequence, params: dict[str, Any], why: str) -> None:
        """Count a failed transfer and log it, as vLLM's NIXL connector does."""
        self.metrics.failed_transfers += 1
        where = f"{params['remote_host']}:{params['remote_port']}"
        print(
            f"ERROR NIXL transfer failure: handshake_failed | request {sequence.request_id}, remote {where}: {why}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    async def _noticed(self) -> None:
        """Wait until the scheduler looks for ended transfers; all that ended since its last look are seen together."""
        now = self._loop.time()
        if self._next_look <= now:
            self._next_look = now + self.settings.profile.transfer_notice / self.settings.speed
        await asyncio.sleep(self._next_look - now)

    def _fetched(self, sequence: Sequence, blocks: list[Block], loaded: bool) -> None:
        if self.dead:
            return
        if sequence.status is Status.FINISHED:  # aborted meanwhile
            self.pool.release(sequence.blocks)
            sequence.blocks = []
        elif not loaded and self.settings.load_failure_policy == "fail":
            self.scheduler.finish(sequence)
            self.metrics.finished(sequence, "error", self._loop.time())
            sequence.outbox.fail(RequestFailedError())
        else:
            self.scheduler.fetched(sequence, loaded)
        self._wake_soon()

    def _judge(self, sequence: Sequence, params: dict[str, Any], lease: dict[str, Any] | None) -> None:
        """Compare a ticket with what the prefill engine knows of it; real engines check none of this."""

        def breach(rule: Rule, **fields: Any) -> None:
            self.violations.add(rule, sequence.request_id, remote_request_id=params["remote_request_id"], **fields)

        if lease is None:
            breach(Rule.CLIENT_TICKET, kv_transfer_params=params)
            return
        issued = lease["params"]
        altered = {key: params.get(key) for key in issued if key not in params or params[key] != issued[key]}
        if altered:
            breach(Rule.TICKET_ALTERED, **altered)
        if lease["prompt"] != prompt_digest(bytes(sequence.data[: len(sequence.prompt) * 4])):
            breach(
                Rule.TICKET_OTHER_PROMPT, prompt_tokens=len(sequence.prompt), ticket_tokens=issued["remote_num_tokens"]
            )
        if lease["model"] != self.settings.model:
            breach(Rule.TICKET_OTHER_MODEL, model=lease["model"])

    def _judge_time(self, sequence: Sequence, params: dict[str, Any], lease: dict[str, Any] | None) -> None:
        """Tell of KV that was read when its blocks were free, and that is used."""
        told = {"remote_request_id": params["remote_request_id"]}
        if lease is None:
            return
        if lease["state"] == "expired":
            self.violations.add(Rule.TICKET_EXPIRED, sequence.request_id, **told)
        # Each choice of one request reads for itself; the first that has done so frees the blocks.
        elif lease["readers"] >= sequence.choices or lease["state"] == "collected":
            told |= {"readers": lease["readers"], "state": lease["state"]}
            self.violations.add(Rule.TICKET_REUSED, sequence.request_id, **told)

    async def _watch_leases(self) -> None:
        """Expire leases of ours, and keep alive those of others that we have queued."""
        beat = self.leases.duration / 6
        next_beat = self._loop.time() + beat
        while True:
            await asyncio.sleep(min(0.1, beat / 2))
            now = self._loop.time()
            self.expire(now)
            if now >= next_beat:
                next_beat = now + beat
                for sequence in [*self.scheduler.waiting, *self.scheduler.fetching]:
                    if sequence.wants_remote_kv and sequence.params:
                        await self._notify(sequence.params, "heartbeat")

    def expire(self, now: float) -> None:
        """End the leases whose time is over."""
        for lease in self.leases.expire(now):
            self.violations.add(Rule.TICKET_NEVER_COLLECTED, lease.request_id, blocks=len(lease.blocks))
            lease.blocks = []

    # --- seen from outside --------------------------------------------------------------------------------------

    def request_id(self, prefix: str, index: int | None) -> str:
        """Make vLLM's internal request id: the public one, the prompt's place in a list, eight random hex digits."""
        middle = "" if index is None else f"-{index}"
        return f"{prefix}{middle}-{secrets.token_hex(4)}"

    def random_seed(self) -> int:
        """Draw a seed for a request that brings none."""
        return self._random.getrandbits(64)

    def state(self) -> dict[str, Any]:
        """Give the engine's part of `/sim/state`."""
        return {
            "engine_id": self.engine_id,
            "side_channel": {"host": self.settings.side_channel_host, "port": self.settings.side_channel_port},
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting) + len(self.scheduler.fetching),
            "blocks": {
                "total": self.pool.total - 1,
                "free": self.pool.free,
                "cached": self.pool.cached,
                "pinned": self.leases.pinned,
            },
            "tickets": len(self.leases.open),
            "transfers": [
                {"host": host, "port": port, "engine_id": engine_id, "transfers": count, "bytes": moved}
                for (host, port, engine_id), (count, moved) in self.transfers.items()
            ],
            "clock": self.clock.told(),
        }
