"""Fuzz the router's request path for a while (`make fuzz`, FUZZ_SECONDS; ten minutes without).

Half of the time is Atheris's, which is guided by the code that its inputs reach and keeps what it learns in
`.build/fuzz/corpus`; the other half is Hypothesis's, with other examples than the suite's. What has to hold is the
same: `tests/router/streams.py`. An input that breaks it is kept in `.build/fuzz` and shown.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".build" / "fuzz"
_EXAMPLES = 1000


def guided(seconds: int) -> None:
    """Let Atheris go on for some seconds; ends the process."""
    import atheris  # noqa: PLC0415 -- only there when it is wanted

    sys.path.insert(0, str(ROOT / "tests"))
    with atheris.instrument_imports(include=["pdrouter.server", "pdrouter.openai", "pdrouter.handoff"]):
        from router.streams import TOKENS, Played  # noqa: PLC0415
        from router.test_closed import CASES  # noqa: PLC0415

    corpus = PLACE / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(CASES):
        if len(case.raw) < 4000:
            (corpus / f"case-{number}").write_bytes(b"\0" + case.raw)
    words = PLACE / "words"
    quoted = ["".join(f"\\x{byte:02x}" for byte in token) for token in TOKENS if len(token) < 100]
    words.write_text("".join(f'"{word}"\n' for word in quoted), encoding="ascii")
    short = {f"client_{what}_timeout_secs": 0.05 for what in ("head", "body", "idle")}
    played = Played(**short)
    played.__enter__()
    count = 0

    def play(data: bytes) -> None:
        nonlocal count
        count += 1
        raw = data[1:]
        played.play(raw, [data[0] * len(raw) // 256] if raw and data[0] else ())
        if count % 2000 == 0:
            played.serves()

    flags = [f"-max_total_time={seconds}", "-max_len=4096", "-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, f"-dict={words}", f"-artifact_prefix={PLACE}/", str(corpus)], play)
    atheris.Fuzz()


def unguided(seconds: float) -> int:
    """Let Hypothesis go on for some seconds; give the exit status of the round that failed, or 0."""
    ends = time.monotonic() + seconds
    rounds = 0
    while rounds == 0 or time.monotonic() < ends:
        rounds += 1
        command = [sys.executable, "-m", "pytest", "-q", "--timeout", "3600", "--hypothesis-seed=random"]
        environment = os.environ | {"FUZZ_EXAMPLES": str(_EXAMPLES)}
        done = subprocess.run([*command, "tests/router/test_fuzz.py"], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            return done.returncode
    print(f"fuzz: {rounds} rounds of {_EXAMPLES} examples for each property of tests/router/test_fuzz.py held")
    return 0


def main() -> None:
    """Fuzz both ways; the exit status is 0 when all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="how long, both ways together (default 600)")
    parser.add_argument("--guided", action="store_true", help="only by Atheris")
    told = parser.parse_args()
    if told.guided:
        guided(told.seconds)
        return
    half = told.seconds / 2
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: Atheris is not installed here, Hypothesis has all the time")
        half = told.seconds
    else:
        command = [sys.executable, __file__, "--guided", "--seconds", str(round(half))]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(done.returncode)
    sys.exit(unguided(half))


if __name__ == "__main__":
    main()
