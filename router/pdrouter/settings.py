"""What the router is told at its start: flags, a YAML file, the environment."""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import jsonschema
import yaml

from pdrouter.discovery.found import Found
from pdrouter.fleet.engine import Role
from pdrouter.policies import POLICIES

API_KEY_VARIABLE = "PD_ROUTER_API_KEY"


class SettingsError(Exception):
    """The router cannot start with these settings; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a router process. Times are seconds, sizes bytes."""

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    policy: str = "consistent_hash"
    prefill_policy: str | None = None
    decode_policy: str | None = None
    host: str = "0.0.0.0"
    port: int = 10001
    prometheus_host: str = "0.0.0.0"
    prometheus_port: int = 29000
    log_level: str = "info"
    request_timeout_secs: float = 1800.0
    connect_timeout_secs: float = 3.0
    drain_timeout_secs: float = 30.0
    health_interval_secs: float = 1.0
    scrape_interval_secs: float = 0.25
    seed: int | None = None
    kv_lease_seconds: float = 30.0
    max_payload_size: int = 64 * 1024 * 1024
    api_key: str | None = None

    def found(self) -> Iterator[Found]:
        """Give the engines that are named one by one, each under its URL."""
        for role, urls in ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode)):
            for url in urls:
                yield Found(url, url, role)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pd-router",
        description="Routes OpenAI requests to vLLM engines, prefill and decode on separate ones (NIXL).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    policies = sorted(POLICIES)
    add("--config", metavar="FILE", help="YAML file with the same settings, named as the flags with underscores")
    add(
        "--vllm-pd-disaggregation", "--pd-disaggregation", action="store_true", default=None,
        help="prefill and decode on separate engines; the router knows no other mode",
    )  # fmt: skip
    add(
        "--prefill", action="append", nargs="+", metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill engine; repeat for each. NIXL needs no bootstrap port: it is taken and not used",
    )  # fmt: skip
    add("--decode", action="append", metavar="URL", help="a decode engine; repeat for each")
    add("--policy", choices=policies, help="how engines are chosen (default consistent_hash)")
    add("--prefill-policy", choices=policies, help="for prefill engines instead of --policy")
    add("--decode-policy", choices=policies, help="for decode engines instead of --policy")
    add("--host", help="address of the public port (default 0.0.0.0)")
    add("--port", type=int, help="public port (default 10001)")
    add("--prometheus-host", metavar="HOST", help="address of the metrics port (default 0.0.0.0)")
    add("--prometheus-port", metavar="PORT", type=int, help="metrics port (default 29000)")
    add("--log-level", choices=["debug", "info", "warning", "error", "critical"], help="default info")
    add("--request-timeout-secs", metavar="S", type=float, help="longest time for one request (default 1800)")
    add("--connect-timeout-secs", metavar="S", type=float, help="for a connection to an engine (default 3)")
    add("--drain-timeout-secs", metavar="S", type=float, help="how long requests go on after SIGTERM (default 30)")
    add("--health-interval-secs", metavar="S", type=float, help="time between health checks (default 1)")
    add(
        "--scrape-interval-secs", metavar="S", type=float,
        help="time between readings of an engine's /metrics, where the policy uses them (default 0.25, 0: never)",
    )  # fmt: skip
    add("--seed", metavar="N", type=int, help="make random choices repeat, for tests and comparisons")
    add("--kv-lease-seconds", metavar="S", type=float, help="kv_lease_duration of the prefill engines (default 30)")
    add("--max-payload-size", metavar="BYTES", type=int, help="largest request body (default 67108864)")
    add("--api-key", metavar="KEY", help=f"key that clients must send; better by {API_KEY_VARIABLE} or a file")
    add("--api-key-file", metavar="FILE", help="file that holds the key")
    add("--intra-node-data-parallel-size", metavar="N", type=int, default=1, help="only 1: one engine per URL")
    return parser


def _unknown(flag: str, parser: argparse.ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(flag.partition("=")[0], known, 1)
    return f"unknown flag {flag}; " + (f"did you mean {close[0]}?" if close else "pd-router --help lists all flags")


def _flags(argv: Sequence[str]) -> dict[str, Any]:
    parser = _parser()
    told, unknown = parser.parse_known_args(argv)
    if unknown:
        raise SettingsError(_unknown(unknown[0], parser))
    given = {name: value for name, value in vars(told).items() if value is not None}
    ranks = given.pop("intra_node_data_parallel_size")
    if ranks != 1:
        raise SettingsError(
            f"--intra-node-data-parallel-size {ranks} would send ranks 0 to {ranks - 1} to every engine (header "
            "X-data-parallel-rank), and an engine with one GPU refuses all but rank 0; leave the flag out and name "
            "each engine by its own --prefill or --decode URL"
        )
    if "prefill" in given:
        given["prefill"] = [_prefill_url(parts) for parts in given["prefill"]]
    return given


def _prefill_url(parts: list[str]) -> str:
    url, *rest = parts
    if len(rest) > 1 or any(port != "none" and not port.isdecimal() for port in rest):
        raise SettingsError(
            f"--prefill takes URL [BOOTSTRAP_PORT|none], not {' '.join(parts)}; repeat the flag for each"
        )
    return url


def _file(path: str) -> dict[str, Any]:
    try:
        told = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    schema = json.loads(files("pdrouter").joinpath("config.schema.json").read_text(encoding="utf-8"))
    told = {} if told is None else told
    found = jsonschema.Draft202012Validator(schema).iter_errors(told)
    wrong = [f"{'.'.join(map(str, one.absolute_path)) or 'the file'}: {one.message}" for one in found]
    if wrong:
        raise SettingsError(f"--config {path} does not fit: {'; '.join(sorted(wrong)[:5])}")
    return dict(told)


def _checked_url(url: str, flag: str) -> str:
    def refuse(why: str) -> NoReturn:
        raise SettingsError(f"{flag} {url}: {why}; write it as http://HOST:PORT")

    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        refuse(str(error))
    if parts.scheme != "http":
        refuse("engines are reached by http")
    if "@" in parts.netloc:
        refuse("it has an @: credentials and data-parallel ranks are not for engine URLs")
    if not parts.hostname or not port or any(character <= " " or character > "~" for character in url):
        refuse("it needs a host and a port")
    if parts.path or parts.query or parts.fragment:
        refuse("nothing may follow the port")
    return url


def _key(given: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    if "api_key" in given and "api_key_file" in given:
        raise SettingsError("--api-key and --api-key-file contradict each other; give one")
    key = given.get("api_key")
    if "api_key_file" in given:
        try:
            key = Path(given["api_key_file"]).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read --api-key-file {given['api_key_file']}: {error}") from None
    elif key is None:
        key = environment.get(API_KEY_VARIABLE)
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise SettingsError("the API key is empty or has characters that a header cannot carry")
    return str(key) if key is not None else None


def _check(settings: Settings) -> None:
    for role, urls in (("prefill", settings.prefill), ("decode", settings.decode)):
        if not urls:
            raise SettingsError(f"no {role} engine; give --{role} URL, once for each engine")
        for url in urls:
            _checked_url(url, f"--{role}")
            if urls.count(url) > 1:
                raise SettingsError(f"--{role} {url} is given twice")
    both = set(settings.prefill) & set(settings.decode)
    if both:
        raise SettingsError(f"{both.pop()} is given as --prefill and as --decode; an engine has one role")
    for name in ("port", "prometheus_port"):
        if not 1 <= getattr(settings, name) <= 65535:
            raise SettingsError(f"--{name.replace('_', '-')} {getattr(settings, name)} is no port (1 to 65535)")
    everywhere = {settings.host, settings.prometheus_host} & {"0.0.0.0", "::", ""}
    if settings.port == settings.prometheus_port and (settings.host == settings.prometheus_host or everywhere):
        raise SettingsError(f"--port and --prometheus-port are both {settings.port}; they must differ")
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.type is float and not (
            value > 0 or (value == 0 and field.name in ("drain_timeout_secs", "scrape_interval_secs"))
        ):
            raise SettingsError(f"--{field.name.replace('_', '-')} {value:g} must be above 0")
    if settings.max_payload_size < 1:
        raise SettingsError(f"--max-payload-size {settings.max_payload_size} must be above 0")


def load(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Settings:
    """Read all settings; flags win over the file, which wins over the environment.

    Raises:
        SettingsError: a flag or a setting is unknown, wrong or in contradiction to another.
    """
    flags = _flags(argv)
    path = flags.pop("config", None)
    told = _file(path) if path is not None else {}
    if "api_key" in flags or "api_key_file" in flags:
        told = {name: value for name, value in told.items() if name not in ("api_key", "api_key_file")}
    given = told | flags
    key = _key(given, environment)
    for name in ("api_key", "api_key_file", "vllm_pd_disaggregation"):
        given.pop(name, None)
    prefill, decode = tuple(given.pop("prefill", ())), tuple(given.pop("decode", ()))
    settings = Settings(prefill, decode, **given, api_key=key)
    _check(settings)
    return settings


def exit_with(message: str, status: int) -> NoReturn:
    """End the process with one line on standard error."""
    print(f"pd-router: {message}", file=sys.stderr)
    raise SystemExit(status)
