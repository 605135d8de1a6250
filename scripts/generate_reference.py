# ruff: noqa: E501  # the tables of the page are as wide as they are
"""Write docs/configuration.md from the settings, and the tables of failures and smoke checks.

    python scripts/generate_reference.py [--check]

With --check nothing is written, and the exit code is 1 where one of them is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from gemma_serve.adapters.package_data import load_failures
from gemma_serve.planning.config import ServeConfig
from gemma_serve.planning.failures import Failure, Kind, Remedy
from gemma_serve.planning.phases import PHASE_TIMEOUTS_S
from gemma_serve.planning.problem_topics import topic_of
from gemma_serve.planning.settings import SETTINGS, Setting
from gemma_serve.planning.smoke.promises import PROMISES, Promise

DOCS = Path(__file__).parent.parent / "docs"
SETTINGS_PAGE = DOCS / "configuration.md"
FAILURES_PAGE = DOCS / "diagnosis.md"
PROMISES_PAGE = DOCS / "smoke-test.md"
BEGIN, END = "<!-- failures: begin -->\n", "<!-- failures: end -->\n"
PROMISES_BEGIN, PROMISES_END = "<!-- promises: begin -->\n", "<!-- promises: end -->\n"
HEAD = """\
# Settings

<!-- Written by scripts/generate_reference.py; a test compares. -->

Every setting of a deployment can be given in three places. The strongest wins:

1. a flag: `--max-model-len 8192`
2. an environment variable: `GEMMA_SERVE_MAX_MODEL_LEN=8192`
3. a YAML file named with `--config` (or `GEMMA_SERVE_CONFIG`): `max_model_len: 8192`

What is set nowhere is chosen for the machine, or has the default below. `gemma-serve plan` shows
each value and where it came from. The names are vLLM's own wherever vLLM has the setting. Sizes
and token counts may be written as vLLM reads them: `512M` and `8K` are powers of 1024, `512m` and
`8k` powers of 1000. Paths are relative to the current folder.

| setting | flag | variable | default | what it does |
|---|---|---|---|---|
"""
TAIL = """
## Flags of vLLM that have no setting here

`--engine-arg KEY=VALUE` passes any other flag on, as often as needed: `--engine-arg seed=7`,
`--engine-arg enable-prefix-caching` (a switch), `--engine-arg async-scheduling=false`
(`--no-async-scheduling`). In a file, lists are spread out and mappings become JSON:

```yaml
engine_args:
  seed: 7
  limit-mm-per-prompt: {image: 2}
```

In the environment they are one JSON object: `GEMMA_SERVE_ENGINE_ARGS='{"seed": 7}'`. Entries from
several places are merged one by one. A flag that is a setting above is refused, so that no value
has two homes.

## Time-outs of the phases of a start

`--phase-timeout PHASE=SECONDS` says how long a phase may go on without progress, as often as
needed: `--phase-timeout weights=7200` for a slow disk. In a file it is a mapping, in the
environment one JSON object, `GEMMA_SERVE_PHASE_TIMEOUTS='{"weights": 7200}'`; entries from several
places are merged one by one. A blank may be written `-` or `_`, and capitals don't matter:
`kv-cache`. vLLM's own clock for the whole start, `VLLM_ENGINE_READY_TIMEOUT_S`, is set to their
sum.

| phase | default, in seconds |
|---|---|
@@phases@@
## What the engine compiles

Graphs and kernels that vLLM, torch, Triton and FlashInfer compile are kept below one folder: that
of `--cache-dir`, else `gemma-serve` in the platform's cache folder (`~/.cache/gemma-serve` on
Linux). Mount a volume there and a new machine starts warm. In it each version of vLLM and torch
and each kind of GPU has a folder of its own, so that none meets what another compiled. A variable
that you set yourself stays as it is: `VLLM_CACHE_ROOT`, `TORCHINDUCTOR_CACHE_DIR`,
`TRITON_CACHE_DIR`, `FLASHINFER_WORKSPACE_BASE`. Kernels that you downloaded for FlashInfer to
`~/.cache/flashinfer` are found with `FLASHINFER_WORKSPACE_BASE=$HOME`.

## Not settings

| variable | what it does |
|---|---|
| `GEMMA_SERVE_API_KEY` | the key that clients must send; goes to vLLM by environment, never on a command line. `VLLM_API_KEY` works too. A file named by `--api-key-file` wins over both |
| `GEMMA_SERVE_URL` | the endpoint for `smoke-test` |
| `GEMMA_SERVE_CONFIG` | the YAML file for `--config` |
| `GEMMA_SERVE_STATE_DIR` | where deployments and their logs are kept; by default the platform's state folder, `~/.local/state/gemma-serve` on Linux |
| `GEMMA_SERVE_ENGINE` | the engine for `./scripts/install`: `auto`, `gpu`, `cpu` or `none` |
| `CUDA_VISIBLE_DEVICES` | the GPUs that count, by index in PCI order or by UUID |
| `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the others of `hf` | as `hf` reads them, see [access](access.md#mirrors-and-other-places) |
"""

KINDS: dict[Kind, str] = {
    "start": "A start fails",
    "death": "A start fails, or an engine that was ready ends",
    "request": "One request fails",
}
REMEDIES: dict[Remedy, str] = {
    "shorten-context": "a shorter context",
    "another-port": "the next free port",
    "purge-compile-cache": "starts without what was compiled",
    "wait-for-memory": "waits, then the same again",
    "longer-ready-timeout": "a longer time-out",
}


def settings_page() -> str:
    """The whole page of the settings."""
    phases = "".join(f"| {phase} | {limit:g} |\n" for phase, limit in PHASE_TIMEOUTS_S.items())
    return HEAD + "".join(map(_row, SETTINGS)) + TAIL.replace("@@phases@@\n", f"{phases}\n")


def _row(setting: Setting) -> str:
    flag = f"{setting.flag} {setting.metavar}".strip()
    if setting.kind == "switch":
        flag = f"{setting.flag}, --no-{setting.flag[2:]}"
    default = ServeConfig.model_fields[setting.name].get_default(call_default_factory=True)
    text = f"{default:g}" if isinstance(default, float) else str(default).lower()
    shown = "" if default in (None, {}) else f"`{text}`"
    if setting.name == "model":
        shown = ""
    cells = [f"`{setting.name}`", f"`{flag}`", f"`{setting.variable}`", shown, setting.help]
    return _line(cells)


def failures_page(page: str) -> str:
    """The page of the failures with its table written anew; the rest of `page` stays."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    tables = "".join(line for kind in KINDS for line in _failure_lines(kind))
    return f"{head}{BEGIN}{tables}\n{END}{tail}"


def _failure_lines(kind: Kind) -> Iterator[str]:
    yield f"\n### {KINDS[kind]}\n\n"
    yield _line(["id", "what it is", "what mends it", "seen before the start", "`--auto-fix`"])
    yield "|---|---|---|---|---|\n"
    for failure in load_failures().failures:
        if failure.kind == kind:
            yield _line(_failure_cells(failure))


def _failure_cells(failure: Failure) -> list[str]:
    seen = "" if topic_of(failure.id) is None else "yes"
    mended = "" if failure.remedy is None else REMEDIES[failure.remedy]
    # The last of its templates is the one that needs no numbers of a log.
    return [f"`{failure.id}`", failure.title, failure.fixes[-1], seen, mended]


def promises_page(page: str) -> str:
    """The page of the smoke test with its table of checks written anew."""
    head, _, rest = page.partition(PROMISES_BEGIN)
    _, _, tail = rest.partition(PROMISES_END)
    rows = "".join(_line([f"`{id}`", one.text, _needs(one)]) for id, one in PROMISES.items())
    table = _line(["check", "what is promised", "tried after"]) + "|---|---|---|\n" + rows
    return f"{head}{PROMISES_BEGIN}{table}{PROMISES_END}{tail}"


def _needs(promise: Promise) -> str:
    either = " or ".join(f"`{need}`" for need in promise.needs_one_of)
    return ", ".join([*(f"`{need}`" for need in promise.needs), *([either] if either else [])])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description="Write the generated parts of docs/.")
    parser.add_argument("--check", action="store_true")
    wanted = {
        SETTINGS_PAGE: settings_page(),
        FAILURES_PAGE: failures_page(FAILURES_PAGE.read_text()),
        PROMISES_PAGE: promises_page(PROMISES_PAGE.read_text()),
    }
    stale = [page for page, text in wanted.items() if page.read_text() != text]
    if parser.parse_args().check:
        for page in stale:
            print(f"docs/{page.name} is out of date: run python scripts/generate_reference.py")
        return 1 if stale else 0
    for page in stale:
        page.write_text(wanted[page])
        print(f"wrote {page.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
