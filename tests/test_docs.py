"""The documentation says what the program does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_serve.cli.app import app
from gemma_serve.planning.settings import SETTINGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_references_of_settings_and_failures_are_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "generate_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_tables_of_the_planner_are_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "generate_planner_tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_shows_every_command_and_only_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    commands = {command.name for command in app.registered_commands if not command.hidden}
    assert all(f"### `gemma-serve {name}`" in text for name in commands)
    ours = {setting.flag for setting in SETTINGS}
    others = {"--config", "--json", "--format", "--smoke-test", "--once", "--url", "--debug"}
    others |= {"--for-gpu", "--engine-version", "--device", "--force", "--family", "--fits"}
    others |= {"--detach", "--follow", "--orphans", "--auto-fix", "--junit", "--only"}
    shown = set(re.findall(r"gemma-serve [^\n`]*?(--[a-z-]+)", text))
    assert shown <= ours | others


def test_no_placeholder_is_left():
    for page in PAGES:
        assert "@@" not in page.read_text(), page.name
