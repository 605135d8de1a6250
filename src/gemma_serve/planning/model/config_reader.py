"""Reading values of a model's config.json, where anything may stand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_serve.errors import GemmaServeError

# No model is near to these; a config that goes beyond them is damaged.
LARGEST_SIZE = 2**40
MOST_LAYERS = 4096


class ModelConfigError(GemmaServeError):
    """A config.json that describes no Gemma, or one that can't be."""


@dataclass(frozen=True)
class ConfigReader:
    """One object of a config.json, and `place`, its name in error messages ("text_config.").

    Every method gives the default for a key that is missing and raises ModelConfigError for a
    value of the wrong kind.
    """

    values: Mapping[str, Any]
    place: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def error(self, key: str, wanted: str) -> ModelConfigError:
        """What to raise for a value that isn't as `wanted`."""
        found = repr(self.get(key))
        shown = found if len(found) <= 60 else f"{found[:57]}..."
        return ModelConfigError(
            f"config.json has `{self.place}{key}` = {shown}; {wanted} is wanted",
            code="model.bad_config",
            hint="compare it with the model's config.json on the Hub",
        )

    def get(self, key: str) -> Any:
        """The value as it stands."""
        return self.values.get(key, self.defaults.get(key))

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def whole(self, key: str, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """A whole number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, f"a whole number from {least} on")
        return value

    def whole_or_none(self, key: str, *, least: int = 1) -> int | None:
        """A whole number, or null."""
        return None if self.get(key) is None else self.whole(key, least=least)

    def number(self, key: str) -> float:
        """A positive finite number."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a number")
        if not (math.isfinite(value) and 0 < value <= LARGEST_SIZE):
            raise self.error(key, "a positive number")
        return value

    def switch(self, key: str) -> bool:
        """true or false; null counts as false."""
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.error(key, "true or false")

    def is_on(self, key: str) -> bool:
        """Whether a number such as a soft cap is set: neither null nor zero."""
        value = self.get(key)
        if value is None or value == 0:
            return False
        return self.number(key) > 0

    def text(self, key: str) -> str | None:
        """A word, or null."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.error(key, "a word")

    def section(self, key: str, defaults: Mapping[str, Any] | None = None) -> ConfigReader | None:
        """An object within; None where it is missing or null."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, Mapping):
            return ConfigReader(value, f"{self.place}{key}.", defaults or {})
        raise self.error(key, "an object")

    def section_or_empty(self, key: str, defaults: Mapping[str, Any]) -> ConfigReader:
        """An object within, or one that has nothing but the defaults."""
        return self.section(key, defaults) or ConfigReader({}, f"{self.place}{key}.", defaults)

    def with_defaults(self, defaults: Mapping[str, Any]) -> ConfigReader:
        """The same object, read with other defaults."""
        return ConfigReader(self.values, self.place, defaults)

    def sequence(self, key: str, length: int) -> Sequence[Any]:
        """A list of just so many values."""
        value = self.get(key)
        if isinstance(value, list | tuple) and len(value) == length:
            return value
        raise self.error(key, f"a list of {length}")

    def wholes(self, key: str, length: int) -> list[int]:
        """A list of just so many whole numbers."""
        named = {f"{key}[{index}]": value for index, value in enumerate(self.sequence(key, length))}
        numbers = ConfigReader(named, self.place)
        return [numbers.whole(name) for name in named]

    def pair(self, key: str) -> tuple[int, int]:
        """Two whole numbers."""
        first, second = self.wholes(key, 2)
        return first, second

    def two_pairs(self, key: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Two pairs of whole numbers."""
        first, second = (f"{key}[{index}]" for index in range(2))
        pairs = ConfigReader(
            dict(zip((first, second), self.sequence(key, 2), strict=True)), self.place
        )
        return pairs.pair(first), pairs.pair(second)
