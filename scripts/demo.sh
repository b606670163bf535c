#!/usr/bin/env bash
# `make demo`: simulated engines and the router as real processes, real traffic, what happened, gone again.
set -euo pipefail
name=demo
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
folder=$(mktemp -d)
export XDG_DATA_HOME=$folder # runs of the demo go with it
cleanup() {
  status=$?
  pdctl cleanup --name "$name" -y >/dev/null 2>&1 || true
  rm -rf "$folder"
  exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say "1. Deploy: 8 prefill and 8 decode engines (simulated, as fast as an H200), and the router in front of them"
pdctl cleanup --name "$name" -y >/dev/null 2>&1 || true
pdctl deploy --local --name "$name" -y

say "2. Ask: a chat, streamed through prefill, KV handoff and decode"
url=$(pdctl status --name "$name" --json | python -c 'import json, sys; print(json.load(sys.stdin)["router"])')
python - "$url" <<'PYTHON'
import json
import sys

import httpx

body = {
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "messages": [{"role": "user", "content": "What does a decode engine need from a prefill engine?"}],
    "max_tokens": 24, "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
}
with httpx.stream("POST", sys.argv[1] + "/v1/chat/completions", json=body, timeout=60) as answer:
    answer.raise_for_status()
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            message = json.loads(line[6:])
            for choice in message["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
            if not message["choices"]:
                print(f"\n(random words: simulated engines have no weights; usage {message['usage']})")
PYTHON

say "3. Measure: 100 prompts of 1000 tokens, 200 tokens out, 16 at once"
pdctl bench 100 16 --input-len 1000 --output-len 200 --name "$name" --output "$folder/result.json"

say "4. Look: who served whom, how much KV moved, was the protocol kept"
pdctl routing --name "$name"

say "5. The state of every part"
pdctl status --name "$name"

say "6. Clean up"
pdctl cleanup --name "$name" -y
