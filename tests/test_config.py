"""Settings: what is valid, who wins, what a wrong one is told."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_serve.adapters.settings import read_environment, read_file
from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.config import (
    Layer,
    ServeConfig,
    arg_name,
    client_url,
    deployment_name,
    is_loopback,
    parse_count,
    phase_limits_s,
    resolve,
)
from gemma_serve.planning.phases import PHASE_TIMEOUTS_S
from gemma_serve.planning.settings import SETTINGS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def flag(**values):
    return Layer("flag", values, {name: "--" + name.replace("_", "-") for name in values})


def problems_of(*layers):
    with pytest.raises(UsageError) as caught:
        resolve(layers)
    return caught.value.problems


def test_the_table_of_settings_and_the_model_have_the_same_fields():
    assert {setting.name for setting in SETTINGS} == set(ServeConfig.model_fields)


def test_flag_beats_environment_beats_file_beats_detected_beats_default():
    file = Layer("file", {"port": 3, "dtype": "float32", "max_num_seqs": 3}, {"port": "a.yaml"})
    environment = Layer("environment", {"port": "2", "max_num_seqs": "2"})
    detected = Layer("detected", {"port": 4, "enforce_eager": True}, {"enforce_eager": "a CPU"})
    resolved = resolve([flag(port="1"), environment, file, detected])

    assert (resolved.config.port, resolved.config.max_num_seqs) == (1, 2)
    assert (resolved.config.dtype, resolved.config.enforce_eager) == ("float32", True)
    assert resolved.sources == dict.fromkeys(ServeConfig.model_fields, "default") | {
        "port": "flag --port",
        "max_num_seqs": "environment",
        "dtype": "file",
        "enforce_eager": "detected: a CPU",
    }


def test_engine_args_are_merged_one_by_one():
    file = Layer("file", {"engine_args": {"seed": 1, "enable_lora": True}}, {"engine_args": "f"})
    flags = Layer("flag", {"engine_args": {"--seed": "2"}}, {"engine_args": "--engine-arg"})
    resolved = resolve([flags, file])

    assert resolved.config.engine_args == {"seed": "2", "enable-lora": True}
    assert resolved.sources["engine_args.seed"] == "flag --engine-arg"
    assert resolved.sources["engine_args.enable-lora"] == "file f"


def test_phase_timeouts_are_merged_one_by_one_however_a_phase_is_written():
    file = Layer("file", {"phase_timeouts": {"KV cache": 9, "weights": 1}}, {"phase_timeouts": "f"})
    flags = Layer(
        "flag",
        {"phase_timeouts": {"kv_Cache": "7.5", "warm-up": "60"}},
        {"phase_timeouts": "--phase-timeout"},
    )
    resolved = resolve([flags, file])

    set_here = {"KV cache": 7.5, "weights": 1.0, "warm-up": 60.0}
    assert resolved.config.phase_timeouts == set_here
    assert phase_limits_s(resolved.config) == {**PHASE_TIMEOUTS_S, **set_here}
    assert resolved.sources["phase_timeouts.KV cache"] == "flag --phase-timeout"
    assert resolved.sources["phase_timeouts.weights"] == "file f"


PHASE_HINT = (
    "--phase-timeout PHASE=SECONDS: The longest that a phase of the start may go on without "
    "progress, repeatable: --phase-timeout weights=7200."
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"waits": "1"},
            "`phase_timeouts` (flag --phase-timeouts): `waits` is no phase of a start, which are "
            "imports, configuration, engine core, weights, compilation, KV cache, CUDA graphs, "
            "warm-up, API server, first token",
        ),
        (
            {"kv-cache": "0"},
            "`phase_timeouts.KV cache` is '0' (flag --phase-timeouts), but it should be greater "
            "than 0",
        ),
        (
            {"weights": True},
            "`phase_timeouts.weights` is True (flag --phase-timeouts), but it should be a number",
        ),
        (
            {"weights": "inf"},
            "`phase_timeouts.weights` is 'inf' (flag --phase-timeouts), but it should be a finite "
            "number",
        ),
        (
            7,
            "`phase_timeouts` is 7 (flag --phase-timeouts), but it should be a valid mapping of "
            "phases to seconds",
        ),
    ],
)
def test_a_wrong_phase_timeout_is_told(given, message):
    expected = Problem("config.invalid_value", message, PHASE_HINT)
    assert problems_of(flag(phase_timeouts=given)) == (expected,)


@pytest.mark.parametrize("name", ["gemma", "7b", "gemma-7b-it.2_a", "a" * 63])
def test_the_name_of_a_deployment(name):
    assert resolve([flag(name=name)]).config.name == name


@pytest.mark.parametrize("name", ["", "Gemma", "-a", ".", "..", "a b", "a\n", "a" * 64, "ä"])
def test_a_name_that_could_not_be_a_folder_is_refused(name):
    assert problems_of(flag(name=name)) == (
        Problem(
            "config.invalid_value",
            f"`name` is {name!r} (flag --name), but it should be made of lower-case letters, "
            "digits, `.`, `_` and `-`, start with a letter or a digit, and have at most 63 "
            "characters",
            "--name NAME: What `status`, `logs` and `stop` call this deployment; by default made "
            "from the model.",
        ),
    )


def test_a_model_in_the_place_of_a_name_is_pointed_to_its_flag():
    (problem,) = problems_of(flag(name="google/gemma-7b-it"))
    assert problem.hint == "a model is named with --model: `--model google/gemma-7b-it`"


@pytest.mark.parametrize(
    ("served", "name"),
    [("google/gemma-7b-it", "gemma-7b-it"), ("My Gemma!", "my-gemma"), ("../..", "model"),
     ("/models/gemma_2/", "gemma_2"), ("", "model"), ("é", "model"),
     ("a" * 62 + "-b", "a" * 62)],
)  # fmt: skip
def test_a_deployment_is_named_after_its_model(served, name):
    assert deployment_name(served) == name


@given(st.text())
def test_whatever_the_model_the_name_made_of_it_is_a_valid_one(served):
    assert ServeConfig(name=deployment_name(served)).name is not None


def test_restart_is_no_on_failure_or_left_to_the_command(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("restart: no\n")  # which YAML reads as false
    assert resolve([Layer("file", read_file(path).values)]).config.restart == "no"
    assert resolve([flag(restart="on-failure")]).config.restart == "on-failure"
    assert ServeConfig().restart is None
    for wrong in ("always", True):
        (problem,) = problems_of(flag(restart=wrong))
        assert problem.message.endswith("but it should be 'no' or 'on-failure'")


@pytest.mark.parametrize("name", ["probe_interval", "probe_deadline"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", True])
def test_the_times_of_the_probe_are_seconds_above_zero(name, seconds):
    assert len(problems_of(flag(**{name: seconds}))) == 1
    assert getattr(resolve([flag(**{name: "0.5"})]).config, name) == 0.5


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (
            flag(port="abc"),
            Problem(
                "config.invalid_value",
                "`port` is 'abc' (flag --port), but it should be a valid integer, "
                "unable to parse string as an integer",
                "--port PORT: Port to listen on; 0 takes a free one. Default: 8000.",
            ),
        ),
        (
            flag(gpu_memory_utilization="1.5"),
            Problem(
                "config.invalid_value",
                "`gpu_memory_utilization` is '1.5' (flag --gpu-memory-utilization), "
                "but it should be less than or equal to 1",
                "--gpu-memory-utilization FRACTION: Share of each GPU's memory that vLLM may "
                "take. Default: 0.9.",
            ),
        ),
        (
            flag(dtype="int8"),
            Problem(
                "config.invalid_value",
                "`dtype` is 'int8' (flag --dtype), but it should be 'auto', 'bfloat16', "
                "'float16' or 'float32'",
                "--dtype TYPE: auto, bfloat16, float16 or float32. Default: auto.",
            ),
        ),
        (
            Layer("file", {"max_model_length": 4096}, {"max_model_length": "a.yaml"}),
            Problem(
                "config.unknown_setting",
                "`max_model_length` (file a.yaml) is not a setting",
                "did you mean `max_model_len`?",
            ),
        ),
    ],
)
def test_a_wrong_value_is_told_field_value_place_and_what_is_allowed(layer, problem):
    assert problems_of(layer) == (problem,)


def test_every_wrong_value_is_told_at_once():
    codes = [p.message.split("`")[1] for p in problems_of(flag(port="-1", max_num_seqs="0"))]
    assert codes == ["port", "max_num_seqs"]


@pytest.mark.parametrize(
    "name",
    ["port", "--port", "max_model_len", "max-model", "no-enforce-eager", "shutdown-timeout",
     "gpus", "profile", "tensor-parallel", "model", "kv-cache-memory", "hos", "por", "gpu",
     "no-enf", "device-memory-utilization", "device-mem"],
)  # fmt: skip
def test_an_engine_arg_that_is_ours_is_refused_and_points_to_our_flag(name):
    (problem,) = problems_of(Layer("flag", {"engine_args": {name: "1"}}))
    assert "is a setting of gemma-serve itself: use --" in problem.message


@pytest.mark.parametrize("name", ["shutdown-timeout", "shut"])
def test_vllms_own_flag_for_draining_is_a_setting_of_the_same_name(name):
    (problem,) = problems_of(Layer("flag", {"engine_args": {name: "1"}}))
    assert problem.message.endswith("is a setting of gemma-serve itself: use --shutdown-timeout")


@pytest.mark.parametrize("name", ["api-key", "api_key", "hf-token", "hf-t", "hf-tok", "api-k"])
def test_a_secret_is_refused_as_an_engine_arg_and_not_shown(name):
    (problem,) = problems_of(Layer("flag", {"engine_args": {name: "s3cret"}}))
    assert "would put a secret on the engine's command line" in problem.message
    assert "s3cret" not in problem.message + problem.hint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("uds", "would move or wrap the endpoint"),
        ("ssl-certfile", "would move or wrap the endpoint"),
        ("headless", "would move or wrap the endpoint"),
        ("tp", "is a short form"),
        ("-q", "is a short form"),
    ],
)
def test_an_engine_arg_that_could_not_work_is_refused(name, reason):
    (problem,) = problems_of(Layer("flag", {"engine_args": {name: "1"}}))
    assert reason in problem.message


def test_a_switch_is_no_number_and_vllms_short_dtypes_are_taken():
    layer = Layer("file", {"port": True, "max_num_seqs": True, "gpus": True})
    named = [p.message.split("`")[1] for p in problems_of(layer)]
    assert set(named) == {"port", "max_num_seqs", "gpus"}
    assert resolve([flag(dtype="half")]).config.dtype == "float16"


def test_paths_mean_the_same_from_every_folder():
    config = resolve([flag(api_key_file="key", engine_python="./py")]).config
    assert (config.api_key_file, config.engine_python) == (Path.cwd() / "key", Path.cwd() / "py")
    assert resolve([flag(engine_python="python3.12")]).config.engine_python == Path("python3.12")


@pytest.mark.parametrize("name", ["seed", "load-format", "block-size", "compilation-config.mode"])
def test_other_flags_of_vllm_are_taken(name):
    assert resolve([Layer("flag", {"engine_args": {name: "1"}})]).config.engine_args == {name: "1"}


@given(st.text())
def test_any_engine_arg_name_is_taken_or_refused_in_order(name):
    try:
        config = resolve([Layer("flag", {"engine_args": {name: "1"}})]).config
    except UsageError:
        return
    assert config.engine_args == {arg_name(name): "1"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 * 2**20), ("1g", 10**9), ("1.5G", 3 * 2**29), ("8GiB", 8 * 2**30), ("4k", 4000),
     ("4K", 4096), ("17", "17"), ("huge", "huge")],
)  # fmt: skip
def test_sizes_are_read_as_vllm_reads_them(text, size):
    assert parse_count(text) == size


def test_gpus_are_a_list_however_they_are_written():
    assert resolve([flag(gpus="1, 3")]).config.gpus == ("1", "3")
    assert resolve([Layer("file", {"gpus": [1, "GPU-8932f9"]})]).config.gpus == ("1", "GPU-8932f9")
    assert resolve([Layer("file", {"gpus": 0})]).config.gpus == ("0",)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_shipped_config_is_valid(path):
    found = read_file(path)
    resolved = resolve([Layer("file", found.values, found.origins)])
    assert {name: resolved.sources[name] for name in found.values} == dict.fromkeys(
        found.values, f"file {path}"
    )


def test_there_are_configs():
    assert len(CONFIGS) >= 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: [1", "line 1 is not valid YAML"),
        ("- port", "holds list, but a mapping of settings was wanted"),
        ("port: 1\nport: 2", "line 2 is not valid YAML: the key `port` is there twice"),
        ("max-model-len: 1\nmax_model_len: 2", "sets the same thing twice"),
        ("api_key: s3cret", "holds an API key, which does not belong into a configuration file"),
    ],
)
def test_a_bad_file_is_told_in_a_sentence(tmp_path, text, message):
    path = tmp_path / "gemma.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_file(path)
    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory"):
        read_file(tmp_path / "none.yaml")


def test_the_environment_gives_settings_and_warns_of_unknown_ones():
    found = read_environment(
        {
            "GEMMA_SERVE_MAX_MODEL_LEN": "4096",
            "GEMMA_SERVE_ENGINE_ARGS": '{"seed": 7}',
            "GEMMA_SERVE_PHASE_TIMEOUTS": '{"weights": 7200}',
            "GEMMA_SERVE_MAX_MODEL_LENGTH": "1",
            "GEMMA_SERVE_API_KEY": "s3cret",
            "GEMMA_SERVE_DTYPE": "",
            "PATH": "/bin",
        }
    )
    assert found.values == {
        "max_model_len": "4096",
        "engine_args": {"seed": 7},
        "phase_timeouts": {"weights": 7200},
    }
    assert found.origins["max_model_len"] == "GEMMA_SERVE_MAX_MODEL_LEN"
    assert found.problems == (
        Problem(
            "config.unknown_variable",
            "GEMMA_SERVE_MAX_MODEL_LENGTH is set, but it is no setting",
            "did you mean GEMMA_SERVE_MAX_MODEL_LEN?",
            blocking=False,
        ),
    )


def test_a_variable_that_should_hold_a_mapping_is_told_how():
    with pytest.raises(UsageError) as caught:
        read_environment({"GEMMA_SERVE_PHASE_TIMEOUTS": "weights=7200"})
    assert caught.value.problems == (
        Problem(
            "config.invalid_value",
            "GEMMA_SERVE_PHASE_TIMEOUTS is not a mapping of phases to seconds",
            """write it as JSON: GEMMA_SERVE_PHASE_TIMEOUTS='{"weights": 7200}'""",
        ),
    )


def test_the_variables_of_a_kubernetes_service_are_no_settings():
    found = read_environment(
        {
            "GEMMA_SERVE_PORT": "tcp://10.0.0.1:8000",
            "GEMMA_SERVE_SERVICE_HOST": "10.0.0.1",
            "GEMMA_SERVE_SERVICE_PORT_HTTP": "8000",
            "GEMMA_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
        }
    )
    assert (found.values, found.problems) == ({}, ())


def test_loopback_and_urls():
    assert [is_loopback(h) for h in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "gpu-box")] == [False] * 4
    assert client_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert client_url("::", 80) == "http://[::1]:80"
    assert client_url("gpu-box", 80) == "http://gpu-box:80"
