"""The Hugging Face Hub: how large a model is, asked before anything is downloaded."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from gemma_serve.errors import Problem
from gemma_serve.planning.checkpoint import (
    DTYPE_NAMES,
    Checkpoint,
    CheckpointReading,
    checkpoint_from_config,
    gemma_problem,
)

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

TIME_LIMIT_S = 5.0

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids us to ask the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def offline_problem() -> Problem:
    """The warning that the Hub was left out because HF_HUB_OFFLINE is set."""
    return Problem(
        "hub.offline",
        "HF_HUB_OFFLINE is set, so the Hub was not asked for the size of the model",
        hint="unset HF_HUB_OFFLINE, or give the model's folder with `--model DIR`",
        blocking=False,
    )


def cached_snapshot(model: str, revision: str | None, cache_dir: Path | None = None) -> Path | None:
    """The folder of the local Hub cache that holds the model's config.json, if any does."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", cache_dir=cache_dir, revision=revision)
    except HFValidationError:
        return None
    # Neither None nor the mark for "known not to exist" is a path.
    return Path(found).parent if isinstance(found, str) else None


def read_hub(
    model: str, revision: str | None = None, *, time_limit_s: float = TIME_LIMIT_S
) -> CheckpointReading:
    """The model's facts as the Hub lists them, within `time_limit_s`; asked once, never again.

    Problems that settle the matter (no such model, no such revision) are blocking; those that
    leave it open (no network, no access) are not.
    """
    answers: SimpleQueue[ModelInfo | Problem] = SimpleQueue()
    # The HTTP client's limits hold for one step each, and none for looking up a name.
    asking = Thread(
        target=lambda: answers.put(_ask(model, revision, time_limit_s)),
        name="hub",
        daemon=True,
    )
    asking.start()
    asking.join(time_limit_s)
    if asking.is_alive():
        return CheckpointReading(problems=(_unreachable(f"no answer in {time_limit_s:g} s"),))
    answer = answers.get_nowait()
    if isinstance(answer, Problem):
        return CheckpointReading(problems=(answer,))
    checkpoint = _checkpoint(model, answer)
    other = gemma_problem(checkpoint)
    return CheckpointReading(checkpoint, (other,) if other else ())


def _ask(model: str, revision: str | None, time_limit_s: float) -> ModelInfo | Problem:
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(
            model, revision=revision, files_metadata=True, timeout=time_limit_s
        )
    except _known_errors() as error:
        return _explain(error, model, revision)
    except (ValueError, KeyError, TypeError):
        return _unreachable("its answer is not the Hub's; a proxy or a login page may be between")


def _known_errors() -> tuple[type[Exception], ...]:
    """What the client raises: its own errors, and those of whichever HTTP library it uses."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    transports = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    raised = [getattr(m, name) for m in transports for name in ("HTTPError", "InvalidURL")]
    return (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError, *raised)


def _explain(error: Exception, model: str, revision: str | None) -> Problem:
    """Our problem for the client's error; the order matters, since some are kinds of others."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return _not_found(model, "is not a name that the Hub could have")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline_problem()
    if isinstance(error, errors.GatedRepoError):
        return _gated(model)
    if isinstance(error, errors.RepositoryNotFoundError):
        return _not_found(model, "is not on the Hub, or is private")
    if isinstance(error, errors.RevisionNotFoundError):
        return _no_revision(model, revision)
    if isinstance(error, errors.HfHubHTTPError):
        return _http_problem(error.response.status_code)
    return _unreachable(_transport(error))


def _checkpoint(model: str, info: ModelInfo) -> Checkpoint:
    config: dict[str, Any] = info.config or {}
    checkpoint = checkpoint_from_config(
        model, config, source="hub", weights_bytes=_weights_bytes(info)
    )
    parameters = info.safetensors.parameters if info.safetensors else {}
    if checkpoint.dtype is None and parameters:
        commonest = max(parameters, key=lambda name: parameters[name])
        checkpoint = replace(checkpoint, dtype=DTYPE_NAMES.get(commonest))
    return checkpoint


def _weights_bytes(info: ModelInfo) -> int | None:
    """The files that vLLM loads: no copies in another layout, nothing in subfolders."""
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    names = [
        name
        for name in sizes
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
    ]
    if "model.safetensors.index.json" in sizes:
        names = [name for name in names if _SHARD.fullmatch(name)] or names
    total = 0
    for name in names:
        size = sizes[name]
        if size is None:
            return None
        total += size
    return total or None


def _not_found(model: str, found: str) -> Problem:
    return Problem(
        "model.not_found",
        f"`{model}` {found}; a Gemma such as google/gemma-7b-it, or a folder, is wanted",
        hint="check the spelling; if it is private, run `hf auth login` or set HF_TOKEN",
    )


def _no_revision(model: str, revision: str | None) -> Problem:
    return Problem(
        "model.revision_not_found",
        f"{model} has no revision `{revision}`; a branch, a tag or a commit of it is wanted",
        hint="leave `--revision` out to take the newest",
    )


def _gated(model: str) -> Problem:
    return Problem(
        "hub.gated",
        f"the Hub shows {model} only to those who accepted its licence, and knows no such account "
        "of yours",
        hint=f"accept it at https://huggingface.co/{model}, then run `hf auth login` or set "
        "HF_TOKEN",
        blocking=False,
    )


def _http_problem(status: int) -> Problem:
    if status in (401, 403):
        return Problem(
            "hub.denied",
            f"the Hub refuses the token it was given (HTTP {status}); a valid one is wanted",
            hint="run `hf auth login`, or unset HF_TOKEN: public models need none",
            blocking=False,
        )
    return _unreachable(f"it answers HTTP {status}")


def _unreachable(found: str) -> Problem:
    from huggingface_hub import constants

    return Problem(
        "hub.unreachable",
        f"the Hub at {_without_secrets(constants.ENDPOINT)} could not be asked: "
        f"{_without_secrets(found)}",
        hint="check the network, HTTPS_PROXY and HF_ENDPOINT, or give the model's folder with "
        "`--model DIR`",
        blocking=False,
    )


def _transport(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _without_secrets(text: str) -> str:
    """HTTP libraries quote a header that they refuse, and addresses may hold passwords."""
    text = re.sub(r"//[^/@\s]+@", "//", text)
    return re.sub(r"(Bearer\s+|hf_)[^\s'\"]+", "[secret]", text)
