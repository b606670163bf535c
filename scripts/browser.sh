#!/usr/bin/env bash
# Sees that Chromium is there for the tests of reports: from PATH, else from the system's packages where that is allowed.
# Without it those tests are skipped and say so.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "tools: installing chromium with apt-get"
  { apt-get update && apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends chromium; } >/dev/null 2>&1 && exit 0
fi
echo "tools: no Chromium; install it to have reports tested in a browser"
