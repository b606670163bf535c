"""Runs lm_eval in its own environment: `python driver.py ORDERS.json`. Only lm_eval is imported, never pdctl.

It evaluates through `local-completions` as it is, with three additions: progress and counts as JSON lines on stdout, a
line for each answer in `answers.jsonl`, and an end at the first answer that cannot be right, before lm_eval makes a
score of it. When standard input ends, its parent is gone, and so is it; what was answered is in lm_eval's cache.
"""

import asyncio
import contextvars
import functools
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from lm_eval.utils import check_remote_tokenizer_support, make_table

TELL_SECONDS = 0.3
SAME_FROM = 8  # so many tokens with one and the same log-probability are no model's answer
_asked: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("asked", default=None)
Prompt = list[int]


class TrapError(BaseException):
    """An answer that lm_eval would take, and that cannot be right; no Exception, so that nothing asks again."""


def tell(**fields: Any) -> None:
    """Tell the parent."""
    print(json.dumps(fields), flush=True)


def check_logprobs(told: dict[str, Any] | None, prompt: Sequence[int]) -> None:
    """Check the log-probabilities of an echoed prompt and one token after it.

    Raises:
        TrapError: they are not of this prompt.
    """
    if not told or "token_logprobs" not in told:
        raise TrapError("the server gave no logprobs for a prompt with echo; it ignores `logprobs` or `echo`")
    given, wished = told["token_logprobs"], len(prompt) + 1
    if len(given) == 1:
        raise TrapError("the server ignores `echo`: it gave the log-probability of the generated token only")
    if len(given) == 2 * len(prompt) - 1 or len(given) == 2 * len(prompt):
        raise TrapError(
            f"{len(given)} log-probabilities for a prompt of {len(prompt)} tokens: prefill's and decode's answers were "
            "put together; requests with echo must go to one engine"
        )
    if len(given) != wished:
        raise TrapError(f"{len(given)} log-probabilities for a prompt of {len(prompt)} tokens, {wished} expected")
    known = given[1:]
    if any(value is None for value in known):
        raise TrapError("a token of the prompt has no log-probability: the server skipped a cached prefix")
    if len(known) >= SAME_FROM and len(set(known)) == 1:
        raise TrapError(f"all {len(known)} tokens have the log-probability {known[0]}: these are not a model's")


class Progress:
    """Counts answers and writes them down."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 lives as long as the process
        self.done = 0
        self.told = 0.0

    def answered(self, **fields: Any) -> None:
        """Write an answer down, and tell of it now and then."""
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()
        self.done += 1
        if time.monotonic() - self.told > TELL_SECONDS:
            self.told = time.monotonic()
            tell(done=self.done)


class Truncations(logging.Handler):
    """Notices that lm_eval cut a prompt to fit."""

    seen: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a line of the log."""
        if "truncat" in record.getMessage().lower() and "Using" not in record.getMessage():
            Truncations.seen = record.getMessage()


class Completions(LocalCompletionsAPI):  # type: ignore[misc] # lm_eval is not in the environment of the checks
    """lm_eval's client with checks."""

    progress: Progress

    def tok_encode(self, string: Any, *args: Any, **kwargs: Any) -> Any:
        """Encode; a server's tokenizer is asked without special tokens, so the begin token is put before here."""
        ids = super().tok_encode(string, *args, **kwargs)
        if self.tokenizer_backend != "remote" or not self.add_bos_token:
            return ids
        return [*self._begin, *ids] if isinstance(string, str) else [[*self._begin, *one] for one in ids]

    @functools.cached_property
    def _begin(self) -> Prompt:
        begin = self.tokenizer.bos_token_id  # a request to the server each time
        return [] if begin is None else [begin]

    def _count(self, kind: str, requests: Sequence[Any]) -> None:
        if requests:
            tasks = sorted({one.task_name for one in requests})
            tell(requests=len(requests), request_type=kind, tasks=tasks)

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> Any:
        """Tell how many there are, and ask."""
        self._count("loglikelihood", requests)
        return super().loglikelihood(requests, **kwargs)

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> Any:
        """Tell how many there are, and ask."""
        self._count("generate_until", requests)
        return super().generate_until(requests, **kwargs)

    def model_call(self, messages: list[Any], **kwargs: Any) -> Any:
        """Remember what is asked."""
        _asked.set(messages)
        return super().model_call(messages, **kwargs)

    async def amodel_call(self, session: Any, sem: Any, messages: list[Any], **kwargs: Any) -> Any:
        """Remember what is asked."""
        _asked.set(messages)
        return await super().amodel_call(session, sem, messages, **kwargs)

    @staticmethod
    def parse_logprobs(
        outputs: Any, tokens: list[Prompt] | None = None, ctxlens: list[int] | None = None, **kwargs: Any
    ) -> Any:
        """Check and keep the answer before lm_eval takes it."""
        outputs = outputs if isinstance(outputs, list) else [outputs]
        for output, prompt, context in zip(outputs, tokens or (), ctxlens or (), strict=False):
            told = output["choices"][0].get("logprobs")
            check_logprobs(told, prompt)
            kept = told["token_logprobs"]
            Completions.progress.answered(
                kind="loglikelihood", prompt=digest(prompt), tokens=len(prompt), logprobs=kept[1:-1],
                continuation=kept[context:-1], begins=prompt[0],
            )  # fmt: skip
        return LocalCompletionsAPI.parse_logprobs(outputs, tokens=tokens, ctxlens=ctxlens, **kwargs)

    @staticmethod
    def parse_generations(outputs: Any, **kwargs: Any) -> Any:
        """Keep the answer."""
        texts = LocalCompletionsAPI.parse_generations(outputs, **kwargs)
        asked = _asked.get() or [None] * len(texts)
        for prompt, text in zip(asked, texts, strict=False):
            usage = outputs["usage"] if isinstance(outputs, dict) else {}
            Completions.progress.answered(
                kind="generate_until", prompt=digest(prompt), text=text, tokens=usage.get("prompt_tokens"),
                generated=usage.get("completion_tokens"),
            )  # fmt: skip
        return texts


def digest(prompt: Any) -> str:
    """Name a prompt."""
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:24]


def tokenizer_of(orders: dict[str, Any]) -> dict[str, str]:
    """Find the tokenizer: the one that was named, the model's own, or the server's."""
    import transformers  # noqa: PLC0415 slow, and only for this

    named = orders["tokenizer"]
    if named != "served":
        try:
            transformers.AutoTokenizer.from_pretrained(named or orders["model"])
            return {"tokenizer_backend": "huggingface", "tokenizer": named or orders["model"]}
        except (OSError, ValueError) as error:
            if named is not None:
                raise SystemExit(f"the tokenizer {named} cannot be loaded: {str(error).splitlines()[0]}") from None
    if check_remote_tokenizer_support(orders["base_url"]):
        return {"tokenizer_backend": "remote"}
    raise SystemExit(
        "neither the hub nor the server gives the model's tokenizer: name it by --tokenizer, set HF_TOKEN for a gated "
        "model, or start the engines with --enable-tokenizer-info-endpoint"
    )


def parent_gone() -> None:
    """End when standard input does."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Evaluate."""
    with open(sys.argv[1], encoding="utf-8") as file:
        orders = json.load(file)
    threading.Thread(target=parent_gone, daemon=True).start()
    Completions.progress = Progress(orders["answers"])
    logging.getLogger("lm_eval").addHandler(Truncations())
    found = tokenizer_of(orders)
    tell(tokenizer=found)
    lm = Completions(
        model=orders["model"], base_url=orders["base_url"], num_concurrent=orders["concurrency"], max_retries=3,
        tokenized_requests=True, add_bos_token=True, max_length=orders["max_length"], timeout=orders["timeout"],
        **found,
    )  # fmt: skip
    try:
        results = simple_evaluate(
            model=lm, tasks=orders["tasks"], num_fewshot=orders["num_fewshot"], limit=orders["limit"],
            use_cache=orders["cache"], task_manager=TaskManager(include_path=orders["include_path"]),
            log_samples=True, bootstrap_iters=1000, random_seed=orders["seed"],
        )  # fmt: skip
    except TrapError as trap:
        tell(done=Completions.progress.done, trap=str(trap))
        os._exit(3)
    except (KeyError, ValueError, ConnectionError, OSError) as error:
        tell(done=Completions.progress.done, error=f"{type(error).__name__}: {str(error)[:400]}")
        os._exit(1)
    samples = results.pop("samples")
    with open(orders["samples"], "w", encoding="utf-8") as file:
        for task, lines in samples.items():
            for line in lines:
                file.write(json.dumps({"task": task} | line, default=str) + "\n")
    print(make_table(results), file=sys.stderr)
    with open(orders["scores"], "w", encoding="utf-8") as file:
        json.dump(results, file, default=str)
    tell(done=Completions.progress.done, over=True, truncated=Truncations.seen)
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except asyncio.CancelledError:
        os._exit(1)
