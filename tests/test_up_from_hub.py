"""`up` and `check` of a model on the Hub: refused before anything starts, or downloaded first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from demo_hub import (
    ACCEPTED,
    GATED,
    NOT_ACCEPTED,
    NOT_FOR_GATED,
    TOKENS,
    UNKNOWN,
    demo_files,
    gated_hub,
)
from fake_engine import serving as serving_engine
from gemma_serve.adapters.host import free_port
from gemma_serve.planning.problem_topics import topic_of
from local_hub import Fault, Hang, LocalHub, Refusal, Refuse, WrongContent, environ, serving
from running import Program, fake_python

HINT_OF_LICENCE = f"https://huggingface.co/{GATED}"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with serving(gated_hub()) as hub:
        yield hub


@pytest.fixture
def run(hub: LocalHub, tmp_path: Path) -> Iterator[Any]:
    """Run the program as a child against the Hub, with a cache and a state folder of its own."""
    programs = []

    def start(*args: str, token: str | None = None, **env: str) -> Program:
        names = environ(hub.url, tmp_path / "hf", token)
        state = {"GEMMA_SERVE_STATE_DIR": str(tmp_path / "state")}
        programs.append(Program(*args, environ={**names, **state, **env}))
        return programs[-1]

    yield start
    for program in programs:
        program.__exit__()


@pytest.fixture
def up(run: Any, tmp_path: Path) -> Any:
    """`up` of the gated model with the fake engine."""

    def start(*args: str, model: str = GATED, **env: str | None) -> Program:
        return run(
            "up", "--model", model, "--engine-python", str(fake_python(tmp_path)),
            "--port", str(free_port("127.0.0.1")), *args, **env,
        )  # fmt: skip

    return start


def said(program: Program) -> str:
    return "".join([*program.out, *program.err])


def codes(program: Program) -> list[str]:
    return [problem["code"] for problem in program.json_lines[-1]["problems"]]


def assert_nothing_started(tmp_path: Path, program: Program) -> None:
    assert program.engine_pid is None
    assert not (tmp_path / "state" / "deployments").exists()
    assert "Traceback" not in said(program)


@pytest.mark.parametrize(
    ("token", "code", "hint"),
    [
        (None, "gated-no-token", HINT_OF_LICENCE),
        (UNKNOWN, "hub.invalid_token", "hf auth login"),
        (NOT_ACCEPTED, "gated-no-licence", HINT_OF_LICENCE),
        (NOT_FOR_GATED, "hub.token_lacks_permission", "settings/tokens"),
    ],
)
def test_who_may_not_is_told_so_before_anything_starts(
    up: Any, tmp_path: Path, token: str | None, code: str, hint: str
) -> None:
    program = up("--json", token=token)
    assert program.exit_code() == 1
    (problem,) = [p for p in program.json_lines[-1]["problems"] if topic_of(p["code"]) == "hub"]
    assert problem["code"] == code
    assert hint in problem["hint"]
    assert_nothing_started(tmp_path, program)
    assert not (tmp_path / "hf" / "hub").exists()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Refuse("resolve", refusal=Refusal(401, "GatedRepo")), "gated-no-licence"),
        (Refuse("resolve", refusal=Refusal(403, "GatedRepo")), "gated-no-licence"),
        (Refuse("api", refusal=Refusal(404, "RepoNotFound")), "repo-not-found"),
        (Refuse("resolve", refusal=Refusal(429, retry_after_s=17)), "hub.rate_limited"),
        (Refuse("api", refusal=Refusal(500)), "hub.server_error"),
        (Hang("resolve"), "hub.unreachable"),
    ],
    ids=["401", "403", "404", "429", "500", "never"],
)
def test_whatever_the_hub_answers_nothing_starts(
    up: Any, hub: LocalHub, tmp_path: Path, fault: Fault, code: str
) -> None:
    hub.faults.append(fault)
    program = up("--json", token=ACCEPTED)
    assert program.exit_code() == 1
    assert [c for c in codes(program) if topic_of(c) == "hub"] == [code]
    assert_nothing_started(tmp_path, program)


def test_a_name_that_the_hub_lacks_is_answered_with_the_nearest(up: Any) -> None:
    program = up(model="google/gemma-7b-itt")
    assert program.exit_code() == 1
    assert "hint: did you mean `--model google/gemma-7b-it`?" in said(program)


def test_the_model_is_downloaded_and_served_from_its_folder_under_its_name(
    up: Any, hub: LocalHub, tmp_path: Path
) -> None:
    program = up(token=ACCEPTED)
    program.wait_for("ready after", "out")
    commit = hub.repos[GATED].commit()  # type: ignore[index]
    folder = tmp_path / "hf" / "hub" / "models--google--gemma-tiny-it" / "snapshots" / commit
    engine = psutil.Process(program.engine_pid)
    argv, inherited = engine.cmdline(), engine.environ()
    assert argv[argv.index("--model") + 1] == str(folder)
    assert argv[argv.index("--served-model-name") + 1] == GATED
    assert "--revision" not in argv
    assert inherited["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in inherited
    assert f"starting {GATED} at {commit[:12]} on " in said(program)
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    secret = ACCEPTED.removeprefix("hf_")
    assert not [content for content in kept if secret.encode() in content]
    assert secret not in said(program) + " ".join(argv)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_the_events_of_a_download_come_before_those_of_the_engine(up: Any) -> None:
    program = up("--once", "--json", token=ACCEPTED)
    assert program.exit_code() == 0
    names = [line["event"] for line in program.json_lines[:-1]]
    assert names[0] == "download_began"
    assert names.index("download_ended") < names.index("engine_started")
    began = program.json_lines[0]
    assert (began["files"], began["missing_bytes"]) == (5, began["total_bytes"])


def test_a_cached_model_starts_again_without_asking_anybody(up: Any, hub: LocalHub) -> None:
    assert up("--once", token=ACCEPTED).exit_code() == 0
    hub.asked.clear()
    again = up("--once", token=ACCEPTED)
    assert (again.exit_code(), hub.asked) == (0, [])
    offline = up("--once", HF_HUB_OFFLINE="1")
    assert (offline.exit_code(), hub.asked) == (0, [])


def test_offline_without_the_model_is_a_no(up: Any, hub: LocalHub, tmp_path: Path) -> None:
    program = up("--json", HF_HUB_OFFLINE="1")
    assert program.exit_code() == 1
    assert "offline-cache-miss" in codes(program)
    assert hub.asked == []
    assert_nothing_started(tmp_path, program)


def cached_weights(tmp_path: Path) -> Path:
    (weights,) = (tmp_path / "hf").rglob("snapshots/*/model.safetensors")
    return weights


@pytest.mark.parametrize("how", ["cut", "altered"])
def test_damaged_weights_are_fetched_again_and_never_reach_the_engine(
    up: Any, run: Any, tmp_path: Path, how: str
) -> None:
    assert run("download", "--model", GATED, token=ACCEPTED).exit_code() == 0
    weights = cached_weights(tmp_path)
    right = weights.read_bytes()
    wrong = right[:-1000] if how == "cut" else right[:-1] + bytes([255 - right[-1]])
    weights.resolve().write_bytes(wrong)
    offline = up("--json", HF_HUB_OFFLINE="1")
    assert offline.exit_code() == 1
    assert offline.engine_pid is None
    told = json.dumps(offline.json_lines[-1])
    assert "weights-truncated" in told
    assert "model.safetensors" in told
    online = up("--once", token=ACCEPTED)
    assert online.exit_code() == 0
    assert "model.safetensors is damaged" in said(online)
    assert weights.read_bytes() == right


def test_weights_that_the_hub_sends_wrong_never_reach_the_engine(
    up: Any, hub: LocalHub, tmp_path: Path
) -> None:
    hub.faults.append(WrongContent("model.safetensors", times=None, after_bytes=2**20))
    program = up("--json", token=ACCEPTED)
    assert program.exit_code() == 1
    assert codes(program) == ["hub.wrong_content"]
    assert_nothing_started(tmp_path, program)
    assert not list((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))


def test_a_folder_that_was_downloaded_is_served_without_a_network(
    up: Any, run: Any, hub: LocalHub, tmp_path: Path
) -> None:
    folder = tmp_path / "usb" / "gemma"
    assert run("download", "--model", GATED, "--to", str(folder), token=ACCEPTED).exit_code() == 0
    hub.asked.clear()
    assert up("--once", model=str(folder), HF_HUB_OFFLINE="1").exit_code() == 0
    assert hub.asked == []
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    program = up("--json", model=str(folder))
    assert (program.exit_code(), codes(program)) == (1, ["weights-truncated"])
    assert program.engine_pid is None


def test_check_says_all_at_once_and_starts_nothing(run: Any, hub: LocalHub, tmp_path: Path) -> None:
    with serving_engine() as other:
        program = run(
            "check", "--model", GATED, "--port", other.rsplit(":", 1)[1],
            "--engine-python", str(tmp_path / "no-python"), "--json",
        )  # fmt: skip
        assert program.exit_code() == 1
    (answer,) = program.json_lines
    states = {check["id"]: check["state"] for check in answer["data"]["checks"]}
    assert states == {
        "engine": "failed", "model": "unknown", "access": "failed", "disk": "ok",
        "gpu": "ok", "plan": "unknown", "port": "failed",
    }  # fmt: skip
    assert sorted(codes(program)) == ["engine.bad_python", "gated-no-token", "port-in-use"]
    assert_nothing_started(tmp_path, program)


def test_check_of_what_up_can_start_is_0(run: Any, tmp_path: Path) -> None:
    python = str(fake_python(tmp_path))
    port = str(free_port("127.0.0.1"))
    args = ("check", "--model", GATED, "--engine-python", python, "--port", port)
    program = run(*args, token=ACCEPTED)
    assert program.exit_code() == 0, said(program)
    assert "alice may read google/gemma-tiny-it" in said(program)
    assert "`gemma-serve up` with the same settings can start it" in said(program)


def test_check_tells_of_files_that_changed_since_they_were_compared(
    run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "gemma"
    assert run("download", "--model", GATED, "--to", str(folder), token=ACCEPTED).exit_code() == 0
    args = ("check", "--model", str(folder), "--engine-python", str(fake_python(tmp_path)),
            "--port", str(free_port("127.0.0.1")), "--json")  # fmt: skip
    whole = run(*args)
    assert (whole.exit_code(), codes(whole)) == (0, [])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    changed = run(*args)
    assert (changed.exit_code(), codes(changed)) == (0, ["model.not_compared"])
    (folder / "generation_config.json").unlink()
    missing = run(*args)
    assert (missing.exit_code(), codes(missing)) == (1, ["model.file_missing"])


def test_a_model_without_a_tokenizer_is_refused_unless_one_is_named(
    up: Any, hub: LocalHub, tmp_path: Path
) -> None:
    hub.repos[GATED].files = {  # type: ignore[index]
        name: content for name, content in demo_files().items() if name != "tokenizer.json"
    }
    program = up("--json", token=ACCEPTED)
    assert (program.exit_code(), codes(program)) == (1, ["tokenizer-missing"])
    assert_nothing_started(tmp_path, program)
    named = up("--once", "--engine-arg", "tokenizer=/another", token=ACCEPTED)
    assert named.exit_code() == 0, said(named)


def test_a_newer_folder_is_not_rolled_back_to_the_cache(
    run: Any, hub: LocalHub, tmp_path: Path
) -> None:
    assert run("download", "--model", GATED, token=ACCEPTED).exit_code() == 0
    files = demo_files() | {"generation_config.json": b'{"top_k": 1}'}
    hub.repos[GATED].files = files  # type: ignore[index]
    folder = tmp_path / "gemma"
    args = ("download", "--model", GATED, "--to", str(folder))
    assert run(*args, token=ACCEPTED).exit_code() == 0
    assert run(*args, HF_HUB_OFFLINE="1").exit_code() == 0
    assert run(*args).exit_code() == 0
    assert (folder / "generation_config.json").read_bytes() == files["generation_config.json"]


def test_room_in_a_folder_is_asked_for_as_the_download_would(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for command in ("check-access", "download"):
        args = (command, "--model", GATED, "--to", str(tmp_path / "mine"), "--json")
        program = run(*args, token=ACCEPTED)
        assert (program.exit_code(), codes(program)) == (2, ["download.not_empty"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_folder_is_filled_from_the_cache_though_the_hub_says_no(run: Any, tmp_path: Path) -> None:
    assert run("download", "--model", GATED, token=ACCEPTED).exit_code() == 0
    folder = tmp_path / "gemma"
    program = run("download", "--model", GATED, "--to", str(folder))
    assert program.exit_code() == 0, said(program)
    assert "sent: google/gemma-tiny-it is gated" in said(program)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".gemma-serve.json", *sorted(demo_files()),
    ]  # fmt: skip


def test_a_folder_that_is_none_is_no_download(run: Any, tmp_path: Path) -> None:
    for command in ("download", "check-access"):
        program = run(command, "--model", str(tmp_path / "none"), "--json")
        assert (program.exit_code(), codes(program)) == (1, ["repo-not-found"])


FAULTS = [
    Refuse("api", refusal=Refusal(500)),
    Refuse("resolve", refusal=Refusal(403, "GatedRepo")),
    Refuse("cdn", refusal=Refusal(403)),
    WrongContent("model.safetensors", times=None, after_bytes=2**20),
]


@pytest.mark.parametrize(
    ("token", "fault"),
    [
        *((token, None) for token in (*TOKENS, "hf_not\x7fa header", "hf_ünicode-Token-of-nobody")),
        *((ACCEPTED, fault) for fault in FAULTS),
    ],
)
def test_no_token_is_ever_shown_or_kept(
    run: Any, hub: LocalHub, tmp_path: Path, token: str, fault: Fault | None
) -> None:
    hub.faults.extend([fault] if fault else [])
    shown = []
    for args in (["check-access"], ["download", "--json"]):
        program = run("--debug", *args, "--model", GATED, token=token)
        assert program.exit_code() in (0, 1)
        shown.append(said(program))
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    secret = token.removeprefix("hf_")
    assert not [text for text in shown if secret in text]
    assert not [content for content in files if secret.encode() in content]
    assert not [r for r in hub.requests if r.route == "cdn" and r.token is not None]
