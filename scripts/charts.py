"""Write what follows from other files: each chart's values.schema.json and README.md, and the rendered deployment.

`make charts` calls it. The charts' part is done by helm-schema and helm-docs from the comments of values.yaml; settings
of the router, which its chart takes as they are, are described by the router's own schema. `--check DIRECTORY` writes
into a copy of the repository's files there and says whether they differ.
"""

import json
import pathlib
import shutil
import subprocess
import sys

from pdrouter.settings import schema

ROOT = pathlib.Path(__file__).parent.parent
TOOLS = ROOT / ".tools/bin"
CHARTS = ("pd-engines", "pd-router", "llm-d-router", "vllm-router")
RENDERED = pathlib.Path("tests/charts/rendered/llama31-8b.yaml")
NAMESPACE = "vllm-router-pd-llama31"

CHART_SETS = frozenset(
    "vllm_pd_disaggregation prefill decode prefill_dns decode_dns prefill_selector decode_selector "
    "service_discovery_namespace service_discovery_port host port prometheus_host prometheus_port admin_host "
    "admin_port drain_timeout_secs tls_cert_file tls_key_file api_key api_key_file share_ports".split()
)
"""Settings of the router that its chart sets from other values, or that mean nothing in a pod."""


def router_settings() -> str:
    """Give the schema of the router's settings that are left to the user, as a draft that every Helm reads."""
    told = schema()
    definitions = told.pop("$defs")
    settings = {name: meaning for name, meaning in told["properties"].items() if name not in CHART_SETS}
    for meaning in settings.values():
        named = meaning.pop("$ref", "").rpartition("/")[2]
        meaning.update(definitions.get(named, {}))
    told |= {"$schema": "http://json-schema.org/draft-07/schema#", "properties": settings}
    return json.dumps(told, indent=2) + "\n"


def run(*command: str | pathlib.Path, folder: pathlib.Path) -> str:
    """Run a tool and give what it prints; end with its words when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"charts: {pathlib.Path(command[0]).name} failed: {done.stderr or done.stdout}")
    return done.stdout


def write(root: pathlib.Path) -> None:
    """Write everything under the repository at `root`."""
    (root / "charts/pd-router/config.schema.json").write_text(router_settings())
    for chart in CHARTS:
        run(TOOLS / "helm-schema", folder=root / "charts" / chart)
    run(TOOLS / "helm-docs", "-c", "charts", "-s", "file", folder=root)
    (root / RENDERED).parent.mkdir(parents=True, exist_ok=True)
    helmfile = (TOOLS / "helmfile", "--helm-binary", TOOLS / "helm", "--quiet", "-n", NAMESPACE)
    (root / RENDERED).write_text(run(*helmfile, "template", "--skip-deps", folder=root))


def main() -> int:
    """Write or check."""
    missing = [name for name in ("helm", "helm-schema", "helm-docs", "helmfile") if not (TOOLS / name).exists()]
    if missing:
        sys.exit(f"charts: {', '.join(missing)} not in {TOOLS}; call make tools")
    if sys.argv[1:2] != ["--check"]:
        write(ROOT)
        return 0
    copy = pathlib.Path(sys.argv[2])
    for part in ("charts", "values"):
        shutil.copytree(ROOT / part, copy / part)
    shutil.copy(ROOT / "helmfile.yaml", copy)
    write(copy)
    files = [f"charts/{chart}/{name}" for chart in CHARTS for name in ("values.schema.json", "README.md")]
    stale = [
        name for name in (*files, "charts/pd-router/config.schema.json", str(RENDERED))
        if not (ROOT / name).exists() or (ROOT / name).read_bytes() != (copy / name).read_bytes()
    ]  # fmt: skip
    for name in stale:
        print(f"{name} is not what its sources say; call make charts", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
