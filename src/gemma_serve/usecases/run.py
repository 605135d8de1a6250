"""One run of a deployment: everything that its supervisor needs, as it is kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gemma_serve.adapters.state import DeploymentFolder
from gemma_serve.planning.config import client_url, deployment_name, phase_limits_s
from gemma_serve.usecases.plan import ServePlan


@dataclass(frozen=True)
class Run:
    """What is run and how it is looked after.

    `settings` are the values that somebody gave (with their field names), so that `restart` can
    decide the rest anew. Of an API key only the place is kept. Times are in seconds.
    """

    name: str
    model: str
    served_model_name: str
    has_chat: bool
    host: str
    port: int
    engine: str
    gpus: tuple[str, ...]
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    key_source: str | None
    api_key_file: Path | None
    settings: Mapping[str, Any]
    detached: bool
    force: bool
    restart: Literal["no", "on-failure"]
    drain_timeout: float
    shutdown_timeout: float
    probe_interval: float
    probe_deadline: float
    phase_limits_s: Mapping[str, float]
    cache_dir: Path | None

    @property
    def url(self) -> str:
        """Where clients on this machine reach it."""
        return client_url(self.host, self.port)

    @property
    def max_num_seqs(self) -> int | None:
        """How many requests the engine takes at once, where it was told."""
        pairs = zip(self.argv, self.argv[1:], strict=False)
        given = [value for flag, value in pairs if flag == "--max-num-seqs"]
        return int(given[-1]) if given and given[-1].isdigit() else None

    @property
    def longest_drain_s(self) -> float:
        """How long a stop can let requests in flight go on: vLLM knows no longer one."""
        return max(self.shutdown_timeout, self.drain_timeout)


def run_of(plan: ServePlan, *, detached: bool, force: bool = False) -> Run:
    """The run that `plan` decided on."""
    config = plan.config
    dumped = config.model_dump(mode="json")
    given = {
        name: value
        for name, value in dumped.items()
        if plan.sources[name].startswith(("flag", "environment", "file"))
    }
    # The same model, name and port again, also where they were chosen for the person.
    given |= {"model": config.model, "name": name_of(plan), "port": config.port}
    return Run(
        name=name_of(plan),
        model=config.model,
        served_model_name=plan.model.served_name,
        has_chat=plan.model.has_chat,
        host=config.host,
        port=config.port,
        engine=f"{plan.engine.distribution or 'vLLM'} {plan.engine.version or ''}".strip(),
        gpus=tuple(gpu.uuid for gpu in plan.gpus),
        argv=plan.launch.argv,
        environment=dict(plan.launch.environment),
        key_source=plan.launch.secrets.get("VLLM_API_KEY"),
        api_key_file=config.api_key_file,
        settings=given,
        detached=detached,
        force=force,
        restart=config.restart or ("on-failure" if detached else "no"),
        drain_timeout=float(config.drain_timeout),
        shutdown_timeout=float(config.shutdown_timeout),
        probe_interval=config.probe_interval,
        probe_deadline=config.probe_deadline,
        phase_limits_s=phase_limits_s(config),
        cache_dir=config.cache_dir,
    )


def name_of(plan: ServePlan) -> str:
    """The deployment's name: the one that was given, else the model's."""
    return plan.config.name or deployment_name(plan.model.served_name)


def write_run(run: Run) -> dict[str, Any]:
    """The run as JSON; it holds no secret."""
    return asdict(run)


def read_run(value: Mapping[str, Any]) -> Run:
    """What `write_run` wrote.

    Raises:
        TypeError, KeyError: it is another version's.
    """
    known = {field.name: value[field.name] for field in fields(Run)}
    for name in ("gpus", "argv"):
        known[name] = tuple(known[name])
    for name in ("api_key_file", "cache_dir"):
        known[name] = None if known[name] is None else Path(known[name])
    return Run(**known)


def kept_run(folder: DeploymentFolder) -> Run | None:
    """How the deployment of `folder` was last run; None where that can't be read."""
    try:
        return read_run(folder.read_json(folder.run) or {})
    except (TypeError, KeyError):
        return None
