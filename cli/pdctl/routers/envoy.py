"""Envoy's configuration, in the standalone layout that llm-d publishes; and how it lets go of clients."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson

from pdctl.ports import HOST

_TYPES = "type.googleapis.com/envoy"
_NO_LIMIT = {"max_connections": 40000, "max_pending_requests": 40000, "max_requests": 40000}
_LOOK_SECONDS = 0.1
_ACTIVE = r"^(http|tcp)\.clients\.downstream_(rq|cx)_active"


def command(program: str, config: Path) -> list[str]:
    """Give how Envoy is started: threads by the processors it may use, as llm-d's chart says."""
    return [
        program, "-c", str(config), "--log-level", "warn", "--cpuset-threads", "--drain-strategy", "immediate",
        "--drain-time-s", "60", "--disable-hot-restart",
    ]  # fmt: skip


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": HOST, "port_value": port}}


def _typed(kind: str, **fields: Any) -> dict[str, Any]:
    return {"@type": f"{_TYPES}.{kind}"} | fields


def _to(name: str, port: int, **more: Any) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(port)}}
    return {
        "name": name, "type": "STATIC", "connect_timeout": "5s", "circuit_breakers": {"thresholds": [_NO_LIMIT]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    } | more  # fmt: skip


def _log() -> list[dict[str, Any]]:
    line = '{"start_time":"%START_TIME%","method":"%REQ(:METHOD)%","code":"%RESPONSE_CODE%"}\n'
    kind = "extensions.access_loggers.file.v3.FileAccessLog"
    format_ = {"text_format_source": {"inline_string": line}}
    return [{"name": "file", "typed_config": _typed(kind, path="/dev/stdout", log_format=format_)}]


def _picked(picker: int) -> dict[str, Any]:
    """Give the filter that asks the endpoint picker, with every body in full duplex as llm-d's chart has it."""
    send = {
        f"{way}_{part}_mode": how
        for way in ("request", "response")
        for part, how in (("header", "SEND"), ("body", "FULL_DUPLEX_STREAMED"), ("trailer", "SEND"))
    }
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": _typed(
            "extensions.filters.http.ext_proc.v3.ExternalProcessor",
            failure_mode_allow=True, processing_mode=send, message_timeout="1000s",
            grpc_service={
                "envoy_grpc": {"cluster_name": "picker", "authority": f"{HOST}:{picker}"}, "timeout": "10s",
            },
        ),
    }  # fmt: skip


def gateway(ports: Sequence[int], admin: int, picker: int) -> dict[str, Any]:
    """Give the configuration of the Envoy before llm-d's endpoint picker.

    Args:
        ports: where clients find it.
        admin: port of its administration.
        picker: port of the endpoint picker.
    """
    route = {"match": {"prefix": "/"}, "route": {"cluster": "chosen", "timeout": "86400s", "idle_timeout": "86400s"}}
    filters = [
        _picked(picker),
        {
            "name": "envoy.filters.http.router",
            "typed_config": _typed("extensions.filters.http.router.v3.Router", suppress_envoy_headers=True),
        },
    ]
    manager = _typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="clients", http_filters=filters, use_remote_address=True, normalize_path=True, merge_slashes=True,
        server_header_transformation="PASS_THROUGH", access_log=_log(),
        common_http_protocol_options={"headers_with_underscores_action": "REJECT_REQUEST"},
        path_with_escaped_slashes_action="UNESCAPE_AND_REDIRECT",
        route_config={"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
    )  # fmt: skip
    windows = {"initial_stream_window_size": 65536, "initial_connection_window_size": 1048576}
    http2 = _typed(
        "extensions.upstreams.http.v3.HttpProtocolOptions",
        explicit_http_config={"http2_protocol_options": windows},
    )
    chosen = {
        "name": "chosen", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "1000s",
        "circuit_breakers": {"thresholds": [_NO_LIMIT]},
        "original_dst_lb_config": {
            "use_http_header": True, "http_header_name": "x-gateway-destination-endpoint",
        },
    }  # fmt: skip
    health = {
        "timeout": "2s", "interval": "10s", "unhealthy_threshold": 3, "healthy_threshold": 2,
        "grpc_health_check": {"service_name": "envoy.service.ext_proc.v3.ExternalProcessor"},
    }  # fmt: skip
    options = {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http2}
    asked = _to("picker", picker, health_checks=[health], typed_extension_protocol_options=options)
    return _whole(ports, admin, "envoy.filters.network.http_connection_manager", manager, [chosen, asked])


def door(port: int, admin: int, behind: int) -> dict[str, Any]:
    """Give the configuration of an Envoy that passes connections on, untouched.

    Args:
        port: where clients find it.
        admin: port of its administration.
        behind: port of the router.
    """
    proxy = _typed("extensions.filters.network.tcp_proxy.v3.TcpProxy", stat_prefix="clients", cluster="router")
    return _whole([port], admin, "envoy.filters.network.tcp_proxy", proxy, [_to("router", behind)])


def _whole(
    ports: Sequence[int], admin: int, name: str, filter_: dict[str, Any], clusters: list[dict[str, Any]]
) -> dict[str, Any]:
    listener = {
        "name": "clients", "address": _address(ports[0]),
        "additional_addresses": [{"address": _address(port)} for port in ports[1:]],
        "per_connection_buffer_limit_bytes": 32768, "enable_reuse_port": True,
        "filter_chains": [{"filters": [{"name": name, "typed_config": filter_}]}],
    }  # fmt: skip
    return {
        "admin": {"address": _address(admin)},
        "static_resources": {"listeners": [listener], "clusters": clusters},
    }


def write(config: dict[str, Any], path: Path) -> Path:
    """Write a configuration down."""
    path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
    return path


def drain(admin_url: str, seconds: float) -> int:
    """Let an Envoy take no more connections and finish those it has; give how many are left after some time.

    One that does not answer has gone, and its connections with it.
    """
    left = 0
    with contextlib.suppress(httpx.HTTPError), httpx.Client(timeout=5) as client:
        client.post(f"{admin_url}/drain_listeners").raise_for_status()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            page = client.get(f"{admin_url}/stats", params={"filter": _ACTIVE})
            told = dict(line.split(": ") for line in page.text.splitlines() if ": " in line)
            left = int(told.get("http.clients.downstream_rq_active", told.get("tcp.clients.downstream_cx_active", "0")))
            if not left:
                break
            time.sleep(_LOOK_SECONDS)
        return left
    return 0
