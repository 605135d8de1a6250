"""Settings as people give them: the environment, a YAML file, a file with an API key."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_serve.errors import Problem, UsageError
from gemma_serve.planning.settings import ENVIRONMENT_PREFIX, SETTINGS

API_KEY_VARIABLE = "GEMMA_SERVE_API_KEY"
STATE_DIR_VARIABLE = "GEMMA_SERVE_STATE_DIR"

# Read elsewhere, and not settings of a deployment.
_OTHER_VARIABLES = frozenset(
    {API_KEY_VARIABLE, STATE_DIR_VARIABLE, "GEMMA_SERVE_URL", "GEMMA_SERVE_CONFIG",
     "GEMMA_SERVE_ENGINE", "GEMMA_SERVE_DEBUG"}
)  # fmt: skip
# What Kubernetes sets in every pod for a service that is called gemma-serve.
_KUBERNETES = re.compile(r"GEMMA_SERVE_(SERVICE_(HOST|PORT.*)|PORT(_\d+_(TCP|UDP).*)?)")


@dataclass(frozen=True)
class FoundSettings:
    """Values by field, where each was found, and what looked odd."""

    values: Mapping[str, Any]
    origins: Mapping[str, str]
    problems: tuple[Problem, ...] = ()


def read_environment(environ: Mapping[str, str]) -> FoundSettings:
    """The settings among the `GEMMA_SERVE_*` variables; unknown ones become a warning.

    Raises:
        UsageError: a variable that should hold a mapping, as `GEMMA_SERVE_ENGINE_ARGS`, isn't
            one in YAML or JSON.
    """
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        text = environ.get(setting.variable)
        if text and not (setting.name == "port" and text.startswith("tcp://")):
            values[setting.name] = text
    for name in _MAPPINGS.keys() & values.keys():
        values[name] = _mapping_variable(name, values[name])
    origins = {name: ENVIRONMENT_PREFIX + name.upper() for name in values}
    unknown = tuple(_unknown_variable(name) for name in sorted(environ) if _is_unknown(name))
    return FoundSettings(values, origins, unknown)


# The settings that are mappings: of what, and an example.
_MAPPINGS = {
    "engine_args": ("vLLM's flags to values", '{"seed": 7}'),
    "phase_timeouts": ("phases to seconds", '{"weights": 7200}'),
}


def _mapping_variable(name: str, text: str) -> Mapping[str, Any]:
    variable = ENVIRONMENT_PREFIX + name.upper()
    value = _parse_yaml(text, variable)
    if isinstance(value, dict):
        return value
    content, example = _MAPPINGS[name]
    raise UsageError(
        f"{variable} is not a mapping of {content}",
        code="config.invalid_value",
        hint=f"write it as JSON: {variable}='{example}'",
    )


def _is_unknown(variable: str) -> bool:
    return (
        variable.startswith(ENVIRONMENT_PREFIX)
        and variable not in _OTHER_VARIABLES
        and variable not in {setting.variable for setting in SETTINGS}
        and not _KUBERNETES.fullmatch(variable)
    )


def _unknown_variable(variable: str) -> Problem:
    # Imported here: the configuration brings pydantic, which `--help` can do without.
    from gemma_serve.planning.config import nearest_setting

    near = nearest_setting(variable.removeprefix(ENVIRONMENT_PREFIX).lower())
    hint = f"did you mean {ENVIRONMENT_PREFIX}{near.upper()}?" if near else ""
    return Problem(
        "config.unknown_variable", f"{variable} is set, but it is no setting", hint, blocking=False
    )


def read_file(path: Path) -> FoundSettings:
    """The settings in a YAML file: a mapping of field names to values.

    Raises:
        UsageError: the file can't be read, isn't YAML, isn't a mapping, or holds a secret.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"cannot read the configuration file {path}: {reason}",
            code="config.unreadable_file",
            hint="give a YAML file, like those in configs/, with --config",
        ) from None
    value = _parse_yaml(text, str(path))
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise UsageError(
            f"{path} holds {type(value).__name__}, but a mapping of settings was wanted",
            code="config.unreadable_file",
            hint="write one `name: value` per line, for instance `port: 8000`",
        )
    if "api_key" in value:
        raise UsageError(
            f"{path} holds an API key, which does not belong into a configuration file",
            code="config.secret",
            hint=f"put it into a file of its own and name that as api_key_file, "
            f"or set {API_KEY_VARIABLE}",
        )
    values = {str(name).replace("-", "_"): item for name, item in value.items()}
    if len(values) < len(value):
        raise UsageError(
            f"{path} sets the same thing twice, once with dashes and once with underscores",
            code="config.unreadable_file",
            hint="keep one of the two lines",
        )
    present = {name: item for name, item in values.items() if item is not None}
    return FoundSettings(present, dict.fromkeys(present, str(path)))


def _parse_yaml(text: str, origin: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own takes the last of two equal keys, and nobody hears of the first."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    problem = f"the key `{key.value}` is there twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UsageError(
            f"{origin}{place} is not valid YAML: {getattr(error, 'problem', None) or error}",
            code="config.unreadable_file",
            hint="check the indentation and the quotes there",
        ) from None


@dataclass(frozen=True, repr=False)
class ApiKey:
    """The key that clients must send, and where it came from. Never shown by repr()."""

    value: str
    source: str

    def __repr__(self) -> str:
        return f"ApiKey(source={self.source!r})"


def find_api_key(environ: Mapping[str, str], api_key_file: Path | None) -> ApiKey | None:
    """The API key: the file's if one is given, else `GEMMA_SERVE_API_KEY`, else `VLLM_API_KEY`.

    Raises:
        UsageError: the file can't be read, is empty, or holds more than one word.
    """
    if api_key_file is not None:
        return ApiKey(_read_key_file(api_key_file), str(api_key_file))
    for variable in (API_KEY_VARIABLE, "VLLM_API_KEY"):
        if value := environ.get(variable, "").strip():
            return ApiKey(value, f"${variable}")
    return None


def read_api_key(environ: Mapping[str, str], api_key_file: Path | None) -> str | None:
    """The value alone of `find_api_key`."""
    key = find_api_key(environ, api_key_file)
    return None if key is None else key.value


def key_file_warnings(api_key_file: Path | None) -> tuple[Problem, ...]:
    """A warning where other accounts of the machine may read the key."""
    if api_key_file is None or os.name != "posix" or not api_key_file.exists():
        return ()
    if not stat.S_IMODE(api_key_file.stat().st_mode) & 0o077:
        return ()
    return (
        Problem(
            "config.key_file_readable",
            f"other accounts of this machine can read the API key in {api_key_file}",
            f"chmod 600 {api_key_file}",
            blocking=False,
        ),
    )


def _read_key_file(path: Path) -> str:
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"cannot read the API key file {path}: {reason}",
            code="config.key_file",
            hint="give a file that holds the key alone, with --api-key-file",
        ) from None
    if len(words) != 1:
        found = "nothing" if not words else f"{len(words)} words"
        raise UsageError(
            f"the API key file {path} holds {found}, but one key was wanted",
            code="config.key_file",
            hint="write the key alone into it, without spaces",
        )
    return words[0]
