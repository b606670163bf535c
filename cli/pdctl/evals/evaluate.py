"""lm_eval run once: its environment, its orders, what it tells."""

import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx
import orjson

from pdctl.environments import Environment
from pdctl.errors import PdctlError
from pdctl.runs.run import Run
from pdctl.runs.setting import Place, authorization

LM_EVAL = Environment("lm-eval-0.4.13", ("lm_eval[api]==0.4.13", "transformers>=4.57"))
DEFAULT_LENGTH = 8192
TIMEOUT_SECONDS = 1800
_ERROR_LINES = 12


@dataclass(frozen=True, slots=True)
class Wish:
    """What is evaluated.

    Args:
        task: one of lm_eval's tasks or groups, or several with commas.
        concurrency: requests at once.
        limit: documents of each task; of a group: of each of its tasks.
        num_fewshot: examples before each question; nothing: as the task says.
        include_path: a folder with tasks of one's own.
        tokenizer: name or folder; `served`: the server's; nothing: the model's from the hub, else the server's.
        seed: of the choice of examples.
    """

    task: str
    concurrency: int
    limit: int | None
    num_fewshot: int | None
    include_path: str | None
    tokenizer: str | None
    seed: int = 1234

    def told(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self)


@dataclass(slots=True)
class Told:
    """What the driver told.

    Args:
        requests: how many requests it sends, those of an earlier start left out.
        tasks: their tasks.
        done: how many were answered.
        truncated: lm_eval's words when it cut a prompt.
    """

    requests: int = 0
    tasks: tuple[str, ...] = ()
    done: int = 0
    truncated: str | None = None


def max_length(place: Place) -> int:
    """Give the tokens that a prompt and its answer may have, as the server tells it."""
    try:
        answer = httpx.get(place.url + "/v1/models", timeout=10, headers=authorization())
        told = answer.json()["data"][0].get("max_model_len")
        return int(told) if told else DEFAULT_LENGTH
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return DEFAULT_LENGTH


def orders_of(wish: Wish, place: Place, part: str, folder: Path) -> dict[str, Any]:
    """Give the driver's orders; `folder` is where its files go."""
    return {
        "tasks": wish.task.split(","), "concurrency": wish.concurrency, "limit": wish.limit, "seed": wish.seed,
        "num_fewshot": wish.num_fewshot, "include_path": wish.include_path, "model": place.model,
        "base_url": f"{place.url}/v1/completions", "max_length": max_length(place), "timeout": TIMEOUT_SECONDS,
        "tokenizer": wish.tokenizer or ("served" if place.simulated else None),
        "answers": str(folder / f"{part}answers.jsonl"), "samples": str(folder / f"{part}samples.jsonl"),
        "scores": str(folder / f"{part}scores.json"), "cache": str(folder / f"{part}cache"),
    }  # fmt: skip


def evaluate(
    run: Run, part: str, wish: Wish, place: Place, on_told: Callable[[Told], None], say: Callable[[str], None]
) -> Told:
    """Run lm_eval against a place; what an earlier start got answered is not asked again.

    Args:
        run: where it is kept.
        part: prefix of its files: empty, or `alone-` for the engine that parity is checked against.
        wish: what is evaluated.
        place: where to.
        on_told: told what comes.
        say: told what takes a while.

    Raises:
        PdctlError: lm_eval failed, or an answer cannot be right.
    """
    python = LM_EVAL.program("python", say)
    folder = run.folder
    orders = orders_of(wish, place, part, folder)
    path, log = folder / f"{part}orders.json", folder / f"{part}lm_eval.log"
    path.write_bytes(orjson.dumps(orders, option=orjson.OPT_INDENT_2))
    heard = Heard(log)
    with as_file(files("pdctl.evals") / "driver.py") as driver, log.open("ab") as errors:
        process = subprocess.Popen(
            [python, str(driver), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            start_new_session=True, env=_environment(wish),
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if heard.all([line]):
                    on_told(heard.told)
                if heard.over:
                    return heard.told
            raise heard.failed(f"lm_eval ended with status {process.wait()}")
        finally:
            assert process.stdin is not None
            process.stdin.close()  # it ends by that
            process.wait()
            process.stdout.close()


def _environment(wish: Wish) -> dict[str, str]:
    made = dict(os.environ) | {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_TRUST_REMOTE_CODE": "0"}
    if wish.tokenizer == "served":
        made["HF_HUB_DISABLE_TELEMETRY"] = "1"
    return made


@dataclass(slots=True)
class Heard:
    """What the driver has said so far.

    Args:
        log: where its other words are.
        told: what it came to.
        over: whether it has evaluated all.
    """

    log: Path
    told: Told = field(default_factory=Told)
    over: bool = False

    def all(self, lines: Iterable[bytes]) -> bool:
        """Take lines; give whether one of them told something.

        Raises:
            PdctlError: lm_eval failed, or an answer cannot be right.
        """
        told = self.told
        some = False
        for line in lines:
            try:
                said = orjson.loads(line)
            except ValueError:
                continue  # a library's own words
            if not isinstance(said, dict):
                continue
            if "trap" in said:
                raise PdctlError(
                    f"the answers cannot be right: {said['trap']}",
                    "no score was made of them; check what stands between here and the engine, then go on with "
                    "--resume",
                )
            if "error" in said:
                raise self.failed(said["error"])
            if "requests" in said:
                told.requests += said["requests"]
                told.tasks = tuple(sorted({*told.tasks, *said["tasks"]}))
            told.done = said.get("done", told.done)
            told.truncated = said.get("truncated", told.truncated)
            self.over = self.over or bool(said.get("over"))
            some = True
        return some

    def failed(self, cause: str) -> PdctlError:
        """Give an error with the end of the log."""
        lines = [line[:300] for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        step = f"see the whole log: {self.log}; then go on with --resume"
        return PdctlError(cause, step, evidence=lines[-_ERROR_LINES:])
