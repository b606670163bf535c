#!/usr/bin/env bash
# Installs vllm-router of the version given into an environment of its own under .build, and prints its program's path.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: scripts/vllm_router.sh VERSION}
venv=$PWD/.build/peers/vllm-router-$version
if [ ! -x "$venv/bin/vllm-router" ]; then
  echo "installing vllm-router $version into $venv" >&2
  .venv/bin/uv venv --quiet --clear --python .venv/bin/python "$venv"
  VIRTUAL_ENV=$venv .venv/bin/uv pip install --quiet "vllm-router==$version"
fi
echo "$venv/bin/vllm-router"
