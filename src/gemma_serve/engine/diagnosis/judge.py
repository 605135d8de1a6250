"""From what was seen in a log to the one root cause of it all."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemma_serve.engine.diagnosis.diagnosis import Also, Diagnosis, Ending
from gemma_serve.engine.diagnosis.run import Run
from gemma_serve.engine.diagnosis.sightings import Sighting, Strength
from gemma_serve.engine.diagnosis.text import Place
from gemma_serve.engine.diagnosis.tracebacks import BROKEN_OFF, Raised
from gemma_serve.planning.failures import (
    Failure,
    FailureCatalogue,
    Kind,
    Numbers,
    Rank,
    without_whitespace,
)

_MOST_EVIDENCE = 6
_LONGEST_CAUSE = 300
# So many of its messages are read for numbers.
_MOST_READ = 4
# In squeezed bytes: as long as one message is.
_NEAR_THE_END = 600
# How an engine ends that was told to, or whose other half is gone: never why.
_NO_CAUSE = ("KeyboardInterrupt", "SystemExit", "CancelledError", "EngineDeadError",
             "BrokenPipeError", "EOFError")  # fmt: skip
# Where multiprocessing tidies up after processes that are gone.
_CLEANING = "resource_tracker.py"
# After this long without a line, a start that says no more hangs, or is downloading.
_SILENT_S = 40.0


_QUIET_LINE = re.compile(r"\b(?:DEBUG|INFO|WARNING):? +(?:\d\d-\d\d |\S)")
_ERROR_LINE = re.compile(
    r"\berror: |[a-z]Error\b|\bERROR\b|\bAborted\b|\bTerminated\b|"
    r"command not found|No module named|exec format error|Unable to find image"
)
# A shell's word for a process that got SIGKILL: "Killed", "bash: line 1: 77 Killed vllm serve x".
_KILLED = re.compile(r"(?:\S+: line \d+: +\d+ )?Killed\b.*")
# The last that is heard of a start whose weights are being downloaded.
_LOADS = re.compile(r"Starting to load model|Waiting for \d+ local, \d+ remote core engine proc")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_INSIDE = ("(EngineCore", "(Worker", "(VllmWorker")
_SILENT_FIX = (
    "if the engine still runs it is loading or hangs; if not it was killed from outside: "
    "`dmesg` tells whether the kernel did that for memory"
)


# As vLLM begins its lines, and where its warnings come from.
_ENGINES_LINE = re.compile(
    r"^\(\w+ pid=\d+\)|/vllm/\S+\.py|(?:INFO|WARNING|ERROR) \d\d-\d\d \d\d:\d\d:\d\d "
)
_BOTH_STREAMS = "give the engine's whole log, with both of its streams: `2>&1`"


@dataclass(frozen=True)
class _Judge:
    """One run and all that is known of it."""

    run: Run
    sightings: Sequence[Sighting]
    raised: Sequence[Raised]
    catalogue: FailureCatalogue
    ending: Ending
    numbers: Numbers

    def verdict(self) -> Diagnosis | None:
        """What this run says; None for one that has not come to any end."""
        if failure := self._failure():
            return self._known(self._by_kernel(failure))
        if self.ending.signum is not None or self.ending.lost is not None:
            return self._known(self._by_kernel(self.catalogue["engine-killed"]))
        if self.ending.generates_nothing:
            return self._known(self.catalogue["alive-but-dead"])
        if failure := self._choose(("cause", "symptom"), ("request",), Strength.MENTIONED):
            return self._known(failure)
        if self._failed():
            return self._unknown()
        if self.run.ready is not None:
            return _healthy("no failure: it was ready")
        if self.run.stop is not None:
            return _healthy("no failure: it was stopped while it was starting")
        return self._silent()

    def _failure(self) -> Failure | None:
        """The failure that ended the start, or the engine."""
        # A ready engine that lives on has refused a request with the words of a failed start.
        lives = self.run.ready is not None and not self._died() and not self.ending.is_known
        kinds: tuple[Kind, ...] = ("death",) if lives else ("start", "death")
        if found := self._choose(("cause",), kinds, Strength.PRINTED):
            return found
        innermost = self._innermost()
        # What was only printed before says less than what was raised in the end.
        tells = innermost is None and self._failed()
        least = Strength.PRINTED if tells else Strength.RAISED
        if found := self._choose(("symptom",), kinds, least):
            return found
        if innermost is not None:
            return None
        if self.run.last is not None and _KILLED.fullmatch(self.run.last.text):
            return self.catalogue["engine-killed"]
        if not self._failed():
            return self._repeated()
        if self._died() and self.run.is_whole and not self._breaks_off():
            # A process that ended without an error of its own was ended.
            return self.catalogue["engine-killed"]
        return self._choose(("notice",), kinds, Strength.MENTIONED)

    def _repeated(self) -> Failure | None:
        """A notice that came again and again, and last: then it is no notice any more."""
        if self.run.last is None or self.run.ready is not None or not self.sightings:
            return None
        last = self.sightings[-1]
        if last.part.times is None or self.run.end - last.position > _NEAR_THE_END:
            return None
        times = sum(one.part is last.part for one in self.sightings)
        return last.failure if times >= last.part.times else None

    def _choose(
        self, ranks: Sequence[Rank], kinds: Sequence[Kind], least: Strength
    ) -> Failure | None:
        """Of the failures that were seen like this: what was raised first, else printed first."""
        found = [
            one
            for one in self.sightings
            if one.part.rank in ranks and one.failure.kind in kinds and one.strength >= least
        ]
        if not found:
            return None
        best = min(found, key=lambda one: (-one.strength, one.position)).failure
        seen = {one.failure.id for one in self.sightings if one.strength >= least}
        while deeper := next((id_ for id_ in best.yields_to if id_ in seen), None):
            seen.discard(best.id)
            best = self.catalogue[deeper]
        return best

    def _known(self, failure: Failure) -> Diagnosis:
        own = [one for one in self.sightings if one.failure.id == failure.id]
        own.sort(key=lambda one: (-one.strength, one.position))
        numbers: dict[str, str] = {}
        for one in own[:_MOST_READ]:
            numbers = {**failure.find_numbers(one.passage), **numbers}
        if failure.kind == "death":
            numbers = {**numbers, **self._of_the_end()}
        words = failure.explain({**self.numbers, **failure.with_derived(numbers)})
        return Diagnosis(
            "known",
            failure.id,
            failure.title,
            words.cause,
            words.fix,
            words.command,
            words.change,
            failure.remedy,
            _evidence(own),
            self._also(failure),
        )

    def _also(self, failure: Failure) -> tuple[Also, ...]:
        found: dict[str, Also] = {}
        for one in self.sightings:
            other = one.failure
            telling = one.part.rank == "cause" and one.strength >= Strength.PRINTED
            if telling and other.id != failure.id and one.places:
                found.setdefault(other.id, Also(other.id, other.title, one.places[0].line))
        return tuple(found.values())

    def _by_kernel(self, failure: Failure) -> Failure:
        """The same, or that the kernel did it for memory, which no log tells."""
        sent = self.ending.signum in (None, signal.SIGKILL) and self.ending.is_known
        if failure.id == "engine-killed" and self.ending.out_of_memory and sent:
            return self.catalogue["host-oom"]
        return failure

    def _of_the_end(self) -> dict[str, str]:
        """No text can tell that a process was killed from outside; how it ended does."""
        found = {}
        if self.ending.signum is not None:
            found["signal"] = str(self.ending.signum)
        if self.ending.lost is not None:
            found["process"] = self.ending.lost
        return found

    def _died(self) -> bool:
        """Whether a ready engine is known to have ended by itself."""
        wrapped = any(
            one.strength >= Strength.PRINTED and (one.part.rank == "wrapper" or _is_death(one))
            for one in self.sightings
        )
        return wrapped or any(one.type.endswith("EngineDeadError") for one in self.raised)

    def _failed(self) -> bool:
        """Whether something went wrong that no entry of the catalogue names."""
        if self.run.ready is not None:
            return self._died() or bool(self.ending.code and self.run.stop is None)
        if self._died() or self._innermost() is not None or self.ending.code:
            return True
        return self._ends_in_error()

    def _ends_in_error(self) -> bool:
        last = self.run.last
        if last is None or _QUIET_LINE.search(last.text):
            return False
        if any(name in last.text for name in _NO_CAUSE):
            return False
        return bool(_ERROR_LINE.search(last.text))

    def _innermost(self) -> Raised | None:
        """The exception that the others follow from, or hide."""
        telling = [one for one in self.raised if self._tells(one)]
        if self.run.ready is not None:
            inside = [one for one in telling if one.process.startswith(_INSIDE)]
            telling = inside or telling
        if not telling:
            return None
        found = telling[0]
        for one in telling[1:]:
            # "raise A from B" names its cause; what else is raised meanwhile says more than what
            # was being handled.
            if one.process != found.process:
                continue
            if one.follows != "while":
                break
            found = one
        return found

    def _tells(self, raised: Raised) -> bool:
        if raised.level in ("DEBUG", "INFO", "WARNING"):
            return False
        if raised.type.rpartition(".")[2] in _NO_CAUSE or raised.place.startswith(_CLEANING):
            return False
        if raised.type == BROKEN_OFF:
            return False
        said = without_whitespace(raised.message)
        return not any(
            part.rank == "wrapper" and part.text in said
            for failure in self.catalogue.failures
            for part in failure.parts
        )

    def _breaks_off(self) -> bool:
        """Whether an exception is missing in the log, whose traceback has begun."""
        return any(one.type == BROKEN_OFF for one in self.raised)

    def _unknown(self) -> Diagnosis:
        raised = self._innermost()
        if raised is not None:
            where = f" ({raised.place})" if raised.place else ""
            place = Place(raised.line, str(raised))
            return _not_in_catalogue(f"{raised}{where}", (place,))
        if wrapped := [one for one in self.sightings if one.part.rank == "wrapper"]:
            words = self.catalogue["wrapper"].explain(self.numbers)
            return replace(_not_in_catalogue(words.cause, _evidence(wrapped)), fix=words.fix)
        if self._breaks_off():
            place = Place(self.raised[-1].line, "Traceback (most recent call last):")
            cause = "the log breaks off in a traceback, before the exception"
            return replace(_not_in_catalogue(cause, (place,)), fix=_BOTH_STREAMS)
        last = self.run.last
        if last is not None and self._ends_in_error():
            return _not_in_catalogue(last.text, (last,))
        return _ended_without_a_word(self.ending)

    def _silent(self) -> Diagnosis | None:
        """A start that says nothing any more, if it is one."""
        silent_s = self.ending.silent_s
        if self.run.last is None:
            return None
        model = self.run.model or self.numbers.get("model", "")
        if _LOADS.search(self.run.last.text) and _HUB_NAME.fullmatch(model):
            return replace(
                self._known(self.catalogue["download-silent"]), evidence=(self.run.last,)
            )
        if silent_s is None or silent_s < _SILENT_S:
            return None
        minutes = f"{silent_s / 60:.0f} minutes"
        cause = f"the log ends in the middle of a start, {minutes} ago, without an error"
        return replace(_not_in_catalogue(cause, (self.run.last,)), fix=_SILENT_FIX)


def _is_death(sighting: Sighting) -> bool:
    return sighting.part.rank == "symptom" and sighting.failure.kind == "death"


def judge(
    run: Run,
    before: Run | None,
    catalogue: FailureCatalogue,
    ending: Ending,
    known: Numbers,
) -> Diagnosis:
    """The verdict on the last run of a log, or where that says nothing yet, on the one before."""
    found = _judged(run, catalogue, ending, known)
    if found is not None and ending.is_known and not found.found_failure and run.stop is None:
        found = _ended_without_a_word(ending)
    if found is not None and found.id != "download-silent":
        return found
    # What has only begun again says less than why the last try failed.
    earlier = None if before is None else _judged(before, catalogue, Ending(), known)
    if earlier is not None and earlier.found_failure:
        return earlier
    if found is not None:
        return found
    if run.is_engines or (run.last is not None and _ENGINES_LINE.search(run.last.text)):
        return _healthy("no failure so far: the log ends during a start")
    if run.last is None:
        return Diagnosis("unknown", None, "the log is empty", fix=_BOTH_STREAMS)
    return Diagnosis("unknown", None, "no vLLM wrote this log", fix=_BOTH_STREAMS)


def _judged(
    run: Run, catalogue: FailureCatalogue, ending: Ending, known: Numbers
) -> Diagnosis | None:
    numbers = dict(known) if run.model is None else {"model": run.model, **known}
    if model := numbers.get("model"):
        numbers["hub_model" if _HUB_NAME.fullmatch(model) else "model_folder"] = model
    sightings, raised = run.sightings(), run.raised()
    if run.ready is not None:
        # What went wrong before it was ready did not keep it from that.
        sightings = [one for one in sightings if one.position > run.ready]
        raised = [one for one in raised if one.position > run.ready]
    return _Judge(run, sightings, raised, catalogue, ending, numbers).verdict()


def _ended_without_a_word(ending: Ending) -> Diagnosis:
    code = "" if ending.code is None else f" with exit code {ending.code}"
    return _not_in_catalogue(f"the engine ended{code}, and no error is in its log", ())


def _healthy(title: str) -> Diagnosis:
    return Diagnosis("healthy", None, title)


def _not_in_catalogue(cause: str, evidence: tuple[Place, ...]) -> Diagnosis:
    return Diagnosis(
        "unknown",
        None,
        "a failure that gemma-serve does not know",
        cause if len(cause) <= _LONGEST_CAUSE else f"{cause[:_LONGEST_CAUSE]} ...",
        f"line {evidence[0].line} of the log and those above it say more" if evidence else "",
        evidence=evidence,
    )


def _evidence(sightings: Sequence[Sighting]) -> tuple[Place, ...]:
    """The lines that show it, the most telling first ones in the order of the log."""
    places: dict[int, Place] = {}
    for one in sightings:
        if len(places) + len(one.places) > _MOST_EVIDENCE:
            break
        for place in one.places:
            if place.text not in {other.text for other in places.values()}:
                places.setdefault(place.line, place)
    return tuple(places[line] for line in sorted(places))
