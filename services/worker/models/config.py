"""A checkpoint's config with checked access: what is missing or of the wrong kind is named, not guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: No size in a config is larger, so a damaged one is refused before it becomes an allocation.
MAX_INTEGER = 1 << 30


class ModelError(ValueError):
    """The model cannot be served; the message names the field or tensor, what it is and what it must be."""


class Config:
    """Typed reads of a Hugging Face style config (`config.json`). `null` counts as absent."""

    def __init__(self, fields: Mapping[str, Any], where: str = "config") -> None:
        self.fields = fields
        self.where = where

    def get(self, name: str) -> Any:
        """The raw value, None when absent."""
        return self.fields.get(name)

    def integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int:
        """A whole number in the range. Raises ModelError when absent without default, or anything else."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ModelError(
                f"{self.where}.{name} must be a whole number from {minimum} to {maximum}, got {value!r}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number > 0. Raises ModelError when absent without default, or anything else."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"{self.where}.{name} must be a number > 0, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false. Raises ModelError for anything else."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}.{name} must be true or false, got {value!r}")
        return value

    def section(self, name: str) -> Config:
        """A nested object; empty when absent. Raises ModelError if it is not an object."""
        value = self._value(name, {})
        if not isinstance(value, Mapping):
            raise ModelError(f"{self.where}.{name} must be an object, got {value!r}")
        return Config(value, f"{self.where}.{name}")

    def _value(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.where}.{name} is missing")
        return value
