"""A start as events, by an injected clock."""

from gemma_serve.engine.timeline import SILENCE_S, Overdue
from gemma_serve.usecases.events import PhaseBegan, PhaseProgress, Silent
from gemma_serve.usecases.start_progress import StartProgress

SHARDS = "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:00<00:00, 3.7it/s]"


def test_a_phase_is_told_before_how_far_it_is():
    progress = StartProgress(100.0)
    assert progress.begun() == PhaseBegan("imports", 0.0)
    assert progress.read([SHARDS, "nothing that is known"], 107.0) == [
        PhaseBegan("weights", 7.0),
        PhaseProgress("weights", "50 %"),
    ]
    assert progress.read([SHARDS], 108.0) == []


def test_the_first_token_is_told_once_and_ends_with_ready():
    progress = StartProgress(0.0)
    assert progress.listening(5.0) == [PhaseBegan("first token", 5.0)]
    assert progress.listening(6.0) == []
    assert progress.end(7.5) == {"imports": 5.0, "first token": 2.5}
    assert progress.phases == (PhaseBegan("imports", 0.0), PhaseBegan("first token", 5.0))


def test_silence_is_told_again_only_after_as_much_silence_more():
    progress = StartProgress(0.0)
    assert progress.silence(SILENCE_S - 1) == []
    assert progress.silence(SILENCE_S) == [Silent("imports", SILENCE_S)]
    assert progress.silence(SILENCE_S + 1) == []
    assert progress.silence(2 * SILENCE_S) == [Silent("imports", 2 * SILENCE_S)]
    progress.read(["a word"], 100.0)
    assert progress.silence(100.0 + SILENCE_S - 1) == []
    assert progress.silence(100.0 + SILENCE_S) == [Silent("imports", SILENCE_S)]


def test_a_clock_that_stands_still_or_is_read_late_changes_no_phase():
    progress = StartProgress(50.0)
    assert progress.overdue(50.0, {"imports": 10}) is None
    assert progress.overdue(61.0, {"imports": 10}) == Overdue("imports", 11.0, 10)
