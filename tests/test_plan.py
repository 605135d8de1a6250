"""`plan`: what would run, from settings and from this machine."""

import json
import os

import pytest

from gemma_serve.adapters.chat_template import own_chat_template, refuses_system_role
from gemma_serve.adapters.package_data import data_path
from gemma_serve.adapters.settings import read_file
from gemma_serve.cli import main
from gemma_serve.planning.config import ServeConfig
from gemma_serve.usecases.plan import cpu_kv_cache_bytes, find_model, make_plan
from gemma_serve.view.plan import command_line, plan_data, plan_yaml
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
    plan = make_plan(
        {"model": "demo", "engine_python": python, "port": "8001", "max_model_len": "1K"},
        environ={**environ, "VLLM_CPU_OMP_THREADS_BIND": "0"},
    )
    data = plan_data(plan)
    size = data["config"]["kv_cache_memory_bytes"]
    assert data["argv"] == [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(data_path("demo")),
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", "8001",
        "--tensor-parallel-size", "1", "--kv-cache-memory-bytes", str(size),
        "--max-model-len", "1024", "--enforce-eager", "--chat-template", TEMPLATE,
    ]  # fmt: skip
    assert data["environment"] == {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    assert (data["url"], data["secrets"]) == ("http://127.0.0.1:8001", {})
    given = {name: source for name, source in data["sources"].items() if source != "default"}
    assert given == {
        "model": "flag --model",
        "engine_python": "flag --engine-python",
        "port": "flag --port",
        "max_model_len": "flag --max-model-len",
        "kv_cache_memory_bytes": "detected: out of this machine's free memory",
        "enforce_eager": "detected: compiling does not pay on a CPU",
    }
    assert plan.ok
    assert set(data) == {
        "url", "served_model_name", "config", "sources", "engine", "gpus", "argv", "environment",
        "secrets", "notes",
    }  # fmt: skip


def test_a_plan_as_yaml_is_a_file_that_gives_the_same_plan(python, environ, tmp_path):
    flags = {"model": "demo", "engine_python": python, "engine_args": {"seed": "7"}}
    plan = make_plan(flags, environ=environ)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_yaml(plan))
    again = make_plan({}, environ=environ, file=path)
    assert again.config == plan.config
    assert set(again.sources.values()) == {"default", f"file {path}"}
    assert read_file(path).values["engine_args"] == {"seed": "7"}


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
    assert (answer["ok"], [p["code"] for p in answer["problems"]]) == (False, ["model.not_found"])


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
