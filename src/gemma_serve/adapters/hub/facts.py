"""What a model is, by the Hub: its config.json and the headers of its weight files."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from gemma_serve.adapters.hub.client import (
    TIME_LIMIT_S,
    TokenSource,
    ask_side_by_side,
    find_token,
)
from gemma_serve.adapters.hub.errors import Asked, as_the_hub_would_answer, problem_for
from gemma_serve.errors import Problem
from gemma_serve.planning.model.facts import FactsReading, facts_from_config
from gemma_serve.planning.model.repo_files import weight_names
from gemma_serve.planning.model.weights import HeaderTensor

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

# Headers are asked for side by side: a large model has a dozen files.
_AT_ONCE = 8
_TOKEN_LIMIT_S = 1.0
# What settles that there is no such model, or none that can be served; the rest leaves it open.
_SETTLES = frozenset(
    {"repo-not-found", "hub.revision_not_found", "model.no_config", "weights-truncated"}
)


def offline_problem() -> Problem:
    """The warning that the Hub was left out because HF_HUB_OFFLINE is set."""
    return Problem(
        "hub.offline",
        "HF_HUB_OFFLINE is set, so the Hub was not asked what the model is",
        hint="unset HF_HUB_OFFLINE, or give the model's folder with `--model DIR`",
        blocking=False,
    )


def read_hub(
    model: str, revision: str | None = None, *, time_limit_s: float = TIME_LIMIT_S
) -> FactsReading:
    """The model's facts as the Hub has them, within `time_limit_s`; asked once, never again.

    Fetches config.json and, by range requests, the headers of the weight files; leaves nothing
    on the disk. Problems that settle the matter (no such model, no such revision) are blocking;
    those that leave it open (no network, no access) are not.
    """
    question = {"facts": lambda: _ask(model, revision, time_limit_s)}
    answer = ask_side_by_side(question, time_limit_s)["facts"]
    if isinstance(answer, FactsReading):
        return answer
    # Even that may ask somebody: the client renews some tokens.
    source = ask_side_by_side({"token": find_token}, _TOKEN_LIMIT_S)["token"]
    has_token = isinstance(source, TokenSource) and source.is_sent
    asked = Asked(model, revision, has_token=has_token)
    problem = problem_for(answer, asked)
    return FactsReading(problems=(replace(problem, blocking=problem.code in _SETTLES),))


def _ask(model: str, revision: str | None, time_limit_s: float) -> FactsReading:
    from huggingface_hub import HfApi

    api = HfApi()
    with as_the_hub_would_answer():
        info = api.model_info(model, revision=revision, files_metadata=True, timeout=time_limit_s)
        config = _config(model, info, time_limit_s)
        tensors = _tensors(api, model, info)
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
    from huggingface_hub.errors import HfHubHTTPError, SafetensorsParsingError

    def header(file: str) -> Sequence[HeaderTensor]:
        try:
            # Without a limit of its own, which not every version of the client takes here.
            metadata = api.parse_safetensors_file_metadata(model, file, revision=info.sha)
            return [_tensor(name, entry) for name, entry in metadata.tensors.items()]
        except HfHubHTTPError:
            # That of a status 400 is a ValueError, too.
            raise
        except (struct.error, ValueError, TypeError, LookupError, AttributeError) as error:
            raise SafetensorsParsingError(file) from error

    names = weight_names([file.rfilename for file in info.siblings or ()])
    files = [name for name in names if name.endswith(".safetensors")]
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
