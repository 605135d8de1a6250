"""How the Hub's client is set up on this machine: endpoint, cache, token, offline mode."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

# For all that is asked before anything starts.
TIME_LIMIT_S = 8.0


@dataclass(frozen=True)
class TokenSource:
    """A token was found; where ("HF_TOKEN", a file). The token itself is not kept.

    `is_sent` is False where HF_HUB_DISABLE_IMPLICIT_TOKEN keeps the client from sending it,
    `can_be_sent` where it holds what no header can.
    """

    source: str
    is_sent: bool = True
    can_be_sent: bool = True


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids us to ask the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def endpoint() -> str:
    """The Hub that is asked: HF_ENDPOINT, or huggingface.co."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def download_timeout_s() -> tuple[float, float]:
    """For how long nothing may come: before a file's first byte, and once some have come.

    HF_HUB_DOWNLOAD_TIMEOUT is how long the client waits for one answer; it then tries again.
    """
    from huggingface_hub import constants

    one = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return one + 1, max(60.0, 2 * one)


def cache_folder(cache_dir: Path | None = None) -> Path:
    """The folder of the local cache: `cache_dir`, or where HF_HOME and HF_HUB_CACHE put it."""
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()


def find_token() -> TokenSource | None:
    """Where the client takes a token from, if it has one.

    Raises:
        Exception: the client's own, where it must ask for a token and is refused.
    """
    from huggingface_hub import constants, get_token

    token = get_token()
    if not token:
        return None
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    named = next((name for name in names if os.environ.get(name, "").strip()), None)
    source = named or (str(constants.HF_TOKEN_PATH) if _has_file() else "the client's own sign-in")
    return TokenSource(
        source,
        is_sent=not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN,
        can_be_sent=token.isascii() and token.isprintable() and " " not in token,
    )


def set_up_for_downloads() -> None:
    """Keep the client from drawing bars and writing warnings of its own: we show what happens.

    And make it write what came every 256 KiB; by default it loses up to 10 MiB when it is cut off.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"huggingface_hub(\..*)?")
    disable_progress_bars()
    constants.DOWNLOAD_CHUNK_SIZE = 256 * 2**10


def ask_side_by_side(
    questions: Mapping[str, Callable[[], T]], time_limit_s: float
) -> dict[str, T | Exception]:
    """What each of the `questions` gives, or raises; TimeoutError where time ran out.

    In threads that nobody waits for: the HTTP client's limits hold for one step each, and none
    for looking up a name.
    """
    from huggingface_hub import get_session

    answers: SimpleQueue[tuple[str, T | Exception]] = SimpleQueue()
    # What fails here fails for each question, too.
    with suppress(Exception):
        # For all of them: at once, 1.0 would make several and close none.
        get_session()

    def ask(name: str, question: Callable[[], T]) -> None:
        try:
            answers.put((name, question()))
        except Exception as error:
            answers.put((name, error))

    for name, question in questions.items():
        threading.Thread(target=ask, args=(name, question), name="hub", daemon=True).start()
    found: dict[str, T | Exception] = {}
    deadline = monotonic() + time_limit_s
    while len(found) < len(questions):
        try:
            name, answer = answers.get(timeout=max(0.0, deadline - monotonic()))
        except Empty:
            late = TimeoutError(f"no answer in {time_limit_s:.0f} s")
            return {**dict.fromkeys(questions, late), **found}
        found[name] = answer
    return found


def _has_file() -> bool:
    from huggingface_hub import constants

    path = Path(constants.HF_TOKEN_PATH)
    try:
        return bool(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return False
