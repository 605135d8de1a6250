"""`plan`: what would run, from settings and from this machine."""

import json
import os
import platform

import pytest

from gemma_serve.adapters import host
from gemma_serve.adapters.chat_template import own_chat_template, refuses_system_role
from gemma_serve.adapters.package_data import data_path
from gemma_serve.adapters.settings import read_file
from gemma_serve.cli import main
from gemma_serve.planning.config import ServeConfig
from gemma_serve.usecases.model_facts import find_model
from gemma_serve.usecases.plan import make_plan
from gemma_serve.usecases.target import cpu_kv_cache_bytes
from gemma_serve.view.plan import command_line, plan_data, plan_yaml
from machines import H200, L4, runner, several
from running import fake_python

TEMPLATE = str(data_path("chat_templates", "system-in-first-turn.jinja"))


@pytest.fixture
def python(tmp_path):
    return str(fake_python(tmp_path))


@pytest.fixture
def environ(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("GEMMA_SERVE_", "VLLM_"))]:
        monkeypatch.delenv(name)
    return {"PATH": os.environ["PATH"]}


def test_the_whole_plan_of_the_demo(python, environ):
    flags = {"model": "demo", "engine_python": python, "port": "8001", "max_model_len": "1K"}
    plan = make_plan(
        {**flags, "cache_dir": "/caches"},
        environ={**environ, "VLLM_CPU_OMP_THREADS_BIND": "0"},
    )
    data = plan_data(plan)
    size = data["config"]["kv_cache_memory_bytes"]
    assert data["argv"] == [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(data_path("demo")),
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", "8001",
        "--tensor-parallel-size", "1", "--kv-cache-memory-bytes", str(size),
        "--max-model-len", "1024", "--max-num-seqs", "128", "--max-num-batched-tokens", "2048",
        "--enforce-eager", "--shutdown-timeout", "60", "--chat-template", TEMPLATE,
    ]  # fmt: skip
    assert data["plan"]["argv"] == data["argv"]
    caches = f"/caches/vllm-0.32.0_torch-unknown_cpu-{platform.machine()}"
    assert data["environment"] == {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": "10620",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": f"{caches}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "FLASHINFER_WORKSPACE_BASE": f"{caches}/flashinfer",
    }
    assert (data["url"], data["secrets"]) == ("http://127.0.0.1:8001", {})
    given = {name: source for name, source in data["sources"].items() if source != "default"}
    assert given == {
        "model": "flag --model",
        "engine_python": "flag --engine-python",
        "port": "flag --port",
        "max_model_len": "flag --max-model-len",
        "cache_dir": "flag --cache-dir",
        "kv_cache_memory_bytes": "detected: out of this machine's free memory",
        "enforce_eager": "detected: compiling does not pay on a CPU",
        "tensor_parallel_size": "planned: one is enough",
        "max_num_seqs": "planned: vLLM's default here",
        "max_num_batched_tokens": "planned: vLLM's default here",
    }
    assert plan.ok
    assert set(data) == {
        "url", "served_model_name", "config", "sources", "engine", "gpus", "argv", "environment",
        "secrets", "notes", "fit", "facts_source", "model", "plan", "alternatives", "commit",
    }  # fmt: skip
    assert (data["fit"], data["facts_source"]) == ("fits", "folder")
    # 1024 tokens are 8 blocks of 128.
    assert data["plan"]["kv_cache"]["max_concurrency"] == size // (128 * 1024) / 8


def test_a_plan_as_yaml_is_a_file_that_gives_the_same_plan(python, environ, tmp_path):
    flags = {
        "model": "demo",
        "engine_python": python,
        "engine_args": {"seed": "7"},
        "phase_timeouts": {"kv-cache": "7"},
        "restart": "no",
    }
    plan = make_plan(flags, environ=environ)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_yaml(plan))
    again = make_plan({}, environ=environ, file=path)
    assert again.config == plan.config
    assert set(again.sources.values()) == {"default", f"file {path}"}
    values = read_file(path).values
    assert (values["engine_args"], values["restart"]) == ({"seed": "7"}, "no")
    assert values["phase_timeouts"] == {"KV cache": 7.0}


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """`gemma-serve plan` in this process, on a described machine with vLLM for GPUs."""
    run = runner(monkeypatch, capsys, tmp_path)
    return lambda *argv, **machine: run(*argv, command="plan", **machine)


def test_a_plan_for_gpus_says_why_each_value_was_taken(check):
    caches = {"GEMMA_SERVE_CACHE_DIR": "/caches"}
    run = check("--json", "-m", "google/gemma-4-31B-it", environ=caches, gpus=several(L4, 4))
    data = run.data
    length = data["plan"]["max_model_len"]
    assert (run.code, run.codes, data["fit"]) == (0, [], "fits")
    assert data["argv"][3:] == [
        "--model", "google/gemma-4-31B-it", "--served-model-name", "google/gemma-4-31B-it",
        "--host", "127.0.0.1", "--port", "8000", "--tensor-parallel-size", "4",
        "--gpu-memory-utilization", "0.9", "--max-model-len", str(length),
        "--max-num-seqs", "256", "--max-num-batched-tokens", "2496", "--shutdown-timeout", "60",
    ]  # fmt: skip
    assert {name: source for name, source in data["sources"].items() if source != "default"} == {
        "model": "flag --model",
        "engine_python": "environment GEMMA_SERVE_ENGINE_PYTHON",
        "cache_dir": "environment GEMMA_SERVE_CACHE_DIR",
        "tensor_parallel_size": "planned: the fewest GPUs on which it fits",
        "max_model_len": "planned: the longest that fits",
        "max_num_seqs": "planned: vLLM's default here",
        "max_num_batched_tokens": "planned: as many as one video may take",
    }
    assert data["config"]["max_model_len"] == length < 262_144
    folder = "/caches/vllm-0.32.0_torch-unknown_NVIDIA-L4"
    assert data["environment"] == {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": "10620",
        "VLLM_CACHE_ROOT": f"{folder}/vllm",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "FLASHINFER_WORKSPACE_BASE": f"{folder}/flashinfer",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    }
    assert [gpu["index"] for gpu in data["gpus"]] == [0, 1, 2, 3]
    assert data["notes"][1:] == [
        "tensor_parallel_size 4: the fewest GPUs on which it fits",
        f"max_model_len {length}: the longest that fits",
    ]
    assert data["plan"]["argv"] == data["argv"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--gpus", "0,3", "--max-model-len", "1024"],
        ["--for-gpu", "h200", "--kv-cache-memory-bytes", "8G"],
        ["--device", "cpu", "--kv-cache-memory-bytes", "64M", "--dtype", "float32"],
        ["--engine-version", "0.28.0", "--tensor-parallel-size", "4"],
    ],
)
def test_check_gpu_has_the_same_plan(check, monkeypatch, capsys, tmp_path, flags):
    # What is free changes between the two.
    monkeypatch.setattr(host, "available_memory_bytes", lambda: 16 * 2**30)
    argv = ["--json", "-m", "google/gemma-3-4b-it", *flags]
    looked = runner(monkeypatch, capsys, tmp_path)(*argv, gpus=several(L4, 4)).data
    planned = check(*argv, gpus=several(L4, 4)).data
    for key in ("fit", "facts_source", "model", "alternatives"):
        assert looked[key] == planned[key], key
    assert looked["plan"] == planned["plan"]


def test_a_plan_for_gpus_as_yaml_gives_the_same_plan(check, tmp_path):
    first = ["-m", "google/gemma-3-12b-it"]
    path = tmp_path / "plan.yaml"
    path.write_text(check(*first, "--format", "yaml", gpus=several(L4, 4)).out)
    again = check("--json", "--config", str(path), gpus=several(L4, 4))
    once = check("--json", *first, gpus=several(L4, 4))
    assert again.code == 0
    for key in ("argv", "config", "gpus", "environment", "fit", "model"):
        assert again.data[key] == once.data[key], key
    plans = [{**run.data["plan"], "reasons": None} for run in (again, once)]
    assert plans[0] == plans[1]
    sources = {source for source in again.data["sources"].values() if source != "default"}
    assert sources <= {f"file {path}", "environment GEMMA_SERVE_ENGINE_PYTHON"}


def test_what_the_person_fixed_is_kept_or_refused(check):
    fixed = ["--max-model-len", "4096", "--max-num-seqs", "3", "--max-num-batched-tokens", "512",
             "--tensor-parallel-size", "1", "--dtype", "bfloat16"]  # fmt: skip
    kept = check("--json", "-m", "google/gemma-7b-it", *fixed, gpus=several(L4, 2))
    assert kept.code == 0
    assert not [s for s in kept.data["sources"].values() if s.startswith("planned")]
    refused = check("--json", "-m", "google/gemma-3-27b-it", *fixed, gpus=several(L4, 2))
    assert (refused.code, refused.codes, refused.data["fit"]) == (
        1,
        ["weights-oom"],
        "does_not_fit",
    )
    for run in (kept, refused):
        plan = run.data["plan"]
        assert (plan["max_model_len"], plan["max_num_seqs"]) == (4096, 3)
        assert (plan["max_num_batched_tokens"], plan["tensor_parallel_size"]) == (512, 1)
        assert plan["dtype"] == "bfloat16"
        assert all(flag in run.data["argv"] for flag in fixed)


def test_force_turns_a_verdict_into_a_warning(check):
    argv = ["-m", "google/gemma-3-27b-it"]
    no = check("--json", *argv, gpus=[L4])
    yes = check("--json", *argv, "--force", gpus=[L4])
    assert (no.code, no.answer["ok"], no.codes) == (1, False, ["weights-oom"])
    assert (yes.code, yes.answer["ok"], yes.codes) == (0, True, ["weights-oom"])
    assert yes.answer["problems"] == no.answer["problems"]
    # The verdict itself stays as it is.
    assert yes.data["fit"] == no.data["fit"] == "does_not_fit"
    told = check(*argv, "--force", gpus=[L4])
    assert told.err.startswith(
        "warning: the weights and activations do not fit into the GPU's memory: "
        "google/gemma-3-27b-it does "
    )
    busy = {**H200, "used": 100 * 2**30}
    assert check("--json", "-m", "google/gemma-2b-it", gpus=[busy]).code == 1
    assert check("--json", "-m", "google/gemma-2b-it", "--force", gpus=[busy]).code == 0


def test_force_does_not_make_up_for_files_that_are_missing(check, tmp_path):
    (tmp_path / "m").mkdir()
    assert check("--json", "-m", str(tmp_path / "m"), "--force", gpus=[H200]).codes == [
        "model.no_config"
    ]
    assert check("--json", "-m", "/none", "--force", gpus=[H200]).code == 1


def test_a_model_that_makes_embeddings_is_not_waited_for(check):
    run = check("--json", "-m", "google/embeddinggemma-300m", gpus=[H200])
    assert (run.code, run.codes) == (1, ["model.embeds"])
    [problem] = run.answer["problems"]
    assert problem["hint"] == (
        "serve it with vLLM itself: `vllm serve google/embeddinggemma-300m --runner pooling`"
    )
    assert check("-m", "google/embeddinggemma-300m", gpus=[H200]).err.startswith("error: ")
    assert check("--json", "-m", "google/embeddinggemma-300m", "--force", gpus=[H200]).code == 0


def test_a_model_whose_size_nobody_knows_may_be_tried(check):
    run = check("--json", "-m", "me/my-gemma", gpus=[H200])
    assert (run.code, run.codes) == (0, ["hub.offline", "model.size_unknown"])
    assert (run.data["fit"], run.data["plan"]) == (None, None)
    assert "--max-model-len" not in run.data["argv"]


def test_gpus_that_are_named_are_all_used(check, tmp_path):
    argv = ["--json", "-m", "google/gemma-7b-it", "--gpus", "1,2"]
    run = check(*argv, gpus=several(H200, 3))
    assert run.code == 0
    assert run.data["sources"]["tensor_parallel_size"] == "planned: as many as `gpus` names"
    argv = run.data["argv"]
    assert argv[argv.index("--tensor-parallel-size") + 1] == "2"
    assert run.data["environment"]["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert run.data["plan"]["tensor_parallel_size"] == 2


def test_a_plan_for_gpus_that_are_not_here(check):
    run = check("--json", "--for-gpu", "h200x2", gpus=[])
    assert (run.code, run.codes) == (0, [])
    assert run.data["engine"]["device"] == "cuda"
    assert run.data["config"]["model"] == "google/gemma-7b-it"
    assert run.data["notes"] == [
        "no --model was given and a GPU is asked about: taking google/gemma-7b-it"
    ]
    # Which of another machine's GPUs and folders it will be is not for us to say.
    assert not {"CUDA_VISIBLE_DEVICES", "VLLM_CACHE_ROOT"} & run.data["environment"].keys()


def test_an_engine_of_another_version(check):
    argv = ["--json", "-m", "google/gemma-7b-it", "--engine-version"]
    known = check(*argv, "0.26.0", gpus=[H200])
    assert (known.code, known.codes, known.data["engine"]["version"]) == (0, [], "0.26.0")
    unknown = check(*argv, "0.99.0", gpus=[H200])
    assert (unknown.code, unknown.codes) == (0, ["engine_version_unknown"])
    assert unknown.data["plan"]["planned_vllm_version"] == "0.33"


def test_time_outs_of_phases_come_as_flags(check):
    flags = ["--phase-timeout", "weights=7200", "--phase-timeout", "kv-cache=7"]
    run = check("--json", "-m", "google/gemma-2b-it", *flags, gpus=[H200])
    assert run.data["config"]["phase_timeouts"] == {"weights": 7200.0, "KV cache": 7.0}
    assert run.data["environment"]["VLLM_ENGINE_READY_TIMEOUT_S"] == str(10620 + 3600 - 593)
    assert check("--phase-timeout", "weights", gpus=[H200]).code == 2


def test_what_the_person_set_is_not_detected_away(python, environ):
    flags = {"model": "demo", "engine_python": python, "enforce_eager": False}
    plan = make_plan(flags, environ={**environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    assert (plan.config.enforce_eager, plan.config.kv_cache_memory_bytes) == (False, None)


def test_a_key_is_read_where_it_lies_and_on_no_command_line(python, environ, tmp_path):
    key = tmp_path / "key"
    key.write_text("s3cret")
    flags = {"model": "demo", "engine_python": python, "api_key_file": str(key)}
    plan = make_plan(flags, environ=environ)
    assert command_line(plan).startswith(f'VLLM_API_KEY="$(cat {key})" env VLLM_NO_USAGE_STATS=1')
    assert "s3cret" not in json.dumps(plan_data(plan))
    settings = tmp_path / "a.yaml"
    settings.write_text(f"api_key_file: {key}\nmodel: demo\nengine_python: {python}\n")
    stronger = make_plan({}, environ={**environ, "GEMMA_SERVE_API_KEY": "k"}, file=settings)
    assert stronger.launch.secrets == {"VLLM_API_KEY": "$GEMMA_SERVE_API_KEY"}


def test_plan_starts_nothing_and_says_no_where_up_would_refuse(python, capsys, environ):
    assert main(["plan", "--model", "/none", "--engine-python", python, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], [p["code"] for p in answer["problems"]]) == (False, ["repo-not-found"])


@pytest.mark.parametrize(
    ("template", "refuses"),
    [
        ("{% if messages[0]['role'] == 'system' %}"
         "{{ raise_exception('System role not supported') }}{% endif %}", True),
        ("{% if messages[0]['role'] == 'system' %}{% set prefix = 1 %}{% endif %}", False),
    ],
)  # fmt: skip
def test_our_template_goes_to_exactly_those_models_that_refuse(tmp_path, template, refuses):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert refuses_system_role(template) is refuses
    found = find_model(ServeConfig(model=str(tmp_path)))
    assert (str(found.chat_template) == TEMPLATE, found.has_chat) == (refuses, True)


def test_a_base_model_has_no_chat(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert own_chat_template(tmp_path) is None
    assert find_model(ServeConfig(model=str(tmp_path))).has_chat is False


@pytest.mark.parametrize(
    ("model", "folds", "chats"),
    [("google/gemma-7b-it", True, True), ("google/gemma-2-9b-it", True, True),
     ("google/gemma-3-1b-it", False, True), ("google/gemma-7b", False, False)],
)  # fmt: skip
def test_a_model_of_the_hub_is_known_by_the_catalogue(model, folds, chats):
    found = find_model(ServeConfig(model=model))
    assert (found.chat_template is not None, found.has_chat) == (folds, chats)
    assert (found.location, found.served_name, found.is_local) == (model, model, False)


def test_the_cache_of_a_cpu_engine_is_a_quarter_of_what_is_free_and_4_gib_at_most():
    gib = 2**30
    sizes = [cpu_kv_cache_bytes(free * gib, is_demo=False) for free in (1, 8, 64)]
    assert sizes == [gib // 4, 2 * gib, 4 * gib]
    assert cpu_kv_cache_bytes(64 * gib, is_demo=True) == gib // 4
    assert cpu_kv_cache_bytes(0, is_demo=True) == 64 * 2**20


@pytest.mark.engine
def test_a_flag_that_the_installed_engine_does_not_have_is_refused_with_what_was_meant(capsys):
    assert main(["plan", "--json", "--model", "demo", "--engine-arg", "max_modle_len=5"]) == 1
    assert [(p["code"], p["hint"]) for p in json.loads(capsys.readouterr().out)["problems"]] == [
        (
            "flag-unknown",
            "did you mean `--max-model-len` or `--max-log-len`? else leave out the `--engine-arg` "
            "that gives `--max-modle-len`; `--max-model-len` is given without `--engine-arg`",
        )
    ]
