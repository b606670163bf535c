"""Who may talk to whom, by the rules that the charts render."""

from collections.abc import Callable

import pytest

from pdctl.cluster.beside import kept_in, way_to_router

from .conftest import NAMESPACE, Objects
from .flows import End, allowed

Render = Callable[..., Objects]


def of_namespace(name: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name}


def pod(name: str, labels: dict[str, str], namespace: str = NAMESPACE) -> End:
    address = f"10.1.{sum(name.encode()) % 250}.{len(name)}"
    return End(labels, namespace, of_namespace(namespace), address)


class Deployment:
    """Both charts rendered: their policies, their pods as they are labelled, and who else is in a cluster."""

    def __init__(
        self, render: Render, *engine_values: str, chart: str = "pd-router", router_values: tuple[str, ...] = ()
    ) -> None:
        engines = render("pd-engines", "-f", "values/llama31-8b.yaml", *engine_values)
        router = render(chart, "--set", "engines.release=ms-llama31", *router_values)
        self.policies = [
            one | {"metadata": one["metadata"] | {"namespace": NAMESPACE}}
            for one in (*engines, *router)
            if one["kind"] == "NetworkPolicy"
        ]
        self.ends = {
            "other pod": pod("other", {"app": "web"}),
            "engine of another release": pod("stranger", {
                "app.kubernetes.io/name": "pd-engines", "app.kubernetes.io/instance": "other",
                "llm-d.ai/role": "decode",
            }),
            "router of another namespace": pod("far", {"app.kubernetes.io/name": "pd-router"}, "elsewhere"),
            "Prometheus": pod("prometheus", {"app": "prometheus"}, "monitoring"),
            "DNS": pod("dns", {"k8s-app": "kube-dns"}, "kube-system"),
            "internet": End(address="203.0.113.9"),
        }  # fmt: skip
        for one in (*engines, *router):
            if one["kind"] in ("Deployment", "Job"):
                labels = one["spec"]["template"]["metadata"]["labels"]
            elif one["kind"] == "Pod":
                labels = one["metadata"]["labels"]
            else:
                continue
            name = labels.get("llm-d.ai/role") or labels["app.kubernetes.io/component"]
            self.ends[name] = pod(name, labels)

    def lets(self, source: str, target: str, port: int, protocol: str = "TCP") -> bool:
        return allowed(self.policies, self.ends[source], self.ends[target], port, protocol)


@pytest.fixture(scope="module")
def deployed(render: Render) -> Deployment:
    return Deployment(render)


ALLOWED = [
    ("router", "prefill", 8000, "TCP"),
    ("router", "decode", 8200, "TCP"),
    ("decode", "prefill", 5600, "TCP"),
    ("prefill", "decode", 5600, "TCP"),
    ("decode", "prefill", 5601, "TCP"),
    ("decode", "prefill", 5699, "TCP"),
    ("prefill", "decode", 5650, "TCP"),
    ("Prometheus", "prefill", 8000, "TCP"),
    ("Prometheus", "decode", 8200, "TCP"),
    ("Prometheus", "router", 29000, "TCP"),
    ("other pod", "router", 10001, "TCP"),
    ("internet", "router", 10001, "TCP"),
    ("test", "router", 10001, "TCP"),
    ("test", "router", 29000, "TCP"),
    ("test", "decode", 8200, "TCP"),
    ("router", "DNS", 53, "UDP"),
    ("prefill", "DNS", 53, "UDP"),
    ("decode", "DNS", 53, "TCP"),
    ("test", "DNS", 53, "UDP"),
    ("router", "internet", 6443, "TCP"),
    ("router", "internet", 443, "TCP"),
    ("prefill", "internet", 443, "TCP"),
]

FORBIDDEN = [
    ("other pod", "prefill", 8000, "TCP"),
    ("other pod", "decode", 8200, "TCP"),
    ("internet", "decode", 8200, "TCP"),
    ("other pod", "prefill", 5600, "TCP"),
    ("router", "prefill", 5600, "TCP"),
    ("router", "decode", 8000, "TCP"),
    ("router", "decode", 5650, "TCP"),
    ("decode", "decode", 5600, "TCP"),
    ("prefill", "prefill", 5600, "TCP"),
    ("decode", "prefill", 8000, "TCP"),
    ("prefill", "decode", 8200, "TCP"),
    ("decode", "prefill", 5700, "TCP"),
    ("decode", "prefill", 5599, "TCP"),
    ("decode", "prefill", 5600, "UDP"),
    ("engine of another release", "prefill", 5600, "TCP"),
    ("decode", "engine of another release", 5600, "TCP"),
    ("router", "engine of another release", 8000, "TCP"),
    ("router of another namespace", "prefill", 8000, "TCP"),
    ("Prometheus", "prefill", 5600, "TCP"),
    ("Prometheus", "router", 10002, "TCP"),
    ("other pod", "router", 29000, "TCP"),
    ("other pod", "router", 29001, "TCP"),
    ("internet", "router", 29000, "TCP"),
    ("router", "other pod", 8080, "TCP"),
    ("router", "internet", 80, "TCP"),
    ("prefill", "other pod", 8080, "TCP"),
    ("prefill", "other pod", 443, "TCP"),
    ("prefill", "router", 10001, "TCP"),
    ("decode", "internet", 22, "TCP"),
    ("other pod", "test", 8000, "TCP"),
    ("test", "prefill", 5600, "TCP"),
]


@pytest.mark.parametrize(("source", "target", "port", "protocol"), ALLOWED)
def test_what_prefill_and_decode_need_passes(
    deployed: Deployment, source: str, target: str, port: int, protocol: str
) -> None:
    assert deployed.lets(source, target, port, protocol)


@pytest.mark.parametrize(("source", "target", "port", "protocol"), FORBIDDEN)
def test_nothing_else_passes(deployed: Deployment, source: str, target: str, port: int, protocol: str) -> None:
    assert not deployed.lets(source, target, port, protocol)


def test_with_a_download_only_its_job_reaches_the_hub(render: Render) -> None:
    deployed = Deployment(render, "--set", "cache.mode=download")
    assert deployed.lets("download", "internet", 443)
    assert deployed.lets("download", "DNS", 53, "UDP")
    assert not deployed.lets("download", "prefill", 8000)
    assert not deployed.lets("other pod", "download", 8000)
    for role in ("prefill", "decode"):
        assert not deployed.lets(role, "internet", 443)
        assert not deployed.lets(role, "DNS", 53, "UDP")


def test_while_it_measures_from_an_engines_pod_that_role_reaches_the_router(deployed: Deployment) -> None:
    pod = dict(deployed.ends["prefill"].labels)
    assert kept_in(deployed.policies, pod)
    assert not kept_in(deployed.policies, {"app": "web"})
    way = way_to_router("20260101-120000-bench", pod, 10001)
    opened = [*deployed.policies, way | {"metadata": way["metadata"] | {"namespace": NAMESPACE}}]
    prefill, decode, router, dns = (deployed.ends[name] for name in ("prefill", "decode", "router", "DNS"))
    assert allowed(opened, prefill, router, 10001)
    assert allowed(opened, prefill, dns, 53, "UDP")
    assert allowed(opened, prefill, decode, 5600)
    assert not allowed(opened, prefill, router, 29000)
    assert not allowed(opened, decode, router, 10001)
    assert not allowed(opened, prefill, deployed.ends["other pod"], 8080)


def test_kv_over_efa_needs_no_port_but_the_side_channel(render: Render) -> None:
    deployed = Deployment(render, "-f", "values/efa.yaml")
    assert deployed.lets("decode", "prefill", 5600)
    assert not deployed.lets("decode", "prefill", 5650)


def test_clients_can_be_named(render: Render) -> None:
    only_web = ("--set-json", 'networkPolicy.clients=[{"podSelector":{"matchLabels":{"app":"web"}}}]')
    deployed = Deployment(render, router_values=only_web)
    assert deployed.lets("other pod", "router", 10001)
    assert deployed.lets("test", "router", 10001)
    assert not deployed.lets("internet", "router", 10001)
    assert not deployed.lets("Prometheus", "router", 10001)


def test_a_router_that_asks_kubernetes_nothing_does_not_reach_its_api(render: Render) -> None:
    fixed = "engines.release=,engines.prefill.urls={http://a:8000},engines.decode.urls={http://b:8200}"
    deployed = Deployment(render, router_values=("--set", fixed))
    assert not deployed.lets("router", "internet", 6443)
    assert deployed.lets("router", "internet", 8000)


@pytest.mark.parametrize(
    ("chart", "values"),
    [
        ("llm-d-router", ()),
        ("vllm-router", ("--set", "engines.prefill={http://a:8000},engines.decode={http://b:8200}")),
    ],
)
def test_another_router_reaches_the_engines_apis_and_nothing_more_of_them(
    render: Render, chart: str, values: tuple[str, ...]
) -> None:
    deployed = Deployment(render, chart=chart, router_values=values)
    assert deployed.lets("router", "prefill", 8000)
    assert deployed.lets("router", "decode", 8200)
    assert deployed.lets("other pod", "router", 10001)
    assert deployed.lets("Prometheus", "router", 29000)
    assert deployed.lets("decode", "prefill", 5600), "what the engines need is as it was"
    assert deployed.lets("router", "internet", 6443) == (chart == "llm-d-router"), "llm-d's picker asks Kubernetes"
    for source, target, port in (
        ("router", "prefill", 8200), ("router", "decode", 8000), ("router", "prefill", 5600),
        ("router", "engine of another release", 8000), ("other pod", "prefill", 8000), ("other pod", "router", 9002),
        ("other pod", "router", 8000), ("other pod", "router", 29000), ("router", "internet", 80),
    ):  # fmt: skip
        assert not deployed.lets(source, target, port), (source, target, port)


def test_no_policy_is_rendered_where_none_is_wanted(render: Render) -> None:
    for chart, values in (
        ("pd-engines", ("-f", "values/llama31-8b.yaml")),
        ("pd-router", ("--set", "engines.release=a")),
        ("llm-d-router", ("--set", "engines.release=a")),
    ):
        objects = render(chart, *values, "--set", "networkPolicy.enabled=false")
        assert not [one for one in objects if one["kind"] == "NetworkPolicy"]


def test_two_releases_in_one_namespace_select_no_pod_of_each_other(render: Render) -> None:
    for chart, values in (
        ("pd-engines", ("-f", "values/llama31-8b.yaml")),
        ("pd-router", ("--set", "engines.release=a")),
        ("llm-d-router", ("--set", "engines.release=c")),
    ):
        mine, yours = (render(chart, *values, release=name) for name in ("one", "two"))
        pods = [one["spec"]["template"]["metadata"]["labels"] for one in yours if one["kind"] == "Deployment"]
        names = {(one["kind"], one["metadata"]["name"]) for one in mine}
        assert not names & {(one["kind"], one["metadata"]["name"]) for one in yours}
        assert pods
        for one in mine:
            spec = one.get("spec", {})
            selector = spec.get("podSelector") or spec.get("selector")
            if selector and one["kind"] != "ServiceAccount":
                wanted = selector.get("matchLabels", selector)
                assert not [labels for labels in pods if wanted.items() <= labels.items()], one["metadata"]["name"]
