"""Engines from Kubernetes, asked of an API on real sockets."""

import json
import logging
import ssl
import subprocess
import time
from contextlib import asynccontextmanager

import pytest

from pdrouter.discovery.attempts import Attempts
from pdrouter.discovery.endpoint_slices import EndpointSliceSource
from pdrouter.discovery.kubernetes import Account, NotInCluster
from pdrouter.discovery.slices import Reading
from pdrouter.fleet.engine import Role
from router.discovery.inbox import Inbox
from router.discovery.kube_api import KubeApi, account, endpoint, kube_api, slice_of
from router.fakes import run, until

SELECTOR = "kubernetes.io/service-name=vllm-prefill"
ONE, TWO, THREE = (endpoint(f"10.0.0.{number}", f"pod-{number}") for number in (1, 2, 3))
URL = "http://10.0.0.{}:8000".format


def prefill(name, *endpoints):
    return slice_of(name, *endpoints, service="vllm-prefill")


@asynccontextmanager
async def source(api: KubeApi, inbox: Inbox, folder, who: Account | None = None, **options):
    reading = options.pop("reading", Reading(Role.PREFILL))
    attempts = Attempts("kubernetes", 0.02, options.pop("longest", 0.05))
    who = who or account(api, folder)
    one = EndpointSliceSource(inbox, who, SELECTOR, reading, attempts=attempts, **options)
    one.start()
    try:
        yield one
    finally:
        await one.stop()


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.DEBUG)
    return lambda: [one.getMessage() for one in caplog.records if one.name.startswith("pdrouter")]


def test_a_list_is_followed_by_a_watch_from_its_version_and_each_change_is_reported(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE, TWO))
            api.put(slice_of("other", THREE, service="vllm-decode"))
            async with source(api, inbox, tmp_path) as one:
                await inbox.until_urls(URL(1), URL(2))
                assert inbox.sources == {one.name} == {f"kubernetes:prefill:serving/{SELECTOR}"}
                await api.until_watched()
                assert api.watches[0].query["resourceVersion"] == "102"
                assert api.watches[0].query["labelSelector"] == SELECTOR
                assert api.watches[0].query["allowWatchBookmarks"] == "true"
                api.put(prefill("b", THREE))
                await inbox.until_urls(URL(1), URL(2), URL(3))
                api.put(prefill("a", endpoint("10.0.0.1", "pod-1", ready=False, terminating=True), TWO))
                await inbox.until(lambda: inbox.last[0].terminating, "the end of pod 1 begins")
                api.put(prefill("a", TWO))
                await inbox.until_urls(URL(2), URL(3))
                api.delete("a")
                api.delete("b")
                await inbox.until_urls()
                assert len(api.lists) == 1
                assert one.age < 5

    run(main)


def test_an_empty_service_is_reported_once(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            async with source(api, inbox, tmp_path):
                await inbox.until_urls()
                await api.until_watched()
                api.put(prefill("a"))
                api.put(prefill("a", ONE))
                await inbox.until_urls(URL(1))
                assert len(inbox.reports) == 2

    run(main)


def test_a_watch_that_ends_in_time_goes_on_from_the_last_bookmark_without_a_new_list(tmp_path, told):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path):
                await api.until_watched()
                api.bookmark()
                bookmarked = str(api.version)
                api.end()
                await api.until(lambda: len(api.watches) == 2, "the second watch")
                assert api.watches[1].query["resourceVersion"] == bookmarked
                api.put(prefill("a", ONE, TWO))
                await inbox.until_urls(URL(1), URL(2))
                assert len(api.lists) == 1

    run(main)


def test_a_connection_cut_within_a_line_loses_no_change_and_asks_for_no_new_list(tmp_path, caplog):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path):
                await api.until_watched()
                api.put(prefill("b", TWO))
                await inbox.until_urls(URL(1), URL(2))
                seen = str(api.version)
                event = json.dumps({"type": "MODIFIED", "object": prefill("b", TWO, THREE)})
                api.send_raw(event.encode()[:60])
                api.cut()
                api.put(prefill("b", TWO, THREE))  # while nobody watches
                await inbox.until_urls(URL(1), URL(2), URL(3))
                assert api.watches[1].query["resourceVersion"] == seen
                assert len(api.lists) == 1

    run(main)
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def test_a_watch_that_ends_properly_within_a_line_is_asked_again_from_the_same_version(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path):
                await api.until_watched()
                api.send_raw(b'{"type": "MODIF')
                api.end()
                await api.until(lambda: len(api.watches) == 2, "the second watch")
                assert api.watches[1].query["resourceVersion"] == "101"
                assert len(api.lists) == 1

    run(main)


@pytest.mark.parametrize("within_watch", [True, False])
def test_a_lost_history_is_mended_by_a_new_list_without_a_gap_in_the_fleet(tmp_path, within_watch):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.gone_within_watch = within_watch
            api.put(prefill("a", ONE))
            api.put(prefill("b", TWO))
            async with source(api, inbox, tmp_path):
                await inbox.until_urls(URL(1), URL(2))
                await api.until_watched()
                api.forget("b")
                api.put(prefill("c", THREE))
                await inbox.until_urls(URL(1), URL(2), URL(3))
                api.cut()
                api.compact()
                await inbox.until_urls(URL(1), URL(3))
                assert len(api.lists) == 2
                await api.until_watched()
                api.delete("c")
                await inbox.until_urls(URL(1))
                assert [len(one) for one in inbox.reports] == [2, 3, 2, 1]

    run(main)


def test_an_api_that_loses_its_history_again_and_again_is_not_asked_in_a_tight_loop(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            api.refuse_watch = (410, {"message": "Expired"}, {})
            async with source(api, inbox, tmp_path, longest=5.0):
                await api.until(lambda: len(api.lists) == 6, "six lists")
        at = [one.at for one in api.lists]
        assert at[5] - at[4] > 0.15

    run(main)


def test_an_event_that_is_not_json_is_mended_by_a_new_list(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path):
                await api.until_watched()
                api.send_raw(b"<html>a proxy's page</html>\n")
                await api.until(lambda: len(api.lists) == 2, "the second list")
                assert inbox.urls == [URL(1)]

    run(main)


def test_a_version_that_the_api_refuses_is_mended_by_a_new_list(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            api.refuse_watch = (504, {"message": "Too large resource version"}, {})  # etcd was restored from a backup
            async with source(api, inbox, tmp_path):
                await api.until(lambda: len(api.lists) == 3, "lists")
                api.refuse_watch = None
                await api.until_watched()
                api.put(prefill("a", ONE, TWO))
                await inbox.until_urls(URL(1), URL(2))

    run(main)


def test_an_overloaded_api_is_asked_again_from_the_same_version(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            async with source(api, inbox, tmp_path):
                await api.until_watched()
                api.error(429, "too many requests")
                await api.until(lambda: len(api.watches) == 2, "the second watch")
                assert len(api.lists) == 1

    run(main)


def test_a_change_that_comes_together_with_an_error_is_reported(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            async with source(api, inbox, tmp_path):
                await api.until_watched()
                change = prefill("a", ONE)
                change["metadata"]["resourceVersion"] = str(api.version + 1)
                error = {"code": 429, "message": "too many requests"}
                events = {"type": "ADDED", "object": change}, {"type": "ERROR", "object": error}
                api.send_raw(b"".join(json.dumps(one).encode() + b"\n" for one in events))
                await inbox.until_urls(URL(1))
                assert len(api.lists) == 1

    run(main)


def test_an_api_that_names_a_pause_is_left_alone_for_it(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.refuse = (429, {"message": "slow down"}, {"retry-after": "1"})
            async with source(api, inbox, tmp_path):
                await api.until(lambda: len(api.asked) == 2, "the second question")
                assert api.asked[1].at - api.asked[0].at > 0.99

    run(main)


def test_an_expired_token_is_replaced_by_what_its_file_holds_then_and_no_engine_is_lost(tmp_path, caplog, told):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path) as one:
                await api.until_watched()
                api.token = "second-token"
                api.cut()
                before = len(api.asked)
                await api.until(lambda: len(api.asked) >= before + 3, "refused questions")
                assert inbox.urls == [URL(1)]
                assert {asked.token for asked in api.asked} == {"first-token"}
                (tmp_path / "new").write_text("second-token")
                (tmp_path / "new").rename(tmp_path / "token")
                await api.until_watched()
                api.put(prefill("a", ONE, TWO))
                await inbox.until_urls(URL(1), URL(2))
                assert len(api.lists) == 1
                assert one.age < 5

    run(main)
    assert any("does not accept the token (401: Unauthorized)" in one for one in told())
    assert any("answers again" in one for one in told())
    assert "first-token" not in caplog.text
    assert "second-token" not in caplog.text


@pytest.mark.parametrize("token", ["", "two\nlines-secret", "secret-\u00e9", "secret\x00"])
def test_a_file_that_holds_no_token_is_told_without_what_it_holds(tmp_path, caplog, told, token):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            who = account(api, tmp_path)
            who.token_file.write_text(token)
            async with source(api, inbox, tmp_path, who):
                await until_told(told, "does not hold a token")
                who.token_file.write_text(api.token)
                await inbox.until_urls()

    run(main)
    assert "secret" not in caplog.text


async def until_told(told, part: str) -> None:
    await until(lambda: any(part in one for one in told()), f"a log line with {part!r}")


@pytest.mark.parametrize("verb", ["list", "watch"])
def test_a_missing_permission_is_told_with_the_rule_to_add(tmp_path, told, verb):
    said = f'endpointslices.discovery.k8s.io is forbidden: User "system:serviceaccount:serving:router" cannot {verb}'

    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            refusal = (403, {"kind": "Status", "message": said}, {})
            if verb == "list":
                api.refuse = refusal
            else:
                api.refuse_watch = refusal
            async with source(api, inbox, tmp_path):
                await until_told(told, "403")
                api.refuse = api.refuse_watch = None
                await api.until_watched()

    run(main)
    why = next(one for one in told() if "403" in one)
    assert f"does not allow to {verb} EndpointSlices (discovery.k8s.io/v1) in namespace serving" in why
    assert said in why
    assert "{apiGroups: [discovery.k8s.io], resources: [endpointslices], verbs: [list, watch]}" in why


def test_an_api_that_cannot_be_reached_is_told_once_and_tried_again(tmp_path, told):
    async def main():
        async with kube_api() as api:
            who = account(api, tmp_path)
        inbox = Inbox()
        async with source(api, inbox, tmp_path, who) as one:
            await until_told(told, "cannot be reached")
            failures = one._attempts._count
            await until(lambda: one._attempts._count >= failures + 3, "more attempts")
        assert inbox.reports == []

    run(main)
    assert len([one for one in told() if "cannot be reached" in one]) == 1


def test_a_watch_whose_api_falls_silent_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("pdrouter.discovery.kubernetes._ANSWER_TIMEOUT", 0.2)

    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path, watch_seconds=0.2):
                await api.until(lambda: len(api.watches) >= 3, "watches")  # the stand-in never ends one by itself
                assert len(api.lists) == 1
                assert inbox.urls == [URL(1)]

    run(main)


def test_the_source_ends_while_a_watch_is_open_and_while_the_api_is_silent(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            async with source(api, inbox, tmp_path) as one:
                await api.until_watched()
                await one.stop()
                await api.until(lambda: api.watching == 0, "the end of the watch")
                api.put(prefill("a", ONE))
            api.ignores_requests = True
            async with source(api, inbox, tmp_path):
                await api.until(lambda: len(api.lists) == 2, "a question")
            assert len(inbox.reports) == 1

    run(main)


def test_a_mistake_in_the_receiver_of_reports_does_not_end_the_source(tmp_path, told):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            failed = []

            def breaks_once(name, found):
                if not failed:
                    failed.append(found)
                    raise ValueError("a mistake")
                inbox(name, found)

            api.put(prefill("a", ONE))
            async with source(api, breaks_once, tmp_path):
                await inbox.until_urls(URL(1))  # without another change
                await api.until_watched()
                api.put(prefill("a", ONE, TWO))
                await inbox.until_urls(URL(1), URL(2))

    run(main)
    assert any("ended unexpectedly" in one for one in told())


def test_slices_that_cannot_be_used_are_told_once_however_often_they_change(tmp_path, told):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path, reading=Reading()):
                await api.until_watched()
                api.put(prefill("a", ONE, TWO))
                api.put(slice_of("b", THREE, service="vllm-prefill", role="prefill"))
                await inbox.until_urls(URL(3))

    run(main)
    assert len([one for one in told() if "llm-d.ai/role" in one]) == 1


def certificate(folder, name: str):
    """Make a key and a certificate that signs itself, for 127.0.0.1."""
    key, file = folder / f"{name}.key", folder / f"{name}.crt"
    kind = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", file]
    command = ["openssl", "req", *kind.split(), *names]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return file, context


def test_only_an_api_with_the_clusters_certificate_gets_the_token_and_a_new_certificate_file_is_read(tmp_path, told):
    async def main():
        good, context = certificate(tmp_path, "good")
        other, _ = certificate(tmp_path, "other")
        trusted = tmp_path / "ca.crt"
        trusted.write_bytes(other.read_bytes())
        async with kube_api(context) as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path, account(api, tmp_path, trusted)):
                await until_told(told, "must be signed by")
                assert api.asked == []
                trusted.write_bytes(good.read_bytes())
                await inbox.until_urls(URL(1))

    run(main)


def test_a_pod_knows_the_api_from_what_kubernetes_gives_it(tmp_path):
    for name, text in (("token", "t"), ("ca.crt", "c"), ("namespace", "serving\n")):
        (tmp_path / name).write_text(text)
    environment = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "6443"}
    who = Account.of_this_pod(environment, tmp_path)
    assert who == Account("https://10.96.0.1:6443", "serving", tmp_path / "token", tmp_path / "ca.crt")
    assert (
        Account.of_this_pod(environment | {"KUBERNETES_SERVICE_HOST": "fd00::1"}, tmp_path).url
        == "https://[fd00::1]:6443"
    )


def test_outside_of_a_pod_the_reason_and_the_way_out_are_told(tmp_path):
    with pytest.raises(NotInCluster, match=r"KUBERNETES_SERVICE_HOST is not set.*--prefill and --decode"):
        Account.of_this_pod({}, tmp_path)
    with pytest.raises(
        NotInCluster, match="token; the router's pod or service account needs automountServiceAccountToken"
    ):
        Account.of_this_pod({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, tmp_path)


def test_the_age_grows_while_the_api_is_away(tmp_path):
    async def main():
        async with kube_api() as api:
            inbox = Inbox()
            api.put(prefill("a", ONE))
            async with source(api, inbox, tmp_path) as one:
                await api.until_watched()
                await inbox.until_urls(URL(1))
                api.refuse = (503, {"message": "etcd is away"}, {})
                api.cut()
                asked = len(api.asked)
                await api.until(lambda: len(api.asked) > asked, "a refused question")
                heard = -one.age + time.monotonic()  # or somewhat before
                await api.until(lambda: len(api.asked) >= asked + 4, "more of them")
                assert time.monotonic() - one.age <= heard + 0.001
                assert inbox.urls == [URL(1)]

    run(main)
