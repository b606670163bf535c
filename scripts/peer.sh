#!/usr/bin/env bash
# Installs another router of the version given into an environment of its own under .build, and prints its program's path.
set -euo pipefail
cd "$(dirname "$0")/.."
package=${1:?usage: scripts/peer.sh PACKAGE VERSION} version=${2:?usage: scripts/peer.sh PACKAGE VERSION}
venv=$PWD/.build/peers/$package-$version
if [ ! -x "$venv/bin/$package" ]; then
  echo "installing $package $version into $venv" >&2
  .venv/bin/uv venv --quiet --clear --python .venv/bin/python "$venv"
  VIRTUAL_ENV=$venv .venv/bin/uv pip install --quiet "$package==$version"
fi
echo "$venv/bin/$package"
