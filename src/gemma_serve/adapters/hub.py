"""The Hugging Face Hub: what a model is, asked before its weights are downloaded."""

from __future__ import annotations

import re
import struct
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from gemma_serve.errors import Problem
from gemma_serve.planning.model.facts import FactsReading, facts_from_config
from gemma_serve.planning.model.weights import HeaderTensor

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

TIME_LIMIT_S = 8.0

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# Headers are asked for side by side: a large model has a dozen files.
_AT_ONCE = 8


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids us to ask the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def offline_problem() -> Problem:
    """The warning that the Hub was left out because HF_HUB_OFFLINE is set."""
    return Problem(
        "hub.offline",
        "HF_HUB_OFFLINE is set, so the Hub was not asked what the model is",
        hint="unset HF_HUB_OFFLINE, or give the model's folder with `--model DIR`",
        blocking=False,
    )


def cached_snapshot(model: str, revision: str | None, cache_dir: Path | None = None) -> Path | None:
    """The folder of the local Hub cache that holds the model's config.json, if any does."""
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    if not (cache / f"models--{model.replace('/', '--')}").is_dir():
        return None  # without the client, whose import takes a tenth of a second
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", cache_dir=cache_dir, revision=revision)
    except HFValidationError:
        return None
    # Neither None nor the mark for "known not to exist" is a path.
    return Path(found).parent if isinstance(found, str) else None


def read_hub(
    model: str,
    revision: str | None = None,
    *,
    headers: bool = True,
    time_limit_s: float = TIME_LIMIT_S,
) -> FactsReading:
    """The model's facts as the Hub has them, within `time_limit_s`; asked once, never again.

    Fetches config.json and, by range requests, the `headers` of the weight files; leaves nothing
    on the disk. Problems that settle the matter (no such model, no such revision) are blocking;
    those that leave it open (no network, no access) are not.
    """
    answers: SimpleQueue[FactsReading] = SimpleQueue()
    # The HTTP client's limits hold for one step each, and none for looking up a name.
    asking = Thread(
        target=lambda: answers.put(_ask(model, revision, time_limit_s, headers=headers)),
        name="hub",
        daemon=True,
    )
    asking.start()
    asking.join(time_limit_s)
    if asking.is_alive():
        return FactsReading(problems=(_unreachable(f"no answer in {time_limit_s:g} s"),))
    return answers.get_nowait()


def _ask(model: str, revision: str | None, time_limit_s: float, *, headers: bool) -> FactsReading:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        info = api.model_info(model, revision=revision, files_metadata=True, timeout=time_limit_s)
        config = _config(model, info, time_limit_s)
        tensors = _tensors(api, model, info) if headers else ()
    except _known_errors() as error:
        return FactsReading(problems=(_explain(error, model, revision),))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        found = "its answer is not the Hub's; a proxy or a login page may be between"
        return FactsReading(problems=(_unreachable(found),))
    return facts_from_config(model, config, source="hub", tensors=tensors)


def _config(model: str, info: ModelInfo, time_limit_s: float) -> Mapping[str, Any]:
    """config.json by a plain request: the client's own download tries again and writes files."""
    from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    url = hf_hub_url(model, "config.json", revision=info.sha)
    response = get_session().get(url, headers=build_hf_headers(), timeout=time_limit_s)
    hf_raise_for_status(response)
    config = response.json()
    if not isinstance(config, dict):
        raise TypeError(model)
    return config


def _tensors(api: HfApi, model: str, info: ModelInfo) -> tuple[HeaderTensor, ...]:
    """The headers of the weight files, by range requests; none where there are no safetensors."""
    from huggingface_hub.errors import SafetensorsParsingError

    def header(file: str) -> Sequence[HeaderTensor]:
        try:
            # Without a limit of its own, which not every version of the client takes here.
            metadata = api.parse_safetensors_file_metadata(model, file, revision=info.sha)
            return [_tensor(name, entry) for name, entry in metadata.tensors.items()]
        except (struct.error, ValueError, TypeError, LookupError, AttributeError) as error:
            raise SafetensorsParsingError(file) from error

    files = _weight_files(info)
    return tuple(tensor for each in _side_by_side(header, files) for tensor in each)


def _tensor(name: str, entry: Any) -> HeaderTensor:
    first, last = entry.data_offsets
    if not 0 <= first <= last:
        raise ValueError(name)
    return HeaderTensor(name, str(entry.dtype), tuple(map(int, entry.shape)), last - first)


def _side_by_side(
    read: Callable[[str], Sequence[HeaderTensor]], files: Sequence[str]
) -> list[Sequence[HeaderTensor]]:
    """What `read` gives for each file, in their order; its first error ends the rest.

    Python waits for the threads of an executor before it ends, even for one that hangs.
    """
    waiting = deque(enumerate(files))
    done: SimpleQueue[tuple[int, Sequence[HeaderTensor] | Exception]] = SimpleQueue()

    def work() -> None:
        while True:
            try:
                index, file = waiting.popleft()
            except IndexError:
                return
            try:
                done.put((index, read(file)))
            except Exception as error:
                waiting.clear()
                done.put((index, error))

    for _ in range(min(_AT_ONCE, len(files))):
        Thread(target=work, name="hub header", daemon=True).start()
    found: dict[int, Sequence[HeaderTensor]] = {}
    while len(found) < len(files):
        index, result = done.get()
        if isinstance(result, Exception):
            raise result
        found[index] = result
    return [found[index] for index in range(len(files))]


def _known_errors() -> tuple[type[Exception], ...]:
    """What the client raises: its own errors, and those of whichever HTTP library it uses."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    transports = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    raised = [getattr(m, name) for m in transports for name in ("HTTPError", "InvalidURL")]
    own = (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, EntryNotFoundError)
    return (*own, SafetensorsParsingError, OSError, *raised)


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
    if isinstance(error, errors.EntryNotFoundError):
        return _no_config(model)
    if isinstance(error, errors.SafetensorsParsingError):
        return _broken(model)
    if isinstance(error, errors.HfHubHTTPError):
        return _http_problem(error.response.status_code)
    return _unreachable(_transport(error))


def _weight_files(info: ModelInfo) -> list[str]:
    """The files that vLLM loads: no copies in another layout, nothing in subfolders."""
    listed = [file.rfilename for file in info.siblings or ()]
    names = [
        name
        for name in listed
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")
    ]
    if "model.safetensors.index.json" in listed:
        names = [name for name in names if _SHARD.fullmatch(name)] or names
    return names


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


def _no_config(model: str) -> Problem:
    return Problem(
        "model.no_config",
        f"{model} has no config.json, which says what kind of model it is",
        hint="vLLM wants a model in transformers' format; a GGUF repository is none",
    )


def _broken(model: str) -> Problem:
    return Problem(
        "model.weights_broken",
        f"a weight file of {model} on the Hub has no readable safetensors header",
        hint="choose another `--revision`, or tell the model's owner",
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
