"""Judge routers by pd-referee and write their scorecards into docs/referee.md and docs/scorecards (`make referee`).

Each router comes from where its users get it: ours and the toy from this workspace, the others from the package index,
in an environment of their own.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "referee.md"
CARDS = ROOT / "docs" / "scorecards"
INDEX = {"vllm-router": "0.1.17", "smg": "1.13.0"}
ROUTERS = ("ours", "vllm-router", "smg", "toy")


def program(name: str) -> list[str]:
    """Give the flag that names a router's program, installed if need be; nothing for one of this workspace."""
    if name not in INDEX:
        return []
    script = ["bash", str(ROOT / "scripts" / "peer.sh"), name, INDEX[name]]
    return ["--program", subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()]


def judged(name: str) -> str | None:
    """Judge a router; give its scorecard in Markdown, or nothing when it could not be judged."""
    CARDS.mkdir(exist_ok=True)
    card = CARDS / f"{name}.md"
    files = ["--json", str(CARDS / f"{name}.json"), "--markdown", str(card)]
    print(f"referee: {name}", flush=True)
    status = subprocess.run(
        [sys.executable, "-m", "pdsim.referee", "--router", name, *program(name), *files], check=False
    ).returncode
    if status not in (0, 1):
        return None
    told = card.read_text(encoding="utf-8")
    card.unlink()
    return told


def placed(page: str, name: str, text: str) -> str:
    """Put a text between the marks of its name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in page or end not in page:
        raise SystemExit(f"referee: {PAGE} has no marks {begin.strip()} and {end}")
    return re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + text + end, page, flags=re.DOTALL)


def main() -> int:
    """Judge the routers that the command line names, or all."""
    names = sys.argv[1:] or ROUTERS
    unknown = set(names) - set(ROUTERS)
    if unknown:
        print(f"referee: no router {', '.join(sorted(unknown))}; known are {', '.join(ROUTERS)}", file=sys.stderr)
        return 2
    for name in names:
        told = judged(name)
        if told is None:
            return 3
        PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), f"scorecard {name}", told), encoding="utf-8")
    print(f"referee: written into {PAGE.relative_to(ROOT)} and {CARDS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
