"""What one option's text may be. Errors are argparse's, which puts the option's name before the message."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from .http import Address, BadUrl
from .workload import Range, Span

MIN_VOCAB_SIZE = 256


def number(text: str, kind: Callable[[str], float], low: float, high: float, what: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return value


def count(text: str) -> int:
    return int(number(text, int, 1, 1e9, "a whole number from 1 to 1e9"))


def count0(text: str) -> int:
    return int(number(text, int, 0, 1e9, "a whole number from 0 to 1e9"))


def vocab_size(text: str) -> int:
    return int(number(text, int, MIN_VOCAB_SIZE, 1e9, f"a whole number from {MIN_VOCAB_SIZE} to 1e9"))


def positive(text: str) -> float:
    return number(text, float, 1e-9, 1e12, "a positive number")


def rate(text: str) -> float:
    return number(text, float, 1e-9, math.inf, "a positive number or inf")


def share(text: str) -> float:
    return number(text, float, 0, 1, "from 0 to 1")


def pair(text: str, one: Callable[[str], float]) -> tuple[float, float]:
    low, _, high = text.partition(":")
    first = one(low)
    second = one(high) if high else first
    if second < first:
        raise argparse.ArgumentTypeError(f"must be A:B with A ≤ B, got {text!r}")
    return first, second


def lengths(text: str) -> Range:
    low, high = pair(text, count)
    return Range(int(low), int(high))


def lengths0(text: str) -> Range:
    low, high = pair(text, count0)
    return Range(int(low), int(high))


def seconds(text: str) -> Span:
    return Span(*pair(text, lambda part: number(part, float, 0, 86_400, "seconds from 0 to 86400")))


def address(text: str) -> Address:
    try:
        return Address.parse(text)
    except BadUrl as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {error}") from None


def output_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"folder {path.parent} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return path


def plot_file(text: str) -> Path:
    path = output_file(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end in .png, .svg or .pdf, got {text!r}")
    return path
