"""One deployment's configuration, and where each of its values came from."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.phases import PHASE_TIMEOUTS_S, PHASES
from gemma_serve.planning.settings import SETTINGS, Setting

# vLLM's own reading of sizes: capital letters are powers of 1024, small ones of 1000.
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30}
_UNITS["T"] = 2**40
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT])(?:i?B)?")

# What would put a secret on the engine's command line.
_SECRET_FLAGS = ("api-key", "hf-token")
# Other names that vLLM's parser has for what a setting of ours sets.
_OTHER_NAMES = {
    "tensor_parallel_size": ("tp",),
    "gpu_memory_utilization": ("device-memory-utilization",),
}
# With these the server would listen elsewhere or speak otherwise than `up` and clients expect.
_MOVE_THE_ENDPOINT = ("uds", "ssl", "headless", "grpc", "root-path", "config")
_SETTINGS_BY_NAME = {setting.name: setting for setting in SETTINGS}

# A folder of its own on every file system, and part of a host's name or a label as it is.
_DEPLOYMENT = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_LONGEST_NAME = 63


def parse_count(value: object) -> object:
    """Read `512M` or `8k` as vLLM does; anything else goes on to pydantic as it is."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        return int(float(match[1]) * _UNITS[match[2]])
    return value


def _no_switch(value: object) -> object:
    """YAML's `true` is not the number 1."""
    if isinstance(value, bool):
        raise ValueError("it should be a number")
    return parse_count(value)


def _dtype(value: object) -> object:
    """vLLM's own short names."""
    return {"half": "float16", "float": "float32"}.get(str(value), value)


def _as_list(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return (str(value),)
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list):
        return tuple(str(part) for part in value)
    return value


def _absolute(value: object) -> object:
    """A path that means the same from every folder."""
    return Path(value).expanduser().absolute() if isinstance(value, str) else value


def _program(value: object) -> object:
    """A path as above; a bare name is left to be found in PATH."""
    return _absolute(value) if isinstance(value, str) and "/" in value else value


def _restart(value: object) -> object:
    """YAML reads a bare `no` as false."""
    return "no" if value is False else value


def _deployment(name: str) -> str:
    if _DEPLOYMENT.fullmatch(name):
        return name
    raise ValueError(
        "it should be made of lower-case letters, digits, `.`, `_` and `-`, start with a letter "
        f"or a digit, and have at most {_LONGEST_NAME} characters"
    )


def phase_name(text: str) -> str:
    """A phase as `PHASES` spells it: `kv-cache` is `KV cache`. Others stay as they are."""
    return _PHASES_BY_KEY.get(_phase_key(text), text)


def _phase_key(text: str) -> str:
    return re.sub(r"[\s_-]+", "-", text.strip().lower())


_PHASES_BY_KEY = {_phase_key(phase): phase for phase in PHASES}


Count = Annotated[int, BeforeValidator(_no_switch), Field(ge=1)]
UserPath = Annotated[Path, BeforeValidator(_absolute)]
Program = Annotated[Path, BeforeValidator(_program)]
Name = Annotated[str, Field(min_length=1)]
WholeSeconds = Annotated[int, BeforeValidator(_no_switch), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(_no_switch), Field(gt=0, allow_inf_nan=False)]
EngineArg = bool | int | float | str | list[Any] | dict[str, Any]


class ServeConfig(BaseModel):
    """What to serve and how; the names are vLLM's own wherever vLLM has the setting.

    `None` leaves the choice to vLLM or to the model. Sizes are in bytes, times in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Name = "demo"
    revision: Name | None = None
    served_model_name: Name | None = None
    name: Annotated[str, AfterValidator(_deployment)] | None = None
    host: Name = "127.0.0.1"
    port: Annotated[int, BeforeValidator(_no_switch), Field(ge=0, le=65535)] = 8000
    tensor_parallel_size: Count | None = None
    gpus: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)] | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_memory_bytes: Count | None = None
    max_model_len: Count | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], BeforeValidator(_dtype)] = (
        "auto"
    )
    quantization: Name | None = None
    kv_cache_dtype: Name = "auto"
    enforce_eager: bool = False
    language_model_only: bool = False
    profile: Literal["exact"] = "exact"
    engine_python: Program | None = None
    download_dir: UserPath | None = None
    cache_dir: UserPath | None = None
    api_key_file: UserPath | None = None
    allow_unauthenticated: bool = False
    drain_timeout: WholeSeconds = 0
    shutdown_timeout: WholeSeconds = 60
    restart: Annotated[Literal["no", "on-failure"] | None, BeforeValidator(_restart)] = None
    probe_interval: Seconds = 5.0
    probe_deadline: Seconds = 20.0
    phase_timeouts: dict[str, Seconds] = Field(default_factory=dict)
    engine_args: dict[str, EngineArg] = Field(default_factory=dict)

    @field_validator("phase_timeouts")
    @classmethod
    def _only_phases(cls, limits: dict[str, float]) -> dict[str, float]:
        named = {phase_name(phase): limit for phase, limit in limits.items()}
        unknown = next((phase for phase in named if phase not in PHASES), None)
        if unknown is not None:
            raise ValueError(f"`{unknown}` is no phase of a start, which are {', '.join(PHASES)}")
        return named

    @field_validator("engine_args")
    @classmethod
    def _only_flags_that_are_not_ours(cls, args: dict[str, EngineArg]) -> dict[str, EngineArg]:
        return {_checked_arg(name): value for name, value in args.items()}


def phase_limits_s(config: ServeConfig) -> dict[str, float]:
    """How long each phase of the start may go on without progress, in seconds, in their order."""
    return {**PHASE_TIMEOUTS_S, **config.phase_timeouts}


def deployment_name(served_name: str) -> str:
    """A deployment's name for a model: `google/gemma-7b-it` is `gemma-7b-it`.

    Always one that `--name` would take.
    """
    last = served_name.rstrip("/").rsplit("/", 1)[-1].lower()
    slug = re.sub(r"[^a-z0-9._]+", "-", last).strip("-._")
    return slug[:_LONGEST_NAME].rstrip("-._") or "model"


def arg_name(name: str) -> str:
    """vLLM's long name of a flag: `--enable_lora` and `enable-lora` are `enable-lora`."""
    head, dot, rest = name.strip().partition(".")
    return head.replace("_", "-").lstrip("-") + dot + rest


def _checked_arg(name: str) -> str:
    """`name` as vLLM spells it, unless it sets what is ours to set.

    vLLM's parser takes unambiguous beginnings (`--max-model` is `--max-model-len`), so those
    are ours as well.
    """
    spelled = arg_name(name)
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]*(\..+)?", spelled):
        raise ValueError(f"`{name}` is not the name of a flag")
    bare = spelled.removeprefix("no-")
    if len(bare) < 3:
        raise ValueError(f"`{spelled}` is a short form, use the flag's long name")
    if any(flag.startswith(bare) for flag in _SECRET_FLAGS):
        raise ValueError(
            f"`{bare}` would put a secret on the engine's command line; "
            "use GEMMA_SERVE_API_KEY or --api-key-file for the key, HF_TOKEN for the token"
        )
    owner = next((s for s in SETTINGS if _sets(bare, s)), None)
    if owner is not None:
        raise ValueError(f"`{spelled}` is a setting of gemma-serve itself: use {owner.flag}")
    if bare.split("-")[0] in _MOVE_THE_ENDPOINT or bare in _MOVE_THE_ENDPOINT:
        raise ValueError(
            f"`{spelled}` would move or wrap the endpoint, and gemma-serve serves plain HTTP on "
            "--host and --port; put a proxy in front of it for more"
        )
    return spelled


def _sets(name: str, setting: Setting) -> bool:
    ours = (setting.name.replace("_", "-"), *_OTHER_NAMES.get(setting.name, ()))
    return any(flag.startswith(name) for flag in ours)


@dataclass(frozen=True)
class Layer:
    """Values from one place. `origins` says for a field where exactly, e.g. "--port"."""

    kind: Literal["flag", "environment", "file", "profile", "detected"]
    values: Mapping[str, Any]
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, name: str) -> str:
        """Where `name` came from, as text: "flag --port", "detected: no GPU seen"."""
        detail = self.origins.get(name)
        if detail is None:
            return self.kind
        return f"{self.kind}: {detail}" if self.kind == "detected" else f"{self.kind} {detail}"


@dataclass(frozen=True)
class ResolvedConfig:
    """A valid configuration; `sources` names where each value came from, one per field."""

    config: ServeConfig
    sources: Mapping[str, str]

    def changed(self, values: Mapping[str, Any], sources: Mapping[str, str]) -> ResolvedConfig:
        """The same with other values, which are known to be valid, and where they came from."""
        config = self.config.model_copy(update=dict(values))
        return ResolvedConfig(config, {**self.sources, **sources})


# The settings with entries of their own, and how the name of an entry is spelled.
_MERGED: Mapping[str, Callable[[str], str]] = {
    "engine_args": arg_name,
    "phase_timeouts": phase_name,
}


def resolve(layers: Sequence[Layer]) -> ResolvedConfig:
    """Merge `layers`, the strongest first, and validate the result.

    Entries of `engine_args` and of `phase_timeouts` are merged one by one; every other value
    replaces the weaker one.

    Raises:
        UsageError: with one problem per wrong value: the field, what was given and where,
            what is allowed, and the nearest known name.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(ServeConfig.model_fields, "default")
    merged: dict[str, dict[str, Any]] = {name: {} for name in _MERGED}
    for layer in reversed(layers):
        for name, value in layer.values.items():
            sources[name] = layer.origin(name)
            if name in _MERGED and isinstance(value, Mapping):
                spell = _MERGED[name]
                named = {spell(str(k)): item for k, item in value.items() if item is not None}
                merged[name].update(named)
                sources.update({f"{name}.{key}": layer.origin(name) for key in named})
                value = dict(merged[name])
            values[name] = value
    try:
        return ResolvedConfig(ServeConfig.model_validate(values), sources)
    except ValidationError as error:
        problems = [_problem(details, sources) for details in error.errors()]
        raise UsageError.of(problems) from None


def nearest_setting(name: str) -> str | None:
    """The known setting that `name` was probably meant to be."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(_SETTINGS_BY_NAME), n=1)
    return close[0] if close else None


def _problem(details: ErrorDetails, sources: Mapping[str, str]) -> Problem:
    name = str(details["loc"][0])
    where = sources.get(name, "default")
    setting = _SETTINGS_BY_NAME.get(name)
    if setting is None:
        near = nearest_setting(name)
        return Problem(
            "config.unknown_setting",
            f"`{name}` ({where}) is not a setting",
            f"did you mean `{near}`?" if near else "run `gemma-serve plan --help` for the list",
        )
    reason = details["msg"].replace("Value error, ", "").replace("Input should", "it should")
    reason = reason.replace("dictionary", f"mapping of {_ENTRIES.get(name, 'names to values')}")
    if name == "phase_timeouts" and len(details["loc"]) > 1:
        name = f"{name}.{details['loc'][1]}"
        where = sources.get(name, where)
    # What engine_args holds may be a secret in the wrong place: it is not shown. The reason
    # names an unknown phase itself.
    unknown = name == "phase_timeouts" and isinstance(details["input"], dict)
    whole = name == "engine_args" or unknown
    given = f"`{name}` is {details['input']!r} ({where}), but "
    return Problem(
        "config.invalid_value",
        f"`{name}` ({where}): {reason}" if whole else given + reason,
        _value_hint(setting, details["input"]),
    )


_ENTRIES = {"engine_args": "flags to values", "phase_timeouts": "phases to seconds"}


def _value_hint(setting: Setting, given: object) -> str:
    if setting.name == "name" and isinstance(given, str) and "/" in given:
        return f"a model is named with --model: `--model {given}`"
    return f"{setting.flag} {setting.metavar}: {setting.help}".replace("  ", " ")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def client_url(host: str, port: int) -> str:
    """The URL at which a client on this machine reaches the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
