"""Who may download what, as a table for people and as data for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_serve.planning.sizes import file_size
from gemma_serve.usecases.access import AccessReport
from gemma_serve.usecases.local_files import LocalFiles

if TYPE_CHECKING:
    from rich.console import RenderableType


def access_data(report: AccessReport) -> dict[str, Any]:
    """The report for `--json`; sizes in bytes. The token is told by where it was found."""
    token, repository, disk = report.token, report.repository, report.disk
    return {
        "model": report.model,
        "revision": report.revision,
        "commit": repository.commit if repository else None,
        "endpoint": report.endpoint,
        "offline": report.offline,
        "reached": report.reached,
        "token": None
        if token is None
        else {
            "source": token.source,
            "is_sent": token.is_sent,
            "valid": token.valid,
            "account": token.account,
            "role": token.role,
            "may_read_gated": token.may_read_gated,
        },
        "gated": repository.gated if repository else None,
        "private": repository.private if repository else None,
        "allowed": report.allowed,
        "files": None
        if repository is None
        else {
            "count": len(report.files),
            "total_bytes": report.total_bytes,
            "here_bytes": report.here_bytes,
        },
        "cached": None
        if report.cached is None
        else {
            "folder": str(report.cached.folder),
            "commit": report.cached.commit,
            "is_known_whole": report.cached.is_known_whole,
        },
        "disk": None
        if disk is None
        else {
            "folder": str(disk.folder),
            "free_bytes": disk.free_bytes,
            "missing_bytes": disk.missing_bytes,
            "needed_bytes": disk.needed_bytes,
        },
    }


def access_text(report: AccessReport) -> RenderableType:
    """The report for people: one row for each question that was asked."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, found in _rows(report):
        table.add_row(Text(name, style="bold"), Text(found))
    return table


def access_summary(model: str, access: AccessReport | None) -> str:
    """Who may read the files, in a few words; None is where nobody need be asked."""
    if access is None:
        return "not needed: the files are here, and whole"
    if access.offline:
        return "not asked: HF_HUB_OFFLINE is set"
    if access.reached is False:
        return f"{access.endpoint} gave no answer"
    if access.allowed is not True:
        return f"{access.endpoint} does not let {model} be read"
    who = "anyone" if access.token is None else access.token.account or "this token"
    return f"{who} may read {model} at {access.endpoint}"


def disk_summary(access: AccessReport | None) -> str:
    """How much is to come and how much room there is."""
    if access is None or access.is_folder:
        return "nothing to download"
    if access.disk is None:
        whole = access.cached is not None
        return "nothing to download" if whole else "unknown how much is to be downloaded"
    disk = access.disk
    free = "unknown" if disk.free_bytes is None else file_size(disk.free_bytes)
    missing = f"{file_size(disk.missing_bytes)} to download" if disk.missing_bytes else ""
    return f"{missing or 'nothing to download'}, {free} free in {disk.folder}"


def _rows(report: AccessReport) -> list[tuple[str, str]]:
    if report.is_folder:
        return [("model", f"{report.model} is on this machine; nobody need be asked")]
    rows = [("model", report.model), ("endpoint", _endpoint(report))]
    if not report.offline:
        rows += [("token", _token(report)), ("licence", _licence(report))]
    rows.append(("files", _files(report)))
    rows.append(("cache", _cache(report)))
    if not report.offline:
        rows.append(("disk", disk_summary(report)))
    return rows


def _endpoint(report: AccessReport) -> str:
    if report.offline:
        return f"{report.endpoint}, not asked: HF_HUB_OFFLINE is set"
    reached = {True: "reached", False: "not reached", None: "not asked"}
    return f"{report.endpoint}, {reached[report.reached]}"


def _token(report: AccessReport) -> str:
    token = report.token
    if token is None:
        return "none"
    if token.valid is False and not token.is_sent:
        return f"from {token.source}, not sent: it holds what no token has"
    if not token.is_sent:
        return f"from {token.source}, not sent: HF_HUB_DISABLE_IMPLICIT_TOKEN is set"
    if token.valid is None:
        return f"from {token.source}; the Hub did not say whether it is valid"
    if not token.valid:
        return f"from {token.source}, not valid"
    gated = {True: ", may read gated repositories", False: ", may not read gated repositories"}
    reads = "" if token.may_read_gated is None else gated[token.may_read_gated]
    role = f" ({token.role}{reads})" if token.role else ""
    return f"from {token.source}, of {token.account or 'an account without a name'}{role}"


def _licence(report: AccessReport) -> str:
    if report.repository is None and report.allowed is None:
        return "unknown"
    if report.allowed is None:
        return "could not be asked"
    gated = report.repository is not None and report.repository.gated
    if report.allowed:
        return "accepted" if gated else "the files are open to this account"
    if report.token is None:
        return "to be accepted, and asked for with a token" if gated else "a token is needed"
    return "not accepted by this account" if gated else "the files are not open to this account"


def _cached_text(report: AccessReport, cached: LocalFiles) -> str:
    newer = report.repository is not None and report.repository.commit != cached.commit
    older = ", which is not the newest" if newer else ""
    checked = "whole" if cached.is_known_whole else "not compared with its checksums yet"
    return f"holds the model at commit {(cached.commit or '')[:12]}{older}, {checked}"


def _files(report: AccessReport) -> str:
    if report.repository is None:
        return "unknown"
    commit = report.repository.commit[:12]
    return (
        f"{len(report.files)} that vLLM needs, {file_size(report.total_bytes)}, at commit {commit}"
    )


def _cache(report: AccessReport) -> str:
    if report.cached is not None:
        return _cached_text(report, report.cached)
    if report.repository is None:
        return "does not hold the model whole"
    return (
        f"holds {file_size(report.here_bytes)} of it" if report.here_bytes else "holds none of it"
    )
