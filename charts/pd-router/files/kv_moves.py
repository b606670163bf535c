"""Sends one request through the router and checks that its KV cache went from a prefill to a decode engine.

It runs in the router's image and needs nothing else. Environment: ROUTER and METRICS, the two addresses of the router;
MODEL, or empty for the first one; SECONDS, how long it may take; KEY_FILE and CA_FILE, where the router wants a key or
speaks TLS.
"""

import os
import secrets
import ssl
import sys
import time

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROUTER, METRICS = os.environ["ROUTER"], os.environ["METRICS"]
DEADLINE = time.monotonic() + float(os.environ.get("SECONDS", "120"))
LOOK_AT = "look at pdctl doctor, and for NIXL in pdctl logs decode"


def verified() -> ssl.SSLContext | bool:
    """Trust the router's own certificate; it need not name the Service, and only the Service is called."""
    if not os.environ.get("CA_FILE"):
        return True
    context = ssl.create_default_context(cafile=os.environ["CA_FILE"])
    context.check_hostname = False
    return context


def samples(client: httpx.Client, url: str, name: str) -> list[tuple[dict[str, str], float]]:
    """Give a metric's samples from a metrics page."""
    page = client.get(f"{url}/metrics").raise_for_status().text
    found = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return [(sample.labels, sample.value) for sample in found if sample.name == name]


def engines(client: httpx.Client) -> dict[str, list[str]]:
    """Give the healthy engines by role, once there is one of each."""
    while True:
        try:
            healthy = [labels for labels, up in samples(client, METRICS, "pd_router_engine_healthy") if up]
            found = {role: [one["engine"] for one in healthy if one["role"] == role] for role in ("prefill", "decode")}
            if all(found.values()):
                return found
            state = ", ".join(f"{len(urls)} {role}" for role, urls in found.items())
        except httpx.HTTPError as error:
            state = f"{METRICS}/metrics does not answer: {error!r}"
        if time.monotonic() > DEADLINE:
            sys.exit(f"FAILED: the router has no healthy engine of each role ({state}); look at pdctl status")
        time.sleep(1)


def received(client: httpx.Client, decodes: list[str]) -> dict[str, float]:
    """Give the bytes of KV that each decode engine has fetched since it started."""
    name = "vllm:nixl_bytes_transferred_sum"
    return {url: sum(value for _, value in samples(client, url, name)) for url in decodes}


def main() -> None:
    """Run the test; ends with status 1 and a sentence when it fails."""
    headers = {}
    if os.environ.get("KEY_FILE"):
        with open(os.environ["KEY_FILE"], encoding="utf-8") as file:
            headers["authorization"] = f"Bearer {file.read().strip()}"
    with (
        httpx.Client(timeout=10, trust_env=False) as inside,
        httpx.Client(base_url=ROUTER, headers=headers, verify=verified(), timeout=60, trust_env=False) as router,
    ):
        found = engines(inside)
        print(f"{len(found['prefill'])} prefill and {len(found['decode'])} decode engines are healthy", flush=True)
        listed = router.get("/v1/models")
        if listed.status_code != 200:
            sys.exit(f"FAILED: /v1/models answers {listed.status_code}: {listed.text[:300]}")
        model = os.environ.get("MODEL") or listed.json()["data"][0]["id"]
        before = received(inside, found["decode"])
        # Never seen before, so no engine has it cached, and longer than a block of KV.
        prompt = " ".join(f"{secrets.token_hex(3)} is a word." for _ in range(200))
        began = time.monotonic()
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = router.post("/v1/completions", json=body)
        if answer.status_code != 200:
            sys.exit(f"FAILED: {model} answers {answer.status_code}: {answer.text[:300]}")
        told = answer.json()
        usage = told["usage"]
        if not told["choices"][0]["text"] or usage["completion_tokens"] != 8:
            sys.exit(f"FAILED: the answer is incomplete: {answer.text[:300]}")
        print(f"{model}: {usage['prompt_tokens']} tokens in, 8 out, {time.monotonic() - began:.2f} s", flush=True)
        settled = time.monotonic() + 20  # engines write their metrics some time after the answer
        while True:
            now = received(inside, found["decode"])
            moved = {url: now[url] - before[url] for url in now if now[url] > before[url]}
            if moved:
                break
            if time.monotonic() > min(settled, DEADLINE):
                sys.exit(f"FAILED: the answer came, but no KV moved: decode computed the prompt itself; {LOOK_AT}")
            time.sleep(0.5)
        for url, count in moved.items():
            print(f"{url} fetched {count / 1e6:.1f} MB of KV", flush=True)
    print("KV moves from prefill to decode", flush=True)


if __name__ == "__main__":
    main()
