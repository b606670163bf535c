"""`pdctl eval`: what the served model knows, by lm_eval."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pdctl.cluster.api import ApiError, Unreachable
from pdctl.commands.loads import Label
from pdctl.commands.options import Context, Json, Name, Namespace
from pdctl.console import err, out, print_json
from pdctl.errors import ExitCode, PdctlError
from pdctl.evals import in_cluster, traps
from pdctl.evals.evaluate import LM_EVAL, Told, Wish, evaluate
from pdctl.evals.parity import Parity
from pdctl.evals.parity import parity as compared
from pdctl.evals.scores import scores_of, scores_table
from pdctl.report.write import write
from pdctl.runs import Run, Store
from pdctl.runs.setting import Place, command, machine, placed, versions
from pdctl.targets import KubernetesTarget


def eval_(
    here: typer.Context,
    task: Annotated[str, typer.Argument(help="A task or group of lm_eval, or several with commas.")] = "gsm8k",
    concurrency: Annotated[int, typer.Argument(min=1, help="Requests at once.")] = 1,
    limit: Annotated[
        int | None, typer.Argument(min=1, help="Documents of each task; of a group: of each task in it.",
                                   show_default="all")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.", show_default="as the task says")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own.", show_default=False)
    ] = None,
    name: Name = None,
    namespace: Namespace = None,
    context: Context = None,
    url: Annotated[str | None, typer.Option(help="Any OpenAI server instead of a deployment.")] = None,
    model: Annotated[str | None, typer.Option(help="Served model name.", show_default="what the server serves")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Its name or folder; served: the server's own.",
                     show_default="the model's from the hub, else the server's"),
    ] = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Also ask one engine alone, and compare texts and log-probabilities.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="URL of that engine.", show_default="the deployment's first decode engine")
    ] = None,
    inside: Annotated[
        bool, typer.Option("--in-cluster", help="Run lm_eval as a Job beside the engines, which goes on by itself.")
    ] = False,
    image: Annotated[
        str | None, typer.Option(help="Image of that Job; with lm_eval in it nothing is installed.",
                                 show_default="the engines'")
    ] = None,
    label: Label = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with an evaluation that was interrupted.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Evaluate the served model by the real lm_eval, in an environment of its own that is made on first use.

    Exit status 1 when answers or scores cannot be right. Interrupted, it goes on with --resume. HF_TOKEN is taken from
    the environment.
    """
    if resume is not None:
        run = Store().find(resume)
        if run.kind != "eval" or run.state in ("running", "done"):
            raise PdctlError(f"{run.name} is no interrupted evaluation ({run.kind}, {run.state})", "see pdctl runs ls")
        wish, asked = Wish(**run.about["wish"]), run.about["asked"]
        # The deployment is reached until the command ends.
        place = here.with_resource(placed(**asked))
        parity, against, inside, image = (run.about[key] for key in ("parity", "against", "inside", "image"))
    else:
        wish = Wish(
            task, concurrency, limit, num_fewshot, str(include_path.resolve()) if include_path else None, tokenizer
        )
        asked = {"url": url, "name": name, "namespace": namespace, "context": context, "model": model}
        place = here.with_resource(placed(**asked))
        if inside and (parity or not isinstance(place.target, KubernetesTarget)):
            raise PdctlError(
                "--in-cluster is for a deployment on Kubernetes, and without --parity", "leave it out", ExitCode.USAGE
            )
        against = _alone(place, against) if parity else None
        run = Store().new("eval", label)
        run.begin(
            {
                "kind": "eval", "task": task, "command": command(), "machine": machine(), "requests": None,
                "versions": versions() | {"lm_eval": LM_EVAL.packages[0].partition("==")[2]},
                "wish": wish.told(), "asked": asked, "parity": parity, "against": against, "inside": inside,
                "image": image, **place.told(),
            }
        )  # fmt: skip
    try:
        if resume is not None:
            run.resume()
        told = _evaluated(run, "", wish, place, inside, image)
        alone = None
        if against is not None:
            _evaluated(run, "alone-", wish, Place(against, place.model, served=place.served))
            alone = compared(run.lines("answers.jsonl"), run.lines("alone-answers.jsonl"))
            (run.folder / "parity.json").write_bytes(orjson.dumps(alone.told()))
    except KeyboardInterrupt:
        answered = sum(1 for _ in run.lines("answers.jsonl"))
        if run.away:
            raise PdctlError(
                f"{run.name} goes on in the cluster; {answered} answers were fetched",
                f"come back to it: pdctl eval --resume {run.name}; end it: pdctl runs stop {run.name}",
                ExitCode.INTERRUPTED,
            ) from None
        run.end("partial")
        raise PdctlError(
            f"interrupted after {answered} answers; they are kept and not asked again",
            f"go on with pdctl eval --resume {run.name}",
            ExitCode.INTERRUPTED,
        ) from None
    except (ApiError, Unreachable) as error:
        if run.away:  # the Job knows nothing of it
            error.next_step += f"; go on with pdctl eval --resume {run.name}; end it: pdctl runs stop {run.name}"
        else:
            run.end("failed")
        raise
    except BaseException:
        run.end("failed")
        raise
    found = _doubts(run, told)
    run.end("done", warnings=found)
    _show(run, told, found, alone, json)


def _alone(place: Place, against: str | None) -> str:
    if against is not None:
        return against.rstrip("/").removesuffix("/v1")
    if place.target is not None:
        decodes = [part.url for part in place.target.health() if part.role == "decode"]
        if decodes:
            return decodes[0]
    raise PdctlError("parity needs one engine to compare with", "name it by --against URL", ExitCode.USAGE)


def _evaluated(run: Run, part: str, wish: Wish, place: Place, inside: bool = False, image: str | None = None) -> Told:
    what = f"{run.name} alone" if part else run.name
    before = 0 if inside else len({line["prompt"] for line in run.lines(f"{part}answers.jsonl")})
    with _progress(what) as progress:
        announced = 0

        def on_told(told: Told) -> None:
            nonlocal announced
            if told.requests > announced:  # lm_eval has one kind of requests answered after the other
                announced = told.requests
                if not part:
                    run.note(requests=before + told.requests)
                _announce(wish, told, before)
            progress(told)

        if inside:
            assert isinstance(place.target, KubernetesTarget)
            if not in_cluster.goes_on(run, place.target):
                in_cluster.start(run, place.target, wish, place, image)
            return in_cluster.follow(run, place.target, on_told, _say)
        return evaluate(run, part, wish, place, on_told, _say)


def _say(text: str) -> None:
    err.print(text, style="dim", soft_wrap=True)


def _announce(wish: Wish, told: Told, before: int) -> None:
    tasks = f"{len(told.tasks)} tasks" if len(told.tasks) > 1 else told.tasks[0]
    line = f"{tasks}: {told.requests} requests, {wish.concurrency} at once"
    if before:
        line += f"; {before} were answered before"
    err.print(line, soft_wrap=True)
    if wish.limit is not None and len(told.tasks) > 1:
        err.print(
            f"[bold yellow]note[/]: the limit of {wish.limit} is of each of the {len(told.tasks)} tasks, and every "
            "choice of a question is a request",
            soft_wrap=True,
        )


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal, refresh_per_second=4) as bar:
        task = bar.add_task(what, total=None)
        yield lambda told: bar.update(task, completed=told.done, total=told.requests or None)


def _doubts(run: Run, told: Told) -> list[str]:
    found = traps.by_chance(scores_of(run), run.lines("samples.jsonl")) + traps.of_texts(run.lines("answers.jsonl"))
    if told.truncated:
        found.append(f"prompts were cut to fit: {told.truncated}")
    return found


def _show(run: Run, told: Told, found: list[str], alone: Parity | None, json: bool) -> None:
    if json:
        scores = orjson.loads((run.folder / "scores.json").read_bytes())
        print_json({"name": run.name, "simulated": run.simulated, "requests": run.about["requests"],
                    "results": scores["results"], "doubts": found, "parity": alone and alone.told()})  # fmt: skip
    else:
        what = "SIMULATED engines: their answers are no model's" if run.simulated else "measured"
        out.print(f"[bold]{what}[/]: {run.about['model']}, {run.about['requests']} requests", soft_wrap=True)
        out.print(scores_table(run))
        if alone is not None:
            out.print(_parity_told(alone), soft_wrap=True)
            for line in alone.examples:
                out.print(f"  {line}", markup=False, soft_wrap=True)
    write(run, run.folder / "report.html")
    err.print(f"run: {run.name}   report: {run.folder / 'report.html'}", soft_wrap=True)
    # simulated engines answer by chance; that is no fault of what is evaluated
    if found and run.simulated:
        for text in found:
            err.print(f"[bold yellow]warning[/]: {text}. These engines are simulated, so this is as it should be.",
                      soft_wrap=True)  # fmt: skip
    elif found:
        raise PdctlError("the scores cannot be trusted", f"see {run.folder / 'lm_eval.log'}", evidence=found)
    if alone is not None and not alone.exact:
        raise PdctlError(
            "the answers through prefill and decode are not those of one engine",
            "look at pdctl routing for breaches of the handoff protocol",
            evidence=alone.examples,
        )


def _parity_told(alone: Parity) -> str:
    if alone.exact:
        return f"[green]parity: exact[/]: {alone.compared} prompts, every text and every log-probability equal"
    return (
        f"[red]parity: not exact[/]: of {alone.compared} prompts {alone.texts_differ} have another text, "
        f"{alone.logprobs_differ} other log-probabilities (largest difference {alone.largest:.3g}), "
        f"{alone.missing} were answered by one of both only"
    )
