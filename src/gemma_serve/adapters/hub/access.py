"""Who is asking the Hub, and what it lets them read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

from gemma_serve.adapters.hub.client import (
    TIME_LIMIT_S,
    TokenSource,
    ask_side_by_side,
    endpoint,
    find_token,
)
from gemma_serve.adapters.hub.errors import (
    Asked,
    NotTheHubError,
    as_the_hub_would_answer,
    http_status,
    invalid_token,
    problem_for,
    token_held_back,
    token_lacks_permission,
    unsendable_token,
)
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.errors import Problem
from gemma_serve.planning.model.repo_files import RepoFile, is_inside


@dataclass(frozen=True)
class Token:
    """The token that the Hub was asked with.

    `valid` is None where the Hub did not say. `may_read_gated` is None for tokens that are not
    fine-grained, which may read all that their account may.
    """

    source: str
    is_sent: bool = True
    valid: bool | None = None
    account: str | None = None
    role: str | None = None
    may_read_gated: bool | None = None


@dataclass(frozen=True)
class Repository:
    """A model's repository at one commit, as the Hub lists it to anyone."""

    model: str
    commit: str
    gated: bool
    private: bool
    files: tuple[RepoFile, ...]


@dataclass(frozen=True)
class HubAnswer:
    """What the Hub says of a model to whoever asks now.

    `reached` is False where no answer came that could be the Hub's, None where it wasn't asked.
    `allowed` is whether the files may be read, None where that is not known. `problems` are all
    blocking, each code once.
    """

    endpoint: str
    reached: bool | None = None
    token: Token | None = None
    repository: Repository | None = None
    allowed: bool | None = None
    problems: tuple[Problem, ...] = ()


def ask_access(
    model: str, revision: str | None = None, *, time_limit_s: float = TIME_LIMIT_S
) -> HubAnswer:
    """Ask the Hub for the account, the listing, the licence and one small file, all at once.

    Answers within `time_limit_s` and raises nothing: what goes wrong is a problem.
    """
    where = without_secrets(endpoint())
    begun = monotonic()
    # The client may have to ask for a token, or to renew one.
    source = ask_side_by_side({"token": find_token}, time_limit_s)["token"]
    if isinstance(source, Exception):
        return HubAnswer(where, problems=(problem_for(source, Asked(model)),))
    if source is not None and source.is_sent and not source.can_be_sent:
        kept = Token(source.source, is_sent=False, valid=False)
        return HubAnswer(where, token=kept, problems=(unsendable_token(source.source),))
    left_s = max(1.0, time_limit_s - (monotonic() - begun))
    answers = ask_side_by_side(_questions(model, revision, source, left_s), left_s)
    token = _token(source, answers.get("account"))
    asked = Asked(model, revision, has_token=source is not None and source.is_sent)
    repository = answers["listing"] if isinstance(answers["listing"], Repository) else None
    failed = [answers[name] for name in ("listing", "licence", "file")]
    problems = _told_once([problem_for(e, asked) for e in failed if isinstance(e, Exception)])
    if token is not None and token.valid is False:
        # A mirror may know the files and not the accounts.
        if problems:
            problems = (invalid_token(),)
        else:
            token = replace(token, valid=None)
    if source is not None and not source.is_sent:
        problems = tuple(token_held_back(model) if p.code in _NO_TOKEN else p for p in problems)
    gated = repository is None or repository.gated
    if token is not None and token.may_read_gated is False and gated and _refused(problems):
        problems = (token_lacks_permission(model),)
    read = [answers["licence"], answers["file"]]
    return HubAnswer(
        endpoint=where,
        reached=any(_is_the_hubs(name, answer) for name, answer in answers.items()),
        token=token,
        repository=repository,
        allowed=True if not any(isinstance(a, Exception) for a in read) else _denied(problems),
        problems=problems,
    )


def _questions(
    model: str, revision: str | None, source: TokenSource | None, time_limit_s: float
) -> Mapping[str, Callable[[], object]]:
    questions: dict[str, Callable[[], object]] = {
        "listing": lambda: list_repository(model, revision, time_limit_s=time_limit_s),
        "licence": lambda: _check_licence(model),
        "file": lambda: _read_small_file(model, revision, time_limit_s),
    }
    if source is not None and source.is_sent:
        questions["account"] = _whoami
    return questions


def list_repository(
    model: str, revision: str | None = None, *, time_limit_s: float = TIME_LIMIT_S
) -> Repository:
    """The files of the model at `revision`, with their sizes and checksums. One request.

    Raises:
        Exception: the client's own errors, for `problem_for`.
    """
    from huggingface_hub import HfApi

    with as_the_hub_would_answer():
        api = HfApi()
        info = api.model_info(model, revision=revision, files_metadata=True, timeout=time_limit_s)
        if not isinstance(info.sha, str):
            raise NotTheHubError("no commit")
        listed = info.siblings or []
        if any(file.size is None for file in listed):
            # Mirrors may list names alone.
            files = _tree(api, model, info.sha)
        else:
            files = tuple(_file(f.rfilename, f.size, f.blob_id, f.lfs) for f in listed)
        safe = tuple(file for file in files if is_inside(file.name))
        return Repository(model, info.sha, bool(info.gated), bool(info.private), safe)


def _tree(api: Any, model: str, commit: str) -> tuple[RepoFile, ...]:
    entries = api.list_repo_tree(model, recursive=True, revision=commit)
    return tuple(
        _file(entry.path, entry.size, entry.blob_id, entry.lfs)
        for entry in entries
        if hasattr(entry, "size")
    )


def _file(name: str, size: int | None, blob_id: str | None, lfs: Any) -> RepoFile:
    """LFS files are known by their content, the others by git's name for the blob."""
    sha256 = getattr(lfs, "sha256", None)
    return RepoFile(name, int(size or 0), sha256 or blob_id)


def _check_licence(model: str) -> bool:
    """Ask whether this account may read the files. Mirrors may not know the question."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().auth_check(model)
    except HfHubHTTPError as error:
        is_the_hubs_own = "X-Error-Code" in error.response.headers
        if is_the_hubs_own or http_status(error) not in (404, 405, 501):
            raise
    return True


def _read_small_file(model: str, revision: str | None, time_limit_s: float) -> bool:
    """Read config.json as a download would, since a listing is shown to anyone."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(model, "config.json", revision=revision)
    response = get_session().get(url, headers=build_hf_headers(), timeout=time_limit_s)
    hf_raise_for_status(response)
    with as_the_hub_would_answer():
        if not isinstance(response.json(), dict):
            raise NotTheHubError("config.json is no object")
    return True


def _whoami() -> Mapping[str, Any]:
    from huggingface_hub import HfApi

    with as_the_hub_would_answer():
        return dict(HfApi().whoami())


def _token(source: TokenSource | None, answer: object) -> Token | None:
    if source is None:
        return None
    token = Token(source.source, source.is_sent)
    if isinstance(answer, Exception):
        return replace(token, valid=False if http_status(answer) == 401 else None)
    if not isinstance(answer, Mapping):
        return token
    auth = answer.get("auth")
    access = auth.get("accessToken") if isinstance(auth, Mapping) else None
    access = access if isinstance(access, Mapping) else {}
    fine = access.get("fineGrained")
    reads = fine.get("canReadGatedRepos") if isinstance(fine, Mapping) else None
    name, role = answer.get("name"), access.get("role")
    return replace(
        token,
        valid=True,
        account=name if isinstance(name, str) else None,
        role=role if isinstance(role, str) else None,
        may_read_gated=reads if isinstance(reads, bool) else None,
    )


_PROXY_WANTS_A_PASSWORD = 407

# The more of the others an answer explains, the earlier it stands.
_TELLING = ("hub.invalid_token", "repo-not-found", "offline-cache-miss")


def _told_once(problems: list[Problem]) -> tuple[Problem, ...]:
    """Each code once; alone where it explains the rest."""
    by_code = {problem.code: problem for problem in problems}
    for code in _TELLING:
        if code in by_code:
            return (by_code[code],)
    return tuple(by_code.values())


_NO_TOKEN = frozenset({"gated-no-token", "hub.no_token"})
_REFUSALS = _NO_TOKEN | {"gated-no-licence", "hub.token_lacks_permission", "hub.forbidden"}


def _refused(problems: tuple[Problem, ...]) -> bool:
    return any(problem.code in _REFUSALS for problem in problems)


def _denied(problems: tuple[Problem, ...]) -> bool | None:
    """False where the Hub said no; None where it did not come to that."""
    return False if _refused(problems) else None


def _is_the_hubs(name: str, answer: object) -> bool:
    """Whether the answer, or the refusal, came from the endpoint."""
    if not isinstance(answer, Exception):
        # Of the licence only the status was read, and a login page has the same.
        return name != "licence"
    return http_status(answer) not in (None, _PROXY_WANTS_A_PASSWORD)
