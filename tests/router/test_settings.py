import json
from dataclasses import FrozenInstanceError
from importlib.resources import files

import jsonschema
import pytest

from pdrouter.settings import Settings, SettingsError, load

PAIR = ["--prefill", "http://p:8000", "--decode", "http://d:8200"]


def test_the_flags_of_vllm_router_are_understood():
    settings = load(
        """--vllm-pd-disaggregation --prefill http://p1:8000 9000 --prefill http://p2:8000 none
        --prefill http://p3:8000 --decode http://d1:8200 --decode http://d2:8200 --policy round_robin
        --prefill-policy consistent_hash --decode-policy random --host 127.0.0.1 --port 1 --prometheus-host ::1
        --prometheus-port 2 --log-level debug --request-timeout-secs 5 --api-key k
        --intra-node-data-parallel-size 1""".split(),
        {},
    )
    assert settings == Settings(
        ("http://p1:8000", "http://p2:8000", "http://p3:8000"), ("http://d1:8200", "http://d2:8200"),
        policy="round_robin", prefill_policy="consistent_hash", decode_policy="random", host="127.0.0.1", port=1,
        prometheus_host="::1", prometheus_port=2, log_level="debug", request_timeout_secs=5.0, api_key="k",
    )  # fmt: skip


def test_the_old_name_of_the_mode_and_no_name_mean_the_same():
    assert load(["--pd-disaggregation", *PAIR], {}) == load(["--vllm-pd-disaggregation", *PAIR], {}) == load(PAIR, {})


def test_the_defaults_are_the_documented_ones():
    settings = load(PAIR, {})
    assert (settings.host, settings.port, settings.prometheus_port) == ("0.0.0.0", 10001, 29000)
    assert settings.max_payload_size == 64 * 1024 * 1024
    with pytest.raises(FrozenInstanceError):
        settings.port = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--prot", "1", *PAIR], "unknown flag --prot; did you mean --port?"),
        (["--zzz", *PAIR], "unknown flag --zzz; pd-router --help lists all flags"),
        ([], "no prefill engine; give --prefill URL"),
        (["--prefill", "http://p:1"], "no decode engine"),
        (["--prefill", "http://p:1", "x", "--decode", "http://d:1"], "URL [BOOTSTRAP_PORT|none]"),
        (["--prefill", "http://p:1", "1", "2", "--decode", "http://d:1"], "URL [BOOTSTRAP_PORT|none]"),
        ([*PAIR, "--decode", "http://d:8200"], "given twice"),
        ([*PAIR, "--decode", "http://p:8000"], "an engine has one role"),
        ([*PAIR, "--decode", "https://x:1"], "engines are reached by http"),
        ([*PAIR, "--decode", "http://x"], "needs a host and a port"),
        ([*PAIR, "--decode", "http://x:99999"], "write it as http://HOST:PORT"),
        ([*PAIR, "--decode", "http://x:1/v1"], "nothing may follow the port"),
        ([*PAIR, "--decode", "http://x:1@3"], "ranks are not for engine URLs"),
        ([*PAIR, "--port", "0"], "--port 0 is no port"),
        ([*PAIR, "--port", "x"], "invalid int value: 'x'"),
        ([*PAIR, "--port", "29000"], "are both 29000"),
        ([*PAIR, "--policy", "fastest"], "invalid choice: 'fastest'"),
        ([*PAIR, "--request-timeout-secs", "0"], "must be above 0"),
        ([*PAIR, "--request-timeout-secs", "nan"], "must be above 0"),
        ([*PAIR, "--max-payload-size", "0"], "must be 1 or more"),
        ([*PAIR, "--api-key", ""], "the API key is empty"),
        ([*PAIR, "--api-key", "k", "--api-key-file", "f"], "contradict each other"),
        ([*PAIR, "--api-key-file", "/nonexistent"], "cannot read --api-key-file"),
        ([*PAIR, "--config", "/nonexistent"], "cannot read --config /nonexistent"),
        ([*PAIR, "--intra-node-data-parallel-size", "8"], "refuses all but rank 0"),
    ],
)
def test_a_wrong_or_contradictory_flag_says_what_is_wrong(flags, told):
    with pytest.raises(SettingsError) as error:
        load(flags, {})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "router.yaml"
    path.write_text("prefill: [http://a:1]\ndecode: [http://b:1]\nport: 7\npolicy: random\napi_key: from-file\n")
    settings = load(["--config", str(path), "--policy", "round_robin", "--decode", "http://c:1"], {})
    assert settings == Settings(("http://a:1",), ("http://c:1",), policy="round_robin", port=7, api_key="from-file")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot: 1", "'prot' was unexpected"),
        ("port: x", "port: 'x' is not of type 'integer'"),
        ("policy: fastest", "policy: 'fastest' is not one of"),
        ("[1]", "the file: [1] is not of type 'object'"),
        ("a: [", "is not YAML"),
        ("vllm_pd_disaggregation: false", "vllm_pd_disaggregation: True was expected"),
    ],
)
def test_a_config_file_that_does_not_fit_the_schema_says_where(tmp_path, text, told):
    path = tmp_path / "router.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        load(["--config", str(path), *PAIR], {})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_the_schema_is_valid_and_knows_every_setting():
    schema = json.loads(files("pdrouter").joinpath("config.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    known = set(schema["properties"]) - {"vllm_pd_disaggregation", "api_key_file"}
    assert known == set(Settings.__dataclass_fields__)


def test_the_api_key_comes_from_flag_file_or_environment(tmp_path):
    path = tmp_path / "key"
    path.write_text("in-file\n")
    environment = {"PD_ROUTER_API_KEY": "in-environment"}
    assert load(PAIR, environment).api_key == "in-environment"
    assert load([*PAIR, "--api-key-file", str(path)], environment).api_key == "in-file"
    assert load([*PAIR, "--api-key", "in-flag"], environment).api_key == "in-flag"
    assert load(PAIR, {}).api_key is None
