"""What a deployment consists of: two releases, their charts, the values asked for; as helmfile.yaml says it.

Another router before the same engines is a third one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import pdctl
from pdctl.cluster.api import scratch
from pdctl.cluster.helm import Release
from pdctl.errors import ExitCode, PdctlError

NETWORKS = ("none", "infiniband", "roce", "efa")
NAMESPACE = "vllm-router-pd-llama31"
ENGINES, ROUTER = "ms-llama31", "vllm-router-llama31"
PARTS = ("engines", "router")
OTHERS = {"llm-d": "llm-d-router", "vllm-router": "vllm-router"}
"""Releases of other routers before the same engines, by what these are called; each has a chart of its name."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What `deploy` was asked for.

    Args:
        model: `values/MODEL.yaml`, or a file of that kind.
        network: `values/NETWORK.yaml`.
        files: values files with the keys `engines` and `router`.
        sets: `engines.KEY=VALUE` or `router.KEY=VALUE`.
        prefill, decode: numbers of engines, where they were given.
        image: of the engines, REPOSITORY[:TAG][@DIGEST], where it was given.
        policy: of the router, where it was given.
    """

    model: str = "llama31-8b"
    network: str = "none"
    files: tuple[Path, ...] = ()
    sets: tuple[str, ...] = ()
    prefill: int | None = None
    decode: int | None = None
    image: str | None = None
    policy: str | None = None


def sources() -> Path:
    """Give the folder with `charts` and `values`: beside this package when it is installed, else the repository."""
    package = Path(pdctl.__file__).parent
    for folder in (package / "deployable", package.parents[1]):
        if (folder / "charts/pd-engines/Chart.yaml").exists():
            return folder
    raise PdctlError(
        "this installation of pdctl has no charts", "install pdctl again, or run it from its repository",
        ExitCode.PREFLIGHT,
    )  # fmt: skip


def _values(name: str, what: str) -> Path:
    folder = sources() / "values"
    for path in (folder / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in (*NETWORKS, *OTHERS))
    raise PdctlError(
        f"there is no {what} {name!r}", f"choose one of {', '.join(known)}, or name a values file", ExitCode.USAGE
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        told = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader) or {}
    except OSError as error:
        raise PdctlError(f"{path} cannot be read: {error.strerror}", "correct -f", ExitCode.USAGE) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date that cannot be
        raise PdctlError(f"{path} is not YAML: {error}", "correct the file", ExitCode.USAGE) from None
    wrong = sorted(map(str, set(told) - set(PARTS))) if isinstance(told, dict) else ["no map"]
    if wrong:
        raise PdctlError(
            f"{path} has {', '.join(wrong)} at its top",
            "put values of charts/pd-engines under engines: and those of charts/pd-router under router:",
            ExitCode.USAGE,
        )
    return dict(told)


def _of_part(part: str, sets: Sequence[str]) -> tuple[str, ...]:
    return tuple(one.removeprefix(part + ".") for one in sets if one.startswith(part + "."))


def _checked(sets: Sequence[str]) -> None:
    for one in sets:
        head, found, _ = one.partition("=")
        if not found or head.partition(".")[0] not in PARTS or "." not in head:
            raise PdctlError(
                f"--set {one} does not say whose value it is",
                f"write --set engines.{one} or --set router.{one}" if found else "write engines.KEY=VALUE",
                ExitCode.USAGE,
            )


def image_sets(image: str) -> tuple[str, ...]:
    """Give the values that an image's name stands for."""
    rest, _, digest = image.partition("@")
    head, slash, last = rest.rpartition("/")
    name, _, tag = last.partition(":")
    told = [f"image.repository={head}{slash}{name}"]
    return (*told, *([f"image.tag={tag}"] if tag else []), *([f"image.digest={digest}"] if digest else []))


def releases(asked: Asked) -> tuple[Release, Release]:
    """Work out the two releases.

    Raises:
        PdctlError: values that cannot be; exit code USAGE.
    """
    _checked(asked.sets)
    if asked.network not in NETWORKS:
        raise PdctlError(
            f"there is no network {asked.network!r}", f"choose one of {', '.join(NETWORKS)}", ExitCode.USAGE
        )
    charts = sources() / "charts"
    files: dict[str, list[Path]] = {"engines": [], "router": []}
    for number, path in enumerate(asked.files):
        for part, told in _read(path).items():
            copy = scratch() / f"{part}-{number}.yaml"
            copy.write_text(yaml.safe_dump(told))
            files[part].append(copy)
    engines = [f"{role}.replicas={count}" for role, count in _counts(asked) if count is not None]
    engines += image_sets(asked.image) if asked.image else ()
    router = [f"engines.release={ENGINES}", f"labels.model={ENGINES.removeprefix('ms-')}"]
    router += [f"config.policy={asked.policy}"] if asked.policy else []
    base = (_values(asked.model, "model"), _values(asked.network, "network"))
    return (
        Release(
            "engines", ENGINES, charts / "pd-engines", (*base, *files["engines"]),
            (*engines, *_of_part("engines", asked.sets)),
        ),
        Release(
            "router", ROUTER, charts / "pd-router", tuple(files["router"]), (*router, *_of_part("router", asked.sets)),
        ),
    )  # fmt: skip


def _counts(asked: Asked) -> tuple[tuple[str, int | None], ...]:
    return ("prefill", asked.prefill), ("decode", asked.decode)


def changed(part: str, sets: Sequence[str]) -> Release:
    """Give a release that keeps the values that it was made with, but for these."""
    name, chart = (ENGINES, "pd-engines") if part == "engines" else (ROUTER, "pd-router")
    return Release(part, name, sources() / "charts" / chart, (), tuple(sets), reuse=True)


def standing_in(router: str, policy: str, ports: Mapping[str, int], engines: Sequence[tuple[str, str]]) -> Release:
    """Give the release of another router before the engines that run.

    Args:
        router: one of `OTHERS`.
        policy: how it chooses engines; of llm-d, the preset of its endpoint picker.
        ports: of the engines, by role.
        engines: role and address of each engine; vllm-router is told them, llm-d finds them.
    """
    sets = [f"engines.release={ENGINES}", *(f"engines.{role}Port={port}" for role, port in ports.items())]
    files: tuple[Path, ...] = ()
    if router == "llm-d":
        sets += [f"epp.preset={policy}"]
        files = (sources() / "values/llm-d.yaml",)
    else:
        for role in ports:
            urls = ",".join(f"http://{address}:{ports[role]}" for one, address in engines if one == role)
            sets += [f"engines.{role}={{{urls}}}"]
        sets += [f"policy={policy}"]
    return Release("router", OTHERS[router], sources() / "charts" / OTHERS[router], files, tuple(sets))
