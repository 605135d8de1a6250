"""The action and the workflows: their scripts run as GitHub's runner runs them."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from gemma_serve.cli.app import app

GITHUB = Path(__file__).parent.parent / ".github"
ACTION = yaml.safe_load((GITHUB / "actions/smoke-test/action.yml").read_text())
STEPS = {step["id"]: step for step in ACTION["runs"]["steps"] if "id" in step}
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
# Stands for `gemma-serve` and for `scripts/install`: writes down how it was called.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\0' "$(realpath "$0")" "$$" "$@" >"$RECORD/argv"
env -0 >"$RECORD/environ"
echo "said to people"
echo $'\\e[31mand an error\\e[0m' >&2
exit "$EXIT_CODE"
"""
HOSTILE = """it's "a" $(touch x) `touch y` ${z}; touch w & * \\"""


@dataclass
class Job:
    """A folder with what a runner gives to the steps of a job."""

    folder: Path

    def __post_init__(self):
        self.workspace = self.folder / "workspace"
        self.record = self.folder / "record"
        self.checkout = self.folder / "check out"  # of gemma-serve, where its action lies
        self.in_path = self.folder / "bin" / "gemma-serve"
        self.in_venv = self.checkout / ".venv" / "bin" / "gemma-serve"
        self.installer = self.checkout / "scripts" / "install"
        self.action = self.checkout / ".github" / "actions" / "smoke-test"
        for folder in (self.workspace, self.record, self.action, self.folder / "temp"):
            folder.mkdir(parents=True)
        for stand_in in (self.in_path, self.in_venv, self.installer):
            stand_in.parent.mkdir(parents=True)
            stand_in.write_text(STAND_IN)
            stand_in.chmod(0o755)

    def step(self, id, *, outcome="", exit_code=0, environ=None, **inputs):
        """Run a step of the action in the way of `shell: bash`; the pid and the process."""
        known = {name: given["default"] for name, given in ACTION["inputs"].items()}
        known |= {name.replace("_", "-"): value for name, value in inputs.items()}
        values = {f"inputs.{name}": value for name, value in known.items()}
        values["steps.test.outcome"] = outcome
        script = self.folder / f"{id}.sh"
        script.write_text(STEPS[id]["run"])
        variables = {
            name: EXPRESSION.sub(lambda found: values[found[1]], text)
            for name, text in STEPS[id]["env"].items()
        }
        runner = {
            "PATH": f"{self.in_path.parent}:{os.environ['PATH']}",
            "GITHUB_ACTION_PATH": str(self.action),
            "GITHUB_OUTPUT": str(self.folder / "output"),
            "GITHUB_STEP_SUMMARY": str(self.folder / "summary"),
            "RUNNER_TEMP": str(self.folder / "temp"),
            "RECORD": str(self.record),
            "EXIT_CODE": str(exit_code),
        }
        return subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script],
            cwd=self.workspace,
            env={**runner, **variables, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, id, **given):
        """Run a step; its exit code and what it wrote to the job's log."""
        with self.step(id, **given) as process:
            said = process.communicate(timeout=30)[0]
        return process.returncode, said

    @property
    def called(self):
        """Which stand-in was called, and its arguments."""
        program, _, *arguments = self._recorded("argv")
        return Path(program), arguments

    @property
    def called_pid(self):
        return int(self._recorded("argv")[1])

    @property
    def environ(self):
        return dict(entry.split("=", 1) for entry in self._recorded("environ"))

    @property
    def outputs(self):
        text = (self.folder / "output").read_text()
        entry = re.compile(r"^(\w+)<<(?P<end>.+)\n((?s:.*?))\n(?P=end)$", re.MULTILINE)
        return {name: value for name, _, value in entry.findall(text)}

    @property
    def summary(self):
        return (self.folder / "summary").read_text()

    def _recorded(self, name):
        return (self.record / name).read_text().split("\0")[:-1]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def uses(text):
    """What a file of the runner's uses: `actions/checkout@v4`, or a path."""
    return re.findall(r"uses: (\S+)", text)


@pytest.mark.parametrize("path", sorted(GITHUB.rglob("*.yml")), ids=lambda path: path.stem)
def test_no_script_holds_an_expression_and_what_is_used_has_a_version(path):
    document = yaml.safe_load(path.read_text())
    jobs = document["jobs"].values() if "jobs" in document else [document["runs"]]
    scripts = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert [script for script in scripts if "${{" in script] == []
    assert set(uses(path.read_text())) <= {
        "actions/checkout@v4",
        "actions/setup-python@v5",
        "actions/upload-artifact@v4",
        "./.github/actions/smoke-test",
    }


def test_the_action_uses_the_inputs_that_it_declares():
    used = re.findall(r"inputs\.([\w-]+)", json.dumps(ACTION["runs"]))
    assert set(used) == set(ACTION["inputs"])
    assert all(given["default"] is not None for given in ACTION["inputs"].values())


def test_the_example_gives_the_action_inputs_that_it_has_and_keeps_its_reports():
    jobs = yaml.safe_load((GITHUB / "workflows/pipeline-example.yml").read_text())["jobs"]
    for job in jobs.values():
        (given,) = (s["with"] for s in job["steps"] if s.get("uses", "").startswith("./"))
        assert given.keys() <= ACTION["inputs"].keys()
        last = job["steps"][-1]
        assert (last["uses"], last["if"]) == ("actions/upload-artifact@v4", "always()")
        reports = [ACTION["inputs"][name]["default"] for name in ("junit", "html")]
        assert last["with"]["path"].split() == reports


def test_by_default_it_starts_an_endpoint_from_its_own_checkout(job):
    assert job.run("test")[0] == 0
    reports = ["--junit", "smoke-test.xml", "--html", "smoke-test.html"]
    assert job.called == (job.in_venv, ["up", "--smoke-test", "--once", *reports])


def test_every_input_arrives_as_it_is_and_none_is_run(job):
    key = {"GEMMA_SERVE_API_KEY": f"key {HOSTILE}"}
    names = ("model", "config", "api_key_file", "concurrency", "junit", "html")
    inputs = {name: f"{name} {HOSTILE}" for name in names}
    inputs["arguments"] = f"--only\nchat {HOSTILE}\n\n--served-model-name\n-n\n"
    assert job.run("test", install="none", environ=key, **inputs)[0] == 0
    assert job.called == (
        job.in_path,
        [
            *("up", "--smoke-test", "--once"),
            *("--config", f"config {HOSTILE}"),
            *("--model", f"model {HOSTILE}"),
            *("--api-key-file", f"api_key_file {HOSTILE}"),
            *("--concurrency", f"concurrency {HOSTILE}"),
            *("--junit", f"junit {HOSTILE}"),
            *("--html", f"html {HOSTILE}"),
            *("--only", f"chat {HOSTILE}", "--served-model-name", "-n"),
        ],
    )
    assert job.environ["GEMMA_SERVE_API_KEY"] == key["GEMMA_SERVE_API_KEY"]
    assert list(job.workspace.iterdir()) == []
    job.run("report", outcome="success", **inputs)
    assert job.outputs == {"ok": "true", "junit": inputs["junit"], "html": inputs["html"]}
    assert list(job.workspace.iterdir()) == []


@pytest.mark.parametrize("name", ["up", "smoke-test"])
def test_the_program_knows_every_flag_that_the_action_gives(name):
    flags = set(re.findall(r" (--[a-z-]+)", STEPS["test"]["run"]))
    other = {"up": {"--url"}, "smoke-test": {"--smoke-test", "--once", "--config"}}
    command = get_command(app).commands[name]
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert flags - other[name] - known == set()


def test_an_endpoint_that_runs_is_tested_where_it_is(job):
    assert job.run("test", url="http://127.0.0.1:8000/v1", model="demo", html="")[0] == 0
    address = ["--url", "http://127.0.0.1:8000/v1"]
    rest = ["--model", "demo", "--junit", "smoke-test.xml"]
    assert job.called == (job.in_venv, ["smoke-test", *address, *rest])


def test_reports_get_their_folders_and_those_of_an_earlier_run_go(job):
    old = job.workspace / "smoke-test.html"
    old.touch()
    job.run("test", junit="a/b/smoke.xml")
    assert sorted(job.workspace.rglob("*")) == [job.workspace / "a", job.workspace / "a" / "b"]


@pytest.mark.parametrize(
    ("exit_code", "outcome", "ok", "verdict"),
    [(0, "success", "true", "every promise was kept"), (1, "failure", "false", "failed"),
     (3, "failure", "false", "failed")],
)  # fmt: skip
def test_the_exit_code_is_the_steps_and_the_summary_says_what_happened(
    job, exit_code, outcome, ok, verdict
):
    code, said = job.run("test", exit_code=exit_code)
    assert (code, said) == (exit_code, "said to people\n\x1b[31mand an error\x1b[0m\n")
    assert job.run("report", outcome=outcome) == (0, "")
    assert job.outputs == {"ok": ok, "junit": "smoke-test.xml", "html": "smoke-test.html"}
    assert job.summary == (
        f"### gemma-serve smoke test: {verdict}\n\n    said to people\n    and an error\n\n"
    )


def test_where_the_test_was_not_reached_the_summary_says_so_and_not_what_an_earlier_one_did(job):
    job.run("test")
    assert job.run("report", outcome="skipped") == (0, "")
    assert job.summary == "### gemma-serve smoke test: not run\n\n"
    assert job.outputs["ok"] == "false"


def test_the_report_is_made_also_when_the_test_failed():
    assert (STEPS["report"]["if"], "if" in STEPS["test"]) == ("always()", False)


def test_a_signal_to_the_step_reaches_the_program(job):
    with job.step("test") as process:
        process.communicate(timeout=30)
    assert job.called_pid == process.pid


@pytest.mark.parametrize(
    ("given", "installed_before", "engine"),
    [
        ({}, False, "auto"),
        ({"install": "gpu"}, True, "gpu"),
        ({"install": HOSTILE}, False, HOSTILE),  # refused by scripts/install
        ({"install": "cpu", "url": "http://127.0.0.1:8000"}, False, "none"),
        ({"install": "cpu", "url": "http://127.0.0.1:8000"}, True, "auto"),
    ],
    ids=["by default", "as asked", "hostile", "none for a url", "what there is for a url"],
)
def test_it_installs_an_engine_only_where_it_starts_one(job, given, installed_before, engine):
    if installed_before:
        (job.checkout / ".venv" / "gemma-serve.installed").touch()
    assert job.run("install", exit_code=2, **given)[0] == 2
    assert job.called == (job.installer, [engine])
