"""What the router is told at its start: flags, a YAML file, the environment.

`config.schema.json` names every setting with its meaning and its bounds; flags and the file are both read by it.
`Settings` has the defaults.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import jsonschema
import yaml

from pdrouter.discovery.found import Found, Identity
from pdrouter.fleet.engine import Role
from pdrouter.policies import POLICIES
from pdrouter.server.limits import Limits

API_KEY_VARIABLE = "PD_ROUTER_API_KEY"


class SettingsError(Exception):
    """The router cannot start with these settings; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a router. Times are seconds, sizes bytes; `config.schema.json` tells what each means."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    prefill_dns: str | None = None
    decode_dns: str | None = None
    prefill_selector: str | None = None
    decode_selector: str | None = None
    service_discovery_namespace: str | None = None
    service_discovery_port: str | int | None = None
    identity: Identity = "address"
    policy: str = "consistent_hash"
    prefill_policy: str | None = None
    decode_policy: str | None = None
    session_header: str | None = None
    seed: int | None = None
    scrape_interval_secs: float = 0.25
    host: str = "0.0.0.0"
    port: int = 10001
    prometheus_host: str = "0.0.0.0"
    prometheus_port: int = 29000
    admin_host: str = "127.0.0.1"
    admin_port: int | None = None
    workers: int = 1
    share_ports: bool = False
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    debug_routing: int = 128
    record_dir: str | None = None
    record_max_bytes: int = 256 * 1024 * 1024
    otel_endpoint: str | None = None
    request_timeout_secs: float = 1800.0
    connect_timeout_secs: float = 3.0
    drain_timeout_secs: float = 30.0
    health_interval_secs: float = 1.0
    kv_lease_seconds: float = 30.0
    stall_timeout_secs: float = 8.0
    continue_streams: bool = True
    decode_only: bool = True
    hedge_prefill_secs: float = 0.0
    canary_interval_secs: float = 0.0
    max_concurrent_requests: int = 4096
    queue_size: int = 1024
    queue_timeout_secs: float = 30.0
    max_prompts: int = 1024
    max_payload_size: int = 64 * 1024 * 1024
    max_payload_memory: int = 1024 * 1024 * 1024
    max_answer_memory: int = 256 * 1024 * 1024
    max_header_size: int = 32 * 1024
    max_headers: int = 128
    max_connections: int = 16384
    max_connections_per_client: int = 8192
    client_head_timeout_secs: float = 15.0
    client_body_timeout_secs: float = 30.0
    client_idle_timeout_secs: float = 75.0
    client_write_timeout_secs: float = 120.0
    tls_cert_file: str | None = None
    tls_key_file: str | None = None
    api_key: str | None = None

    def found(self) -> Iterator[Found]:
        """Give the engines that are named one by one, each under its URL."""
        for role, urls in ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode)):
            for url in urls:
                yield Found(url, url, role)

    def limits(self) -> Limits:
        """Give what a client may not exceed."""
        return Limits(
            body=self.max_payload_size,
            bodies=self.max_payload_memory,
            unsent=self.max_answer_memory,
            head=self.max_header_size,
            header_count=self.max_headers,
            head_seconds=self.client_head_timeout_secs,
            body_seconds=self.client_body_timeout_secs,
            idle_seconds=self.client_idle_timeout_secs,
            write_seconds=self.client_write_timeout_secs,
            connections=self.max_connections,
            connections_per_client=self.max_connections_per_client,
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def schema() -> dict[str, Any]:
    """Give the schema of the configuration file."""
    told: dict[str, Any] = json.loads(files("pdrouter").joinpath("config.schema.json").read_text(encoding="utf-8"))
    told["$defs"]["policy"]["enum"] = sorted(POLICIES)
    return told


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pd-router",
        description="Routes OpenAI requests to vLLM engines, prefill and decode on separate ones (NIXL).",
        allow_abbrev=False,
    )
    add = parser.add_argument
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
    told = schema()
    defaults = {field.name: field.default for field in fields(Settings)}
    for name, meaning in told["properties"].items():
        if name in ("vllm_pd_disaggregation", "prefill", "decode"):
            continue
        kind = meaning | told["$defs"].get(meaning.get("$ref", "").rpartition("/")[2], {})
        default = defaults.get(name)
        text = meaning["description"] if default is None else f"{meaning['description']} Default {default}."
        if kind.get("type") == "boolean":
            add(_flag(name), action=argparse.BooleanOptionalAction, default=None, help=meaning["description"])
        elif "enum" in kind:
            add(_flag(name), choices=kind["enum"], help=text)
        else:
            read = {"integer": int, "number": float}.get(str(kind["type"]), str)
            metavar = {int: "N", float: "S"}.get(read, "TEXT")
            add(_flag(name), type=read, metavar=metavar, help=text.replace("%", "%%"))
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
    port = given.get("service_discovery_port")
    if isinstance(port, str) and port.isdecimal():
        given["service_discovery_port"] = int(port)
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
    told = {} if told is None else told
    found = jsonschema.Draft202012Validator(schema()).iter_errors(told)
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


def checked_worker(url: str) -> str:
    """Check the URL of an engine that is added by hand.

    Raises:
        SettingsError: it is no http://HOST:PORT.
    """
    return _checked_url(url, "url")


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


def _check_engines(settings: Settings) -> None:
    for role, urls in (("prefill", settings.prefill), ("decode", settings.decode)):
        elsewhere = getattr(settings, f"{role}_dns") or getattr(settings, f"{role}_selector")
        if not urls and not elsewhere and settings.admin_port is None:
            raise SettingsError(
                f"no {role} engine; give --{role} URL, once for each engine, or --{role}-dns or --{role}-selector"
            )
        for url in urls:
            _checked_url(url, f"--{role}")
            if urls.count(url) > 1:
                raise SettingsError(f"--{role} {url} is given twice")
    both = set(settings.prefill) & set(settings.decode)
    if both:
        raise SettingsError(f"{both.pop()} is given as --prefill and as --decode; an engine has one role")


def _check(settings: Settings) -> None:
    _check_engines(settings)
    ports = [
        ("port", settings.host),
        ("prometheus_port", settings.prometheus_host),
        ("admin_port", settings.admin_host),
    ]
    taken: dict[int, list[tuple[str, str]]] = {}
    for name, host in ports:
        port = getattr(settings, name)
        if port is None:
            continue
        if not 1 <= port <= 65535:
            raise SettingsError(f"{_flag(name)} {port} is no port (1 to 65535)")
        for other, address in taken.get(port, ()):
            if address == host or {address, host} & {"0.0.0.0", "::", ""}:
                raise SettingsError(f"{_flag(other)} and {_flag(name)} are both {port}; they must differ")
        taken.setdefault(port, []).append((name, host))
    properties = schema()["properties"]
    for field in fields(settings):
        value, bounds = getattr(settings, field.name), properties[field.name]
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if "exclusiveMinimum" in bounds and not value > bounds["exclusiveMinimum"]:
            raise SettingsError(f"{_flag(field.name)} {value:g} must be above {bounds['exclusiveMinimum']:g}")
        if "minimum" in bounds and not value >= bounds["minimum"]:
            raise SettingsError(f"{_flag(field.name)} {value:g} must be {bounds['minimum']} or more")
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        raise SettingsError("--tls-cert-file and --tls-key-file belong together; give both or none")


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
