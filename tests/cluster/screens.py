"""`make screens`: a deployment's life at a terminal, as docs/screens.md shows it.

The control plane is real, its nodes are fake: simulated engines stand behind the pods' addresses. Exit status 1 when a
command ends otherwise than it should.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import yaml

from support.terminal import Terminal

from .commands import TOKEN, VALUES
from .control_plane import BIN, ROOT, Cluster, ClusterError
from .fake_nodes import fake_cluster

PDCTL = pathlib.Path(sys.executable).with_name("pdctl")
PAGE = ROOT / "docs/screens.md"
HEAD = """# What it looks like

Recorded by `make screens`, which writes this page: pdctl at a terminal of 110 columns, on a real control plane whose
nodes are fake. 16 simulated engines of a small model stand behind the pods' addresses; **all figures are simulated**.
"""


STORY = {
    "engines": {name: value for name, value in VALUES["engines"].items() if name != "huggingFace"}
    | {"env": {"PD_SIM_FLAGS": "--seed=1 --num-gpu-blocks=2000"}},
    "router": VALUES["router"],
}
"""Small engines as in the tests, in real time and with the Secret of the token."""


@dataclass(frozen=True)
class Scene:
    """A command and what a person does.

    Args:
        about: what is seen, above it.
        arguments: of pdctl.
        ends: its exit status.
        answer: what is typed, once the words before the colon are shown.
        watch: what is waited for before Ctrl-C is pressed, a regular expression.
        beside: what runs meanwhile in another terminal.
    """

    about: str
    arguments: str
    ends: int = 0
    answer: tuple[str, str] | None = None
    watch: str | None = None
    beside: str | None = None


SCENES = (
    Scene("Deploy", "deploy --namespace llama -f story.yaml", answer=("Deploy this\\?", "y\n")),
    Scene("How it is", "status"),
    Scene("A load", "bench 200 16 --input-len 1000 --output-len 50"),
    Scene("Who served whom, and whether KV moves", "routing"),
    Scene(
        "Live figures, until Ctrl-C",
        "top",
        ends=130,
        watch=r"decode-\w+ +[1-9].* GB\n(.*\n)*.*decode-\w+ +[1-9]",
        beside="bench 2000 16 --input-len 1000 --output-len 50",
    ),
    Scene("Every check, with evidence", "doctor"),
    Scene(
        "A release that does not come up, while the old pods serve on",
        "deploy --namespace llama -f story.yaml --set engines.decode.args={--no-such-flag} --rollback -y",
        ends=1,
    ),
    Scene("More decode, less prefill", "scale prefill=6 decode=10"),
    Scene("Other flags, one engine at a time", "rollout --set engines.args={--max-num-seqs=512}"),
    Scene("The end", "cleanup --delete-namespace", answer=("Remove this\\?", "y\n")),
)


def _at_terminal(arguments: str, environment: dict[str, str], home: pathlib.Path) -> Terminal:
    return Terminal([str(PDCTL), *arguments.split()], environment, home)


def played(scene: Scene, plane: Cluster, home: pathlib.Path) -> str:
    """Run a scene and give what the terminal shows at its end.

    Raises:
        ClusterError: it ends otherwise.
    """
    environment = os.environ | plane.environment | {
        "HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "HF_TOKEN": TOKEN, "TERM": "xterm-256color",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens: the hub is not asked
    }  # fmt: skip
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "PYTHONPATH"):
        environment.pop(name, None)
    with contextlib.ExitStack() as held:
        if scene.beside:
            held.enter_context(_at_terminal(scene.beside, environment, home))
        terminal = held.enter_context(_at_terminal(scene.arguments, environment, home))
        if scene.answer:
            question, answer = scene.answer
            terminal.until(question)
            terminal.press(answer)
        if scene.watch:
            terminal.until(scene.watch)
            terminal.press("\x03")
        ends = terminal.end(600)
    shown = terminal.text.replace(str(home), "~").replace(f"{ROOT}/", "")
    if ends != scene.ends:
        raise ClusterError(f"pdctl {scene.arguments} ended with {ends}:\n{shown}")
    return shown


def main() -> None:
    """Play all scenes and write the page."""
    with fake_cluster() as plane, tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        (home / "story.yaml").write_text(yaml.safe_dump(STORY))
        parts = [HEAD]
        for scene in SCENES:
            print(f"screens: pdctl {scene.arguments}", flush=True)
            shown = played(scene, plane, home)
            parts.append(f"## {scene.about}\n\n```text\n$ pdctl {scene.arguments}\n{shown}\n```\n")
        PAGE.write_text("\n".join(parts))
    print(f"screens: {PAGE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    try:
        main()
    except (ClusterError, AssertionError, subprocess.TimeoutExpired) as error:
        sys.exit(f"screens: {error}")
