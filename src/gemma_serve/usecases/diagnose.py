"""What went wrong, from a log or from a deployment that failed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from gemma_serve.adapters.package_data import load_failures
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.adapters.state import Deployment, DeploymentFolder, all_deployments
from gemma_serve.engine.diagnosis.diagnoser import Diagnoser
from gemma_serve.engine.diagnosis.diagnosis import Also, Diagnosis, Ending
from gemma_serve.engine.diagnosis.text import Place
from gemma_serve.engine.log_file import rotated
from gemma_serve.errors import GemmaServeError, UsageError
from gemma_serve.planning.failures import Change, Numbers
from gemma_serve.usecases.deployments import find_deployment

_PER_READ = 2**20


@dataclass(frozen=True)
class DiagnosisReport:
    """A diagnosis and whose log it is of: a path, "standard input", or a deployment's.

    `started_at` is when that run was started (seconds since 1970), for a deployment.
    """

    source: str
    diagnosis: Diagnosis
    deployment: str | None = None
    started_at: float | None = None


def diagnose_file(path: Path) -> DiagnosisReport:
    """Diagnose the log at `path`, as far as it is written by now.

    Raises:
        UsageError: it can't be read.
    """
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            # Not beyond a file's present end: it may grow as fast as it is read.
            size = state.st_size if stat.S_ISREG(state.st_mode) else None
            return DiagnosisReport(str(path), diagnose(_pieces(file, size)))
    except OSError as error:
        raise UsageError(
            f"cannot read the log {path}: {error.strerror or error}",
            code="diagnose.unreadable",
            hint="name a file, `-` for standard input, or a deployment with `--name`",
        ) from None


def diagnose_stream(stream: BinaryIO) -> DiagnosisReport:
    """Diagnose what is written to `stream` until its end."""
    return DiagnosisReport("standard input", diagnose(_pieces(stream, None)))


def diagnose_deployment(name: str | None, environ: Mapping[str, str]) -> DiagnosisReport:
    """Diagnose the last start of a deployment, running or not; by default of the newest.

    Raises:
        GemmaServeError: there is no such deployment, or it has no log.
    """
    if name is None and (known := all_deployments(environ)):
        name = max(known, key=lambda one: one.changed_at).name
    deployment = find_deployment(name, environ).deployment
    folder = DeploymentFolder(deployment.folder)
    if not folder.log.exists():
        raise GemmaServeError(
            f"{deployment.name} has no log at {folder.log}",
            code="logs.missing",
            hint=f"`gemma-serve status {deployment.name}` says what became of it",
        )
    ending = _kept_ending(folder) if deployment.state == "failed" else None
    if deployment.state == "unhealthy":
        ending = Ending(generates_nothing=True)
    found = diagnose_run(folder, deployment, ending)
    return DiagnosisReport(str(folder.log), found, deployment.name, deployment.started_at)


def diagnose_run(
    folder: DeploymentFolder, deployment: Deployment, ending: Ending | None
) -> Diagnosis:
    """Diagnose what the engine has printed since its last start; `ending` says how it ended."""
    files = _files_since(folder.log, deployment.started_at)
    known = {"model": deployment.model, "deployment": deployment.name}
    if port := urlsplit(deployment.url).port:
        known["port"] = str(port)
    return diagnose(_all_pieces(files), ending, known=known)


def diagnose(
    pieces: Iterable[bytes], ending: Ending | None = None, *, known: Numbers | None = None
) -> Diagnosis:
    """Diagnose a log that comes in pieces; `ending` and `known` as `Diagnoser.finish` has them."""
    diagnoser = Diagnoser(load_failures())
    for piece in pieces:
        diagnoser.feed(piece)
    return _without_secrets(diagnoser.finish(ending, known=known))


def _without_secrets(found: Diagnosis) -> Diagnosis:
    """A log may quote a token, and a diagnosis is shown, kept and passed on."""
    evidence = tuple(replace(one, text=without_secrets(one.text)) for one in found.evidence)
    return replace(
        found,
        cause=without_secrets(found.cause),
        fix=without_secrets(found.fix),
        command=without_secrets(found.command),
        evidence=evidence,
    )


def keep_diagnosis(folder: DeploymentFolder, diagnosis: Diagnosis, ending: Ending) -> None:
    """Keep why the last start failed, for `status` and `diagnose`.

    Raises:
        UsageError: it can't be written.
    """
    value = {"ending": asdict(ending), "diagnosis": asdict(diagnosis)}
    folder.write_json(folder.diagnosis, value)


def kept_diagnosis(folder: DeploymentFolder) -> Diagnosis | None:
    """What `keep_diagnosis` kept; None where there is none that can be read."""
    try:
        return read_diagnosis((folder.read_json(folder.diagnosis) or {})["diagnosis"])
    except (KeyError, TypeError):
        return None


def read_diagnosis(value: Mapping[str, Any]) -> Diagnosis:
    """A diagnosis from its fields as JSON.

    Raises:
        KeyError, TypeError: they are another version's.
    """
    change = value["change"]
    return Diagnosis(
        **{
            **value,
            "change": None if change is None else Change(**change),
            "evidence": tuple(Place(**place) for place in value["evidence"]),
            "also": tuple(Also(**other) for other in value["also"]),
        }
    )


def _kept_ending(folder: DeploymentFolder) -> Ending | None:
    try:
        return Ending(**(folder.read_json(folder.diagnosis) or {})["ending"])
    except (KeyError, TypeError):
        return None


def _files_since(log: Path, started_at: float) -> Sequence[Path]:
    """The log, after the parts of it that were written since then and rotated away."""
    found = [log]
    for age in count(1):
        older = rotated(log, age)
        try:
            if older.stat().st_mtime < started_at:
                break
        except OSError:
            break
        found.insert(0, older)
    return found


def _all_pieces(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        # One may be rotated away meanwhile; then the rest still tells something.
        with suppress(OSError), path.open("rb") as file:
            yield from _pieces(file, None)


def _pieces(file: BinaryIO, size: int | None) -> Iterator[bytes]:
    """What is in `file`, up to `size` bytes."""
    left = size
    while left is None or left > 0:
        data = file.read(_PER_READ if left is None else min(_PER_READ, left))
        if not data:
            return
        if left is not None:
            left -= len(data)
        yield data
