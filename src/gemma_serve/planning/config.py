"""One deployment's configuration, and where each of its values came from."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from gemma_serve.errors import Problem, UsageError
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
    "drain_timeout": ("shutdown-timeout",),
}
# With these the server would listen elsewhere or speak otherwise than `up` and clients expect.
_MOVE_THE_ENDPOINT = ("uds", "ssl", "headless", "grpc", "root-path", "config")
_SETTINGS_BY_NAME = {setting.name: setting for setting in SETTINGS}


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


Count = Annotated[int, BeforeValidator(_no_switch), Field(ge=1)]
UserPath = Annotated[Path, BeforeValidator(_absolute)]
Program = Annotated[Path, BeforeValidator(_program)]
Name = Annotated[str, Field(min_length=1)]
EngineArg = bool | int | float | str | list[Any] | dict[str, Any]


class ServeConfig(BaseModel):
    """What to serve and how; the names are vLLM's own wherever vLLM has the setting.

    `None` leaves the choice to vLLM or to the model. Sizes are in bytes, times in seconds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Name = "demo"
    revision: Name | None = None
    served_model_name: Name | None = None
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
    api_key_file: UserPath | None = None
    allow_unauthenticated: bool = False
    drain_timeout: Annotated[int, BeforeValidator(_no_switch), Field(ge=0)] = 0
    engine_args: dict[str, EngineArg] = Field(default_factory=dict)

    @field_validator("engine_args")
    @classmethod
    def _only_flags_that_are_not_ours(cls, args: dict[str, EngineArg]) -> dict[str, EngineArg]:
        return {_checked_arg(name): value for name, value in args.items()}


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


def resolve(layers: Sequence[Layer]) -> ResolvedConfig:
    """Merge `layers`, the strongest first, and validate the result.

    Entries of `engine_args` are merged one by one; every other value replaces the weaker one.

    Raises:
        UsageError: with one problem per wrong value: the field, what was given and where,
            what is allowed, and the nearest known name.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(ServeConfig.model_fields, "default")
    args: dict[str, Any] = {}
    for layer in reversed(layers):
        for name, value in layer.values.items():
            sources[name] = layer.origin(name)
            if name == "engine_args" and isinstance(value, Mapping):
                named = {arg_name(str(k)): item for k, item in value.items() if item is not None}
                args.update(named)
                sources.update({f"engine_args.{key}": layer.origin(name) for key in named})
                value = dict(args)
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
    reason = reason.replace("dictionary", "mapping of flags to values")
    # What engine_args holds may be a secret in the wrong place: it is not shown.
    given = f"`{name}` is {details['input']!r} ({where}), but "
    return Problem(
        "config.invalid_value",
        f"`{name}` ({where}): {reason}" if name == "engine_args" else given + reason,
        f"{setting.flag} {setting.metavar}: {setting.help}".replace("  ", " "),
    )


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
