"""Alerts and dashboard ask for metrics that exist, in PromQL."""

import json
import re
from typing import Any

import httpx
import promql_parser
import pytest

from pdrouter.observe import described
from support.processes import engine, start_all

from .conftest import Objects

EXPRESSION = re.compile(r"\b((?:vllm:|pd_router_)[a-z_]+)")


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Give the names of all series of the router and of an engine."""
    names = set()
    for metric in described.ALL:
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[metric.kind]
        names |= {metric.name + ending for ending in endings}
    decode = engine("decode")
    start_all([decode])
    try:
        page = httpx.get(decode.url + "/metrics", timeout=10).text
    finally:
        decode.stop()
    names |= {line.split("{")[0].split(" ")[0] for line in page.splitlines() if line and not line.startswith("#")}
    # Kinds of series that appear with their first sample.
    names |= {f"{name}{ending}" for name in re.findall(r"^# TYPE (\S+) histogram", page, re.MULTILINE)
              for ending in ("_bucket", "_sum", "_count")}  # fmt: skip
    return names


def rules(objects: Objects) -> list[dict[str, Any]]:
    found = [one for one in objects if one["kind"] == "PrometheusRule"]
    assert len(found) == 1
    return [rule for group in found[0]["spec"]["groups"] for rule in group["rules"]]


def queries(everything: dict[str, Objects]) -> dict[str, str]:
    objects = everything["router with monitors"]
    told = {rule["alert"]: rule["expr"] for rule in rules(objects)}
    dashboard = next(one for one in objects if one["metadata"]["name"].endswith("-dashboard"))
    panels = json.loads(dashboard["data"]["pd-router.json"])["panels"]
    for panel in panels:
        for target in panel.get("targets", ()):
            told[f"{panel['title']} {target['refId']}"] = target["expr"].replace("$__rate_interval", "1m")
    return told


def test_every_question_is_promql(everything: dict[str, Objects]) -> None:
    told = queries(everything)
    assert len(told) > 30
    for name, expression in told.items():
        try:
            promql_parser.parse(expression)
        except ValueError as error:
            pytest.fail(f"{name}: {error}: {expression}")


def test_every_metric_that_is_asked_for_exists(everything: dict[str, Objects], known: set[str]) -> None:
    for name, expression in queries(everything).items():
        asked = set(EXPRESSION.findall(expression))
        assert asked, name
        assert asked <= known, f"{name}: {asked - known}"


def test_an_alert_looks_at_its_own_namespace_only(everything: dict[str, Objects]) -> None:
    for rule in rules(everything["router with monitors"]):
        for selector in re.findall(r"(?:vllm:|pd_router_)[a-z_]+(\{[^}]*\})?", rule["expr"]):
            assert 'namespace="vllm-router-pd-llama31"' in selector, rule["alert"]


def test_an_alert_says_how_bad_it_is_what_it_means_and_where_to_look(everything: dict[str, Objects]) -> None:
    for rule in rules(everything["router with monitors"]):
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["for"]
        assert rule["annotations"]["summary"]
        assert re.search(r"[Ss]ee |[Rr]estart|may be", rule["annotations"]["description"]), rule["alert"]


def test_the_dashboard_lays_its_panels_beside_each_other(everything: dict[str, Objects]) -> None:
    dashboard = next(one for one in everything["router"] if one["metadata"]["name"].endswith("-dashboard"))
    panels = json.loads(dashboard["data"]["pd-router.json"])["panels"]
    taken: dict[tuple[int, int], str] = {}
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert x < 24
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
