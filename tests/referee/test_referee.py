"""The referee itself is judged: a good router passes, a bad one is found out, and the scorecard says so."""

import json
import pathlib
import subprocess
import sys

import psutil
import pytest

from support.processes import engine, new_address, router, start_all, until

HERE = pathlib.Path(__file__).parent
BAD = "{python} %s {prefill_flags} {decode_flags} --host {host} --port {port}" % (HERE / "bad_router.py")


def referee(*arguments: str, timeout: float = 280) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pdsim.referee", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def judged(path: pathlib.Path, *arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run the referee; give its exit status, and verdict and evidence by case."""
    done = referee(*arguments, "--json", str(path))
    assert path.exists(), done.stderr
    card = json.loads(path.read_text())
    return done.returncode, {case["name"]: (case["verdict"], case["evidence"]) for case in card["cases"]}


def only(*names: str) -> list[str]:
    return [part for name in names for part in ("--case", name)]


def test_our_router_passes_the_wire_and_batch_cases(tmp_path: pathlib.Path) -> None:
    _, cases = judged(tmp_path / "card.json", "--router", "ours", "--group", "wire", "--group", "batch")
    assert len(cases) >= 20
    assert {name: told for name, told in cases.items() if told[0] != "pass"} == {}


def test_each_flaw_of_a_bad_router_is_found_out_and_what_is_right_is_passed(tmp_path: pathlib.Path) -> None:
    flaws = {
        "unknown-fields": "x_vendor_option, priority did not reach the prefill engine",
        "client-ticket": "",
        "live-stream": "when the engine was done with all of them",
        "batch-stream": "the text differs",
        "leave-mid-stream": "5 s later decode",
        "kill-decode": "40 of 40 requests failed",
        "no-silent-cut": "like a whole answer",
        "bounded-retries": "attempts for 200 requests",
        "words-are-no-key": "went to one decode engine",
        "spread": "a decode engine was idle",
        "ticket-to-elsewhere": "an engine connected to the address",
        "oversize-body": "it waits for the body",
        "control-paths": "/reset_prefix_cache",
    }
    right = ("completion", "chat", "usage", "slow-loris")
    status, cases = judged(tmp_path / "card.json", "--command", BAD, "--not-keyed", *only(*flaws, *right, "same-user"))
    assert status == 1
    assert {name: cases[name][0] for name in flaws} == dict.fromkeys(flaws, "fail")
    assert [name for name, evidence in flaws.items() if evidence not in cases[name][1]] == []
    assert {name: cases[name][0] for name in right} == dict.fromkeys(right, "pass")
    assert cases["same-user"][0] == "not applicable"


def test_a_lease_that_ends_in_decodes_queue_gives_the_wrong_text_behind_a_router_that_does_not_watch_it(
    tmp_path: pathlib.Path,
) -> None:
    _, cases = judged(tmp_path / "ours.json", "--router", "ours", *only("late-heartbeats"))
    assert cases["late-heartbeats"] == ("pass", "the text is right, after a lease ended")
    _, cases = judged(tmp_path / "toy.json", "--router", "toy", *only("late-heartbeats"))
    assert cases["late-heartbeats"][0] == "fail"
    assert "status 200 and the text differs" in cases["late-heartbeats"][1]


def test_a_router_that_runs_already_is_judged_by_its_url_and_its_engines_are_left_alive(tmp_path: pathlib.Path) -> None:
    keep = ("--speed", "20", "--keep-requests", "2000")
    prefills, decodes = [engine("prefill", *keep)], [engine("decode", *keep) for _ in range(2)]
    start_all([*prefills, *decodes])
    try:
        with router(prefills, decodes) as started:
            named = [part for one in prefills for part in ("--prefill", one.url)]
            named += [part for one in decodes for part in ("--decode", one.url)]
            names = only("completion", "client-headers", "leave-mid-stream", "kill-decode", "expired-lease")
            status, cases = judged(tmp_path / "card.json", "--url", started.url, *named, *names)
            assert status == 0
            assert [cases[name][0] for name in ("completion", "client-headers", "leave-mid-stream")] == ["pass"] * 3
            assert cases["kill-decode"] == (
                "not applicable",
                "needs to end engine processes, and these engines are not the referee's",
            )
            assert cases["expired-lease"][0] == "not applicable"
        assert all(one.ready() for one in [*prefills, *decodes])
    finally:
        for one in [*prefills, *decodes]:
            one.stop()


def test_engines_that_do_not_run_are_started_where_the_running_router_looks_for_them(tmp_path: pathlib.Path) -> None:
    prefills, decodes = [engine("prefill")], [engine("decode"), engine("decode")]  # never started here
    started = router(prefills, decodes).start()
    named = [part for one in prefills for part in ("--prefill", one.url)]
    named += [part for one in decodes for part in ("--decode", one.url)]
    try:
        names = only("completion", "kill-decode")
        status, cases = judged(tmp_path / "card.json", "--url", started.url, *named, *names)
        assert (status, {name: told[0] for name, told in cases.items()}) == (
            0,
            {"completion": "pass", "kill-decode": "pass"},
        )
    finally:
        started.stop()


def test_engines_that_keep_no_requests_are_refused_with_what_to_do() -> None:
    prefill, decode = engine("prefill"), engine("decode")
    start_all([prefill, decode])
    try:
        done = referee("--url", f"http://{new_address()}:1", "--prefill", prefill.url, "--decode", decode.url)
        assert done.returncode == 3
        assert "--keep-requests 2000" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        prefill.stop()
        decode.stop()


def test_a_router_that_does_not_start_is_told_with_its_own_last_words() -> None:
    words = "import sys; sys.exit('no such thing')"
    command = f'{{python}} -c "{words}" {{prefill_flags}} {{decode_flags}} {{port}}'
    done = referee("--command", command, "--case", "completion")
    assert done.returncode == 3
    assert "the router ended before it served: no such thing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--case", "completion"), "give one of"),
        (("--router", "ours", "--url", "http://x"), "give one of"),
        (("--router", "nobody"), "no router nobody is known"),
        (("--router", "toy", "--case", "nothing"), "no case nothing"),
        (("--router", "toy", "--group", "nothing"), "no group nothing"),
        (("--url", "http://127.0.0.1:1"), "--prefill and --decode go with --url"),
        (("--command", "x {port} {prefill_flags} {decode_flags} {nonsense}"), "nonsense"),
        (("--command", "x {prefill_flags} {decode_flags}"), "needs {port}"),
        (("--router", "toy", "--prefill", "http://x"), "go with --url"),
    ],
)
def test_wrong_usage_is_exit_status_2_and_says_what_is_wrong(arguments: tuple[str, ...], told: str) -> None:
    done = referee(*arguments)
    assert done.returncode == 2
    assert told in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_a_referee_that_is_terminated_leaves_no_engine_behind() -> None:
    command = [sys.executable, "-m", "pdsim.referee", "--router", "toy", "--case", "decode-hangs"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = until(lambda: [one for one in [psutil.Process(running.pid).children()] if len(one) >= 7], 60, "engines")
    running.terminate()
    assert running.wait(30) == 130
    until(lambda: not any(one.is_running() for one in started[0]), 5, "all engines are gone")


def test_all_cases_are_listed_without_starting_anything() -> None:
    done = referee("--list")
    assert done.returncode == 0
    assert "kill-decode-under-streams *" in done.stdout
    assert "control-paths" in done.stdout
