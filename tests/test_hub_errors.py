"""Every error that the installed client of the Hub can raise is told in a sentence of its own."""

from __future__ import annotations

import errno
import importlib
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import errors, hf_raise_for_status

import local_hub
from gemma_serve.adapters.hub.errors import (
    TRANSPORTS,
    Asked,
    NotTheHubError,
    WrongContentError,
    problem_for,
)
from gemma_serve.errors import Problem

MODEL = "google/gemma-7b-it"
URL = f"https://huggingface.co/api/models/{MODEL}"
TOKEN = "hf_0123456789abcdefghij"
ANONYMOUS, SIGNED_IN = Asked(MODEL), Asked(MODEL, has_token=True)

# What becomes of each error of `huggingface_hub.errors` when it is raised for somebody without a
# token. A name that stands neither here nor below is new: decide what users are to be told.
HUB_CODES = {
    "CacheNotFound": "offline-cache-miss",
    "CachedRepoTreeNotFoundError": "offline-cache-miss",
    "IncompleteSnapshotError": "offline-cache-miss",
    "LocalEntryNotFoundError": "offline-cache-miss",
    "OfflineModeIsEnabled": "offline-cache-miss",
    "RevisionResolutionError": "offline-cache-miss",
    "CorruptedCacheException": "hub.cache_corrupt",
    "HFValidationError": "repo-not-found",
    "HfUriError": "repo-not-found",
    "RepositoryNotFoundError": "repo-not-found",
    "RevisionNotFoundError": "hub.revision_not_found",
    "GatedRepoError": "gated-no-token",
    "LocalTokenNotFoundError": "gated-no-token",
    "OIDCError": "hub.no_token",
    "DeviceCodeError": "hub.invalid_token",
    "XetError": "hub.unreachable",
    "XetAuthorizationError": "hub.unreachable",
    "XetRefreshTokenError": "hub.unreachable",
    "DisabledRepoError": "hub.forbidden",
    "EntryNotFoundError": "model.no_config",
    "RemoteEntryNotFoundError": "model.no_config",
    "NotASafetensorsRepoError": "weights-truncated",
    "SafetensorsParsingError": "weights-truncated",
    "BadRequestError": "hub.unreachable",
    "FileMetadataError": "hub.unreachable",
    "XetDownloadError": "hub.unreachable",
    "HfHubHTTPError": "hub.server_error",
}
_INFERENCE = "raised by the inference client alone"
_DDUF = "raised by the readers and writers of DDUF files alone"
_DATACLASS = "raised by strict dataclasses, which we have none of"
_CLI = "raised by the `hf` program alone"
NOT_RAISED = {
    "InferenceTimeoutError": _INFERENCE,
    "InferenceEndpointError": _INFERENCE,
    "InferenceEndpointTimeoutError": _INFERENCE,
    "TextGenerationError": _INFERENCE,
    "ValidationError": _INFERENCE,
    "GenerationError": _INFERENCE,
    "OverloadedError": _INFERENCE,
    "IncompleteGenerationError": _INFERENCE,
    "UnknownError": _INFERENCE,
    "DDUFError": _DDUF,
    "DDUFCorruptedFileError": _DDUF,
    "DDUFExportError": _DDUF,
    "DDUFInvalidEntryNameError": _DDUF,
    "StrictDataclassError": _DATACLASS,
    "StrictDataclassDefinitionError": _DATACLASS,
    "StrictDataclassFieldValidationError": _DATACLASS,
    "StrictDataclassClassValidationError": _DATACLASS,
    "CLIError": _CLI,
    "ConfirmationError": _CLI,
    "CLIExtensionInstallError": _CLI,
    "BucketNotFoundError": "we use no buckets",
    "BucketBatchError": "we use no buckets",
    "JobNotFoundError": "we start no jobs",
    "SandboxError": "we start no sandboxes",
    "SandboxCommandError": "we start no sandboxes",
    "FileDuplicationError": "we upload nothing",
    "DryRunError": "we ask for no dry run",
}
TRANSPORT_CODES = {
    "LocalProtocolError": "hub.invalid_token",
    **dict.fromkeys(
        (
            "HTTPError",
            "HTTPStatusError",
            "RequestError",
            "TransportError",
            "TimeoutException",
            "ConnectTimeout",
            "ReadTimeout",
            "WriteTimeout",
            "PoolTimeout",
            "NetworkError",
            "ReadError",
            "WriteError",
            "ConnectError",
            "CloseError",
            "ProxyError",
            "UnsupportedProtocol",
            "ProtocolError",
            "RemoteProtocolError",
            "DecodingError",
            "TooManyRedirects",
            "InvalidURL",
            "StreamError",
            "StreamConsumed",
            "StreamClosed",
            "ResponseNotRead",
            "RequestNotRead",
        ),
        "hub.unreachable",
    ),
}
TRANSPORT_NOT_RAISED = {
    "CookieConflict": "raised where a cookie is looked up by name",
    "HTTPXDeprecationWarning": "a warning",
    "SSEError": "raised for streams of events, which the Hub is asked for none of",
}


def transport() -> ModuleType:
    """The HTTP library of the installed client."""
    return importlib.import_module(errors.HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


TRANSPORT = transport()


def answer(status: int, url: str = URL, **headers: str) -> Any:
    """An answer of the Hub, as the installed client gets it; `a_b` is the header "a-b"."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return TRANSPORT.Response(status, headers=named, request=TRANSPORT.Request("GET", url))


def refusal(status: int, **headers: str) -> BaseException:
    """What the client raises for such an answer."""
    with pytest.raises(errors.HfHubHTTPError) as caught:
        hf_raise_for_status(answer(status, **headers))
    return caught.value


def exceptions_of(module: ModuleType) -> Iterator[type[Exception]]:
    """The exceptions that a module is the home of."""
    for kind in vars(module).values():
        own = inspect.isclass(kind) and kind.__module__.partition(".")[0] == module.__name__
        if own and issubclass(kind, Exception):
            yield kind


def hub_errors() -> list[type[Exception]]:
    own = [kind for kind in vars(errors).values() if inspect.isclass(kind)]
    return [k for k in own if issubclass(k, Exception) and k.__module__ == errors.__name__]


def made(kind: type[Exception], said: str = "said") -> Exception:
    """An exception of this kind, whatever it wants to be made of."""
    statuses = {"BadRequestError": 400, "GatedRepoError": 403, "HfHubHTTPError": 500}
    known: dict[str, Any] = {
        "response": answer(statuses.get(kind.__name__, 404)),
        "request": answer(200).request,
    }
    _, *parameters = inspect.signature(kind.__init__).parameters.values()
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    wanted = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if not wanted and takes_any:
        return kind(said)
    return kind(**{p.name: known.get(p.name, said) for p in wanted})


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with local_hub.alone(monkeypatch, tmp_path):
        yield


def test_no_error_of_the_client_is_new() -> None:
    unknown = {kind.__name__ for kind in hub_errors()} - {*HUB_CODES, *NOT_RAISED}
    assert unknown == set(), "decide what users are told, then add them to one of the tables"
    assert not {*HUB_CODES} & {*NOT_RAISED}


@pytest.mark.parametrize(
    "kind",
    [kind for kind in hub_errors() if kind.__name__ not in NOT_RAISED],
    ids=lambda kind: kind.__name__,
)
def test_an_error_of_the_client_has_a_code_of_its_own(kind: type[Exception]) -> None:
    assert problem_for(made(kind), ANONYMOUS).code == HUB_CODES.get(kind.__name__, "missing here")


@pytest.mark.parametrize("name", [name for name in TRANSPORTS if find_spec(name)])
def test_the_errors_of_each_http_library_have_codes_of_their_own(name: str) -> None:
    kinds = list(exceptions_of(importlib.import_module(name)))
    raised = [kind for kind in kinds if kind.__name__ not in TRANSPORT_NOT_RAISED]
    found = {kind.__name__: problem_for(made(kind), ANONYMOUS).code for kind in raised}
    assert found == TRANSPORT_CODES


def test_what_nobody_has_heard_of_is_told_all_the_same() -> None:
    class BrandNewError(Exception):
        pass

    assert problem_for(BrandNewError("first\nsecond"), ANONYMOUS) == Problem(
        "hub.failed",
        "the Hub's client failed with BrandNewError: first",
        "try again; if it fails in the same way, `gemma-serve --debug ...` shows where",
    )


@pytest.mark.parametrize(
    ("number", "file", "code"),
    [
        (errno.ENOSPC, "/d/x", "disk-full"),
        (errno.EDQUOT, "/d/x", "disk-full"),
        (errno.EFBIG, "/d/x", "disk-full"),
        (errno.ENOSPC, None, "disk-full"),
        (errno.EACCES, "/d/x", "hub.cache_unwritable"),
        (errno.EPERM, "/d/x", "hub.cache_unwritable"),
        (errno.EROFS, "/d/x", "hub.cache_unwritable"),
        (errno.EROFS, None, "hub.cache_unwritable"),
        (errno.ENOTDIR, "/d/x", "hub.cache_unwritable"),
        (errno.ECONNREFUSED, None, "hub.unreachable"),
        (errno.ENETUNREACH, None, "hub.unreachable"),
        (errno.ETIMEDOUT, None, "hub.unreachable"),
    ],
)
def test_what_the_system_refuses(number: int, file: str | None, code: str) -> None:
    error = OSError(number, "reason") if file is None else OSError(number, "reason", file)
    problem = problem_for(error, ANONYMOUS)
    assert (problem.code, problem.blocking) == (code, True)
    assert "reason" in problem.message
    assert file is None or file in problem.message


def test_a_full_disk_keeps_what_came() -> None:
    assert problem_for(OSError(errno.ENOSPC, "No space left on device", "/d/x"), ANONYMOUS) == (
        Problem(
            "disk-full",
            "the disk has no room left for /d/x: No space left on device; what came so far is kept",
            "free some space and run the same command again: it goes on where it stopped",
        )
    )


def test_no_answer_in_time() -> None:
    problem = problem_for(TimeoutError("no answer in 8 s"), ANONYMOUS)
    assert (problem.code, "no answer in 8 s" in problem.message) == ("hub.unreachable", True)


@pytest.mark.parametrize(
    ("status", "headers", "asked", "code", "told"),
    [
        (401, {}, ANONYMOUS, "repo-not-found", "is private"),
        (401, {}, SIGNED_IN, "hub.invalid_token", "does not take the token"),
        (401, {"X_Error_Code": "RepoNotFound"}, ANONYMOUS, "repo-not-found", "is private"),
        (401, {"X_Error_Code": "GatedRepo"}, ANONYMOUS, "gated-no-token", "is gated"),
        (
            401,
            {"X_Error_Message": "Invalid credentials in Authorization header"},
            SIGNED_IN,
            "hub.invalid_token",
            "does not take the token",
        ),
        (403, {}, SIGNED_IN, "hub.forbidden", "HTTP 403"),
        (403, {"X_Error_Code": "GatedRepo"}, SIGNED_IN, "gated-no-licence", "licence of"),
        (
            403,
            {
                "X_Error_Code": "GatedRepo",
                "X_Error_Message": "Your request to access model x is awaiting a review.",
            },
            SIGNED_IN,
            "gated-no-licence",
            "still awaits",
        ),
        (
            403,
            {"X_Error_Message": "Please enable access to public gated repositories in your "
             "fine-grained token settings to view this repository."},
            SIGNED_IN,
            "hub.token_lacks_permission",
            "may not read gated",
        ),
        (
            403,
            {"X_Error_Message": "Access to this resource is disabled."},
            SIGNED_IN,
            "hub.forbidden",
            "disabled",
        ),
        (404, {}, SIGNED_IN, "repo-not-found", "HTTP 404"),
        (404, {"X_Error_Code": "RepoNotFound"}, SIGNED_IN, "repo-not-found", "this account"),
        (404, {"X_Error_Code": "RevisionNotFound"}, ANONYMOUS, "hub.revision_not_found", "`main`"),
        (404, {"X_Error_Code": "EntryNotFound"}, ANONYMOUS, "model.no_config", "config.json"),
        (400, {}, ANONYMOUS, "hub.unreachable", "HTTP 400"),
        (407, {}, ANONYMOUS, "hub.unreachable", "HTTP 407"),
        (429, {}, ANONYMOUS, "hub.rate_limited", "(HTTP 429)"),
        (429, {"Retry_After": "17"}, ANONYMOUS, "hub.rate_limited", "wants a pause of 17 s"),
        (500, {}, ANONYMOUS, "hub.server_error", "HTTP 500"),
        (502, {}, ANONYMOUS, "hub.server_error", "HTTP 502"),
        (503, {"Retry_After": "5"}, ANONYMOUS, "hub.server_error", "HTTP 503"),
        (504, {}, ANONYMOUS, "hub.server_error", "HTTP 504"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no(
    status: int, headers: dict[str, str], asked: Asked, code: str, told: str
) -> None:
    problem = problem_for(refusal(status, **headers), asked)
    assert (problem.code, problem.blocking) == (code, True)
    assert told in problem.message
    assert problem.hint


def test_a_name_that_holds_gated_is_no_gate() -> None:
    """The error's text quotes the address."""
    url = "https://huggingface.co/api/models/google/fine-grained-gated"
    with pytest.raises(errors.HfHubHTTPError) as caught:
        hf_raise_for_status(answer(403, url))
    assert "gated" in str(caught.value)
    asked = Asked("google/fine-grained-gated", has_token=True)
    assert problem_for(caught.value, asked).code == "hub.forbidden"


def test_without_a_token_none_lacks_a_permission() -> None:
    told = "Please enable access to public gated repositories in your fine-grained token settings"
    assert problem_for(refusal(403, X_Error_Message=told), ANONYMOUS).code == "hub.forbidden"


@pytest.mark.parametrize("asked", [ANONYMOUS, SIGNED_IN])
def test_who_has_a_token_is_not_told_to_get_one(asked: Asked) -> None:
    hint = problem_for(refusal(429), asked).hint
    assert hint == (
        "wait and try again"
        if asked.has_token
        else "wait and try again; with a token (`hf auth login` or HF_TOKEN) more is allowed"
    )


@pytest.mark.skipif(not hasattr(errors, "OIDCError"), reason="this client exchanges no tokens")
def test_an_exchange_that_gave_no_token_is_told_as_one() -> None:
    problem = problem_for(made(errors.OIDCError, "no id token\nmore"), ANONYMOUS)
    assert problem == Problem(
        "hub.no_token",
        "HF_OIDC_RESOURCE is set, and no token was given in exchange: no id token",
        "see that this job may ask for an OIDC token, or unset HF_OIDC_RESOURCE and set HF_TOKEN",
    )


def test_a_pause_that_is_no_number_is_left_out() -> None:
    problem = problem_for(
        refusal(429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT"), Asked(MODEL, has_token=True)
    )
    assert problem.message.endswith("was asked too often from here (HTTP 429)")


@pytest.mark.parametrize(
    ("cause", "code"),
    [
        (TRANSPORT.ConnectError("refused"), "hub.unreachable"),
        (TRANSPORT.ReadTimeout("slow"), "hub.unreachable"),
        (errors.OfflineModeIsEnabled("offline"), "offline-cache-miss"),
        (OSError(errno.ENOSPC, "full"), "disk-full"),
        (errors.HfHubHTTPError("no", response=answer(429)), "hub.rate_limited"),
        (errors.GatedRepoError("no", response=answer(403)), "gated-no-token"),
        (WrongContentError("model.safetensors", "other bytes"), "hub.wrong_content"),
        (NotTheHubError("html"), "hub.unreachable"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize(
    "kind",
    [
        k
        for k in hub_errors()
        if k.__name__ in ("LocalEntryNotFoundError", "RevisionResolutionError")
    ],
)
def test_what_lies_under_not_being_in_the_cache_is_told(
    kind: type[Exception], cause: Exception, code: str
) -> None:
    outer = kind("not here")
    inner = errors.LocalEntryNotFoundError("not here either")
    outer.__cause__, inner.__cause__ = inner, cause
    assert problem_for(outer, ANONYMOUS) == problem_for(cause, ANONYMOUS)
    assert problem_for(cause, ANONYMOUS).code == code


def test_without_a_cause_the_cache_lacks_it() -> None:
    assert problem_for(errors.LocalEntryNotFoundError("x"), ANONYMOUS).code == "offline-cache-miss"


@pytest.mark.parametrize("known", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "file", "nowhere"])
def test_no_message_holds_the_token(
    known: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What is known as a secret goes whatever it looks like, the rest by its form.
    token = TOKEN if known == "nowhere" else "a-token.of/an0ther_kind"
    if known == "file":
        (tmp_path / "token").write_text(token + "\n")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    elif known != "nowhere":
        monkeypatch.setenv(known, token)
    said = f"Illegal header value b'Bearer {token}' for https://me:{token}@hub.example/x"
    raised = [kind for kind in hub_errors() if kind.__name__ not in NOT_RAISED]
    for module in (importlib.import_module(name) for name in TRANSPORTS if find_spec(name)):
        raised += [k for k in exceptions_of(module) if k.__name__ not in TRANSPORT_NOT_RAISED]
    faults: list[Exception] = [made(kind, said) for kind in raised]
    faults += [OSError(said), OSError(errno.EIO, said), ValueError(said), Exception(said)]
    for fault in faults:
        for asked in (ANONYMOUS, SIGNED_IN):
            assert token not in repr(problem_for(fault, asked)), type(fault)
