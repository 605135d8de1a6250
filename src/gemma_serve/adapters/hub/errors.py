"""What the Hub's client raises, as problems of ours: one table for both of its majors.

1.x raises httpx's errors and 2.x httpx2's beside its own. A test goes through every error that the
installed ones define, so that a new one is noticed there.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_serve.adapters.hub.client import cache_folder, endpoint
from gemma_serve.adapters.secrets import without_secrets
from gemma_serve.errors import Problem

# What only says that the transport failed, in whichever HTTP library the client uses.
TRANSPORTS = ("httpx", "httpx2")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Asked:
    """What the client was asked for, as far as a sentence about a failure needs it."""

    model: str
    revision: str | None = None
    has_token: bool = False


class WrongContentError(Exception):
    """A file came twice with other bytes than the Hub promises; `found` says how it differs."""

    def __init__(self, file: str, found: str) -> None:
        super().__init__(f"{file}: {found}")
        self.file = file
        self.found = found


class NotTheHubError(Exception):
    """An answer that the Hub would not give: a proxy or a login page may be between."""


def problem_for(error: BaseException, asked: Asked) -> Problem:
    """Our problem for whatever was raised while asking the Hub or storing what it sent.

    All are blocking. What no table knows becomes `hub.failed`.
    """
    told = _cause(error)
    for kind, explain in _table():
        if isinstance(told, kind):
            return explain(told, asked)
    if isinstance(told, OSError):
        return _os_problem(told, asked)
    return Problem(
        "hub.failed",
        f"the Hub's client failed with {type(told).__name__}: {_first_line(told)}",
        hint="try again; if it fails in the same way, `gemma-serve --debug ...` shows where",
    )


@contextmanager
def as_the_hub_would_answer() -> Iterator[None]:
    """Make an answer that can't be read as the Hub's a `NotTheHubError`."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, tuple(kind for kind, _ in _table())):
            raise
        raise NotTheHubError(type(error).__name__) from error


def http_status(error: BaseException) -> int | None:
    """The status of the answer that the error is about, if there was one."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def broken_connections() -> tuple[type[Exception], ...]:
    """What says that the connection broke or fell silent while the answer was coming."""
    names = ("NetworkError", "TimeoutException", "RemoteProtocolError")
    return tuple(getattr(module, name) for module in _transports() for name in names)


def _table() -> Iterator[tuple[type[BaseException], Callable[[Any, Asked], Problem]]]:
    """Errors and what becomes of them; the order matters, since some are kinds of others."""
    from huggingface_hub import errors

    ours: tuple[tuple[str, Callable[[Any, Asked], Problem]], ...] = (
        ("HFValidationError", lambda _, asked: not_found(asked, "is no name of the Hub's")),
        ("HfUriError", lambda _, asked: not_found(asked, "is no name of the Hub's")),
        ("OfflineModeIsEnabled", _not_cached),
        ("LocalTokenNotFoundError", _no_token),
        ("OIDCError", _no_exchange),
        ("DeviceCodeError", _invalid_token),
        ("GatedRepoError", _gated),
        ("DisabledRepoError", _disabled),
        ("RepositoryNotFoundError", _no_repository),
        ("RevisionNotFoundError", _no_revision),
        ("RevisionResolutionError", _not_cached),
        ("RemoteEntryNotFoundError", _no_entry),
        ("SafetensorsParsingError", _broken),
        ("NotASafetensorsRepoError", _broken),
        ("HfHubHTTPError", _http_problem),
        ("FileMetadataError", _not_the_hub),
        ("XetDownloadError", _unreachable),
        ("XetError", _unreachable),
        ("CachedRepoTreeNotFoundError", _not_cached),
        ("CacheNotFound", _not_cached),
        ("CorruptedCacheException", _corrupt_cache),
        ("LocalEntryNotFoundError", _not_cached),
        ("EntryNotFoundError", _no_entry),
    )
    for name, explain in ours:
        kind = getattr(errors, name, None)
        if kind is not None:
            yield kind, explain
    yield WrongContentError, _wrong_content
    yield NotTheHubError, _not_the_hub
    for module in _transports():
        # The token or the address has what no header or URL can hold.
        yield module.LocalProtocolError, _invalid_token
        yield module.InvalidURL, _unreachable
        yield module.HTTPError, _unreachable
        yield module.StreamError, _unreachable
    yield UnicodeEncodeError, _invalid_token


def _transports() -> list[Any]:
    return [sys.modules[name] for name in TRANSPORTS if name in sys.modules]


def _cause(error: BaseException) -> BaseException:
    """What lies under the client's "not in the local cache either"."""
    from huggingface_hub import errors

    # 1.0 has the first alone.
    names = ("LocalEntryNotFoundError", "RevisionResolutionError")
    kinds = tuple(getattr(errors, name) for name in names if hasattr(errors, name))
    while isinstance(error, kinds) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _os_problem(error: OSError, asked: Asked) -> Problem:
    if error.errno in _NO_SPACE:
        where = f" for {error.filename}" if error.filename else ""
        return Problem(
            "disk-full",
            f"the disk has no room left{where}: {error.strerror}; what came so far is kept",
            hint="free some space and run the same command again: it goes on where it stopped",
        )
    # The network's errors name no file.
    if error.errno in _NO_RIGHTS or error.filename is not None:
        return Problem(
            "hub.cache_unwritable",
            f"cannot write {error.filename or 'the local cache'}: {error.strerror}",
            hint="name a folder of yours with HF_HOME, `--download-dir` or `--to`",
        )
    return _unreachable(error, asked)


def not_found(asked: Asked, found: str) -> Problem:
    """There is no such model, as far as the Hub lets us know."""
    private = "" if asked.has_token else "; if it is private, run `hf auth login` or set HF_TOKEN"
    return Problem(
        "repo-not-found",
        f"`{asked.model}` {found}; the name of a model there, or a folder, is wanted",
        hint=f"check the spelling: `gemma-serve models` lists the public Gemmas{private}",
    )


def _no_repository(error: Any, asked: Asked) -> Problem:
    if asked.has_token and http_status(error) == 401:
        # The client takes any 401 for this; to those with a valid token the Hub says 404.
        return invalid_token()
    if asked.has_token:
        return not_found(asked, "is not on the Hub, or is private to others than this account")
    return not_found(asked, "is not on the Hub, or is private")


def offline_missing(model: str, cache: Path) -> Problem:
    """The Hub may not be asked, and the model is not here."""
    return Problem(
        "offline-cache-miss",
        f"HF_HUB_OFFLINE is set, and the local cache {cache} does not hold {model} whole",
        hint="check HF_HOME, unset HF_HUB_OFFLINE, or where there is a network run "
        f"`gemma-serve download --model {model} --to DIR`, and bring DIR here for `--model DIR`",
    )


def _not_cached(error: Any, asked: Asked) -> Problem:
    return offline_missing(asked.model, cache_folder())


def _no_revision(error: Any, asked: Asked) -> Problem:
    return Problem(
        "hub.revision_not_found",
        f"{asked.model} has no revision `{asked.revision or 'main'}`; a branch, a tag or a commit "
        "of it is wanted",
        hint="leave `--revision` out to take the newest",
    )


def _no_entry(error: Any, asked: Asked) -> Problem:
    return Problem(
        "model.no_config",
        f"{asked.model} has no config.json, which says what kind of model it is",
        hint="vLLM wants a model in transformers' format; a GGUF repository is none",
    )


def _broken(error: Any, asked: Asked) -> Problem:
    return Problem(
        "weights-truncated",
        f"a weight file of {asked.model} on the Hub has no readable safetensors header",
        hint="choose another `--revision`, or tell the model's owner",
    )


def _corrupt_cache(error: Any, asked: Asked) -> Problem:
    return Problem(
        "hub.cache_corrupt",
        f"the local cache is not as the Hub's client left it: {_first_line(error)}",
        hint=f"remove the model's folder there, then `gemma-serve download --model {asked.model}`",
    )


def _wrong_content(error: WrongContentError, asked: Asked) -> Problem:
    return Problem(
        "hub.wrong_content",
        f"{error.file} of {asked.model} came twice from {_shown_endpoint()} and is not what was "
        f"promised: {error.found}",
        hint="a proxy or a mirror may alter it: check HTTPS_PROXY and HF_ENDPOINT, and try again",
    )


def no_token(model: str) -> Problem:
    """The model is gated, and nobody has signed in."""
    return Problem(
        "gated-no-token",
        f"{model} is gated, and no token is found to ask for it with",
        hint=f"accept the licence at https://huggingface.co/{model}, then run `hf auth login` or "
        "set HF_TOKEN",
    )


def token_held_back(model: str) -> Problem:
    """A token is there, and the client was told to keep it."""
    return Problem(
        "gated-no-token",
        f"{model} is gated, and HF_HUB_DISABLE_IMPLICIT_TOKEN keeps your token from being sent",
        hint="unset HF_HUB_DISABLE_IMPLICIT_TOKEN",
    )


def _no_exchange(error: Any, asked: Asked) -> Problem:
    return Problem(
        "hub.no_token",
        f"HF_OIDC_RESOURCE is set, and no token was given in exchange: {_first_line(error)}",
        hint="see that this job may ask for an OIDC token, or unset HF_OIDC_RESOURCE and set "
        "HF_TOKEN",
    )


def _no_token(error: Any, asked: Asked) -> Problem:
    return no_token(asked.model)


def _gated(error: Any, asked: Asked) -> Problem:
    if not asked.has_token:
        return no_token(asked.model)
    if "awaiting" in str(error):
        return Problem(
            "gated-no-licence",
            f"the request of this account for {asked.model} still awaits an answer of its owner",
            hint=f"see https://huggingface.co/{asked.model} for its state",
        )
    return Problem(
        "gated-no-licence",
        f"the account of this token has not accepted the licence of {asked.model}",
        hint=f"accept it at https://huggingface.co/{asked.model} with that very account; it holds "
        "at once, no new token is needed",
    )


def token_lacks_permission(model: str) -> Problem:
    """The token is valid, but made for less than this."""
    return Problem(
        "hub.token_lacks_permission",
        f"the token may not read gated repositories, and {model} is one",
        hint="at https://huggingface.co/settings/tokens, give this fine-grained token `Read access "
        "to contents of all public gated repos you can access`",
    )


def _disabled(error: Any, asked: Asked) -> Problem:
    return Problem(
        "hub.forbidden",
        f"the Hub has disabled access to {asked.model}",
        hint=f"see https://huggingface.co/{asked.model} for the reason",
    )


def invalid_token() -> Problem:
    """The Hub does not know the token."""
    return Problem(
        "hub.invalid_token",
        f"{_shown_endpoint()} does not take the token that it was given; a valid one is wanted",
        hint="make one at https://huggingface.co/settings/tokens, then `hf auth login` or set "
        "HF_TOKEN; with HF_TOKEN unset, public models need none",
    )


def unsendable_token(source: str) -> Problem:
    """The token is none that any Hub gives out."""
    return Problem(
        "hub.invalid_token",
        f"the token from {source} holds a character that no token has, such as a space or an "
        "accent, so it was not sent",
        hint="copy it again from https://huggingface.co/settings/tokens, or run `hf auth login`",
    )


def _invalid_token(error: Any, asked: Asked) -> Problem:
    return invalid_token()


def _http_problem(error: Any, asked: Asked) -> Problem:
    status = http_status(error) or 0
    headers = error.response.headers
    if status == 401:
        return invalid_token() if asked.has_token else _wants_a_token(asked)
    if status == 403:
        # The error's own text quotes the address, and that may hold any word.
        told = headers.get("X-Error-Message", "")
        if asked.has_token and ("fine-grained" in told or "gated" in told):
            return token_lacks_permission(asked.model)
        return Problem(
            "hub.forbidden",
            f"the Hub refuses {asked.model} to this account (HTTP 403)",
            hint=f"see whether https://huggingface.co/{asked.model} opens with that account",
        )
    if status == 404:
        # The Hub itself says what it lacks; others just don't have it.
        missing = not_found(asked, f"is not at {_shown_endpoint()} (HTTP 404)")
        return replace(missing, hint=f"see that HF_ENDPOINT is a Hub; {missing.hint}")
    if status == 429:
        wait = headers.get("Retry-After", "")
        pause = f"; it wants a pause of {wait} s" if wait.isdecimal() else ""
        more = (
            ""
            if asked.has_token
            else "; with a token (`hf auth login` or HF_TOKEN) more is allowed"
        )
        return Problem(
            "hub.rate_limited",
            f"{_shown_endpoint()} was asked too often from here (HTTP 429){pause}",
            hint=f"wait and try again{more}",
        )
    if status >= 500:
        return Problem(
            "hub.server_error",
            f"{_shown_endpoint()} answers HTTP {status}: the fault is on its side",
            hint="try again later, see https://status.huggingface.co, or use a mirror with "
            "HF_ENDPOINT",
        )
    return _unreachable(error, asked, f"it answers HTTP {status}")


def _wants_a_token(asked: Asked) -> Problem:
    return Problem(
        "hub.no_token",
        f"{_shown_endpoint()} wants a token for {asked.model} (HTTP 401), and none was sent",
        hint="run `hf auth login` or set HF_TOKEN",
    )


def _not_the_hub(error: Any, asked: Asked) -> Problem:
    found = "its answer is not the Hub's; a proxy or a login page may be between"
    return _unreachable(error, asked, found)


def _unreachable(error: BaseException, asked: Asked, found: str = "") -> Problem:
    where = _shown_endpoint()
    hint = (
        "check the network, HTTPS_PROXY and HF_ENDPOINT, or give the model's folder with "
        "`--model DIR`"
    )
    if "://" not in where:
        hint = f"HF_ENDPOINT is `{where}`: put http:// or https:// in front"
    return Problem(
        "hub.unreachable",
        f"the Hub at {where} could not be asked: {found or _first_line(error)}",
        hint=hint,
    )


def stalled(still_s: float) -> Problem:
    """The connection stands, and nothing comes."""
    return Problem(
        "hub.unreachable",
        f"nothing came from {_shown_endpoint()} for {still_s:.0f} s; what came before is kept",
        hint="run the same command again: it goes on from there; where a mirror needs longer, set "
        "HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
    )


def _shown_endpoint() -> str:
    return without_secrets(endpoint())


def _first_line(error: BaseException) -> str:
    text = without_secrets(str(error)).strip().splitlines()
    return text[0] if text else type(error).__name__
