"""A plan as text, YAML, a command line, or JSON."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_serve.planning.config import client_url
from gemma_serve.usecases.plan import ServePlan
from gemma_serve.view.fit import fit_data, fit_text

if TYPE_CHECKING:
    from rich.console import RenderableType


def plan_data(plan: ServePlan) -> dict[str, Any]:
    """The `data` of `plan --json`. No secret is in it: only where one is read from."""
    return {
        "url": client_url(plan.config.host, plan.config.port),
        "served_model_name": plan.model.served_name,
        "commit": plan.model.commit,
        "config": plan.config.model_dump(mode="json"),
        "sources": dict(plan.sources),
        "engine": {
            "python": str(plan.engine.python),
            "device": plan.engine.device,
            "distribution": plan.engine.distribution,
            "version": plan.engine.version,
            "torch_version": plan.engine.torch_version,
        },
        "gpus": [{"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name} for gpu in plan.gpus],
        **fit_data(plan.report.fit, plan.launch.argv),
        "argv": list(plan.launch.argv),
        "environment": dict(plan.launch.environment),
        "secrets": dict(plan.launch.secrets),
        "notes": list(plan.notes),
    }


def plan_yaml(plan: ServePlan) -> str:
    """Every value that isn't a mere default, as a file that gives the same plan."""
    import yaml

    values = {
        name: value
        for name, value in plan.config.model_dump(mode="json").items()
        if plan.sources[name] != "default"
    }
    return str(yaml.safe_dump(values, sort_keys=False)).rstrip()


def command_line(plan: ServePlan) -> str:
    """One line for a shell; a secret appears as the way to read it."""
    settings = [f"{k}={shlex.quote(v)}" for k, v in plan.launch.environment.items()]
    # Before `env`, so that the shell sets it and it is on no command line.
    secrets = [f"{name}={_shell_read(source)}" for name, source in plan.launch.secrets.items()]
    return " ".join([*secrets, "env", *settings, shlex.join(plan.launch.argv)])


def _shell_read(source: str) -> str:
    if source.startswith("$"):
        return f'"{source}"'
    return f'"$(cat {shlex.quote(str(Path(source)))})"'


def plan_table(plan: ServePlan) -> RenderableType:
    """The plan for a person: what was found, and each value with where it came from."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("setting", "value", "from"):
        table.add_column(column, overflow="fold")
    for name, value in plan.config.model_dump(mode="json").items():
        if value in (None, {}):
            continue
        table.add_row(name, _value_text(value), plan.sources[name])
    engine = plan.engine
    built = f"{engine.distribution or 'vllm'} {engine.version or ''}".strip()
    head = [f"engine   {built}, {engine.device}, {engine.python}"]
    head += [f"GPU {gpu.index}    {gpu.name}" for gpu in plan.gpus]
    head += [f"note     {note}" for note in plan.notes]
    head.append(f"URL      {client_url(plan.config.host, plan.config.port)}/v1")
    fit = plan.report.fit
    verdict = () if fit is None else (fit_text(fit, reasons=False), "")
    return Group(Text("\n".join(head) + "\n"), *verdict, table, "")


def _value_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)
