"""What a problem is about, by its code; failures of the catalogue don't say it in their ids."""

from __future__ import annotations

from typing import Literal

Topic = Literal["config", "engine", "model", "hub", "disk", "gpu", "plan", "port"]

_OF_FAILURES: dict[Topic, tuple[str, ...]] = {
    "engine": ("flag-unknown", "python-headers", "shm-small"),
    "model": (
        "arch-unsupported",
        "fp16-refused",
        "tokenizer-missing",
        "weights-missing",
        "weights-truncated",
    ),
    "hub": ("gated-no-licence", "gated-no-token", "offline-cache-miss", "repo-not-found"),
    "disk": ("disk-full", "hub.cache_unwritable"),
    "gpu": (
        "bf16-unsupported",
        "driver-too-old",
        "gpu-busy",
        "no-gpu-visible",
        "tp-too-big",
        "visible-devices",
    ),
    "plan": (
        "cpu-memory-busy",
        "kv-none",
        "kv-too-small",
        "len-over-derived",
        "mm-batch-too-small",
        "no-kernel-image",
        "quant-capability",
        "tp-heads",
        "weights-oom",
    ),
    "port": ("port-in-use",),
}
_BY_CODE = {code: topic for topic, codes in _OF_FAILURES.items() for code in codes}
_FIRST_WORDS: dict[str, Topic] = {
    "config": "config",
    "engine": "engine",
    "engine_version_unknown": "engine",
    "model": "model",
    "hub": "hub",
    "gpu": "gpu",
    "plan": "plan",
    "port": "port",
}


def topic_of(code: str) -> Topic | None:
    """What a problem of this code is about; None for what a plan and its checks don't have."""
    return _BY_CODE.get(code) or _FIRST_WORDS.get(code.partition(".")[0])
