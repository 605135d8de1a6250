"""When an engine is ready, and whether it still is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gemma_serve.adapters.metrics import read_metrics
from gemma_serve.adapters.openai_api import EndpointError, generate_one_token, is_healthy
from gemma_serve.engine.watch import Health, TokenCounters, Watch

# A first token can wait for kernels to be compiled; the phase's own limit ends the wait.
_FIRST_TOKEN_TIMEOUT_S = 24 * 3600.0


def answer_first(
    url: str,
    model: str,
    api_key: str | None,
    *,
    listens: Callable[[], bool],
    on_listening: Callable[[], None],
    cancelled: threading.Event,
) -> None:
    """Return once our own server has generated a token.

    Args:
        listens: whether it is a process of ours that listens there; somebody else's server may
            answer on this port before ours finds it taken.
        on_listening: called when the server answers and the token is being asked for.

    Raises:
        EndpointError: it answers, but not with a token.
    """
    while not (is_healthy(url) and listens()):
        if cancelled.wait(0.2):
            return
    on_listening()
    generate_one_token(url, model, api_key, _FIRST_TOKEN_TIMEOUT_S)


class HealthWatch:
    """Looks at a ready engine every `interval_s` seconds in a thread of its own."""

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None,
        *,
        interval_s: float,
        deadline_s: float,
        on_health: Callable[[Health], None],
    ) -> None:
        self._url, self._model, self._api_key = url, model, api_key
        self._interval_s = interval_s
        self._on_health = on_health
        self._ended = threading.Event()
        self._watch = Watch(read_counters=self._read, probe=self._probe, deadline_s=deadline_s)
        threading.Thread(target=self._run, daemon=True).start()

    def end(self) -> None:
        """Look no more; what a look that is under way finds is not told."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            health = self._watch.look()
            if not self._ended.is_set():
                self._on_health(health)

    def _read(self) -> TokenCounters | None:
        try:
            metrics = read_metrics(self._url)
        except EndpointError:
            return None
        return TokenCounters(metrics.generation_tokens, metrics.prompt_tokens)

    def _probe(self, deadline_s: float) -> str | None:
        begun = time.monotonic()
        try:
            generate_one_token(self._url, self._model, self._api_key, deadline_s)
        except EndpointError as error:
            late = time.monotonic() - begun >= deadline_s
            return f"no token within {deadline_s:g} s" if late else str(error)
        return None
