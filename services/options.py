"""Types of command-line options that several services share, for `argparse`'s `type=`."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def size(text: str) -> int:
    """Bytes, at least one: `512MiB`, `1.5GiB`, `4096`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]iB|)", text)
    if not match or not (number := int(float(match[1]) * _UNITS[match[2]])):
        raise argparse.ArgumentTypeError(f"must be a size above 0 such as 512MiB or 1.5GiB, got {text!r}")
    return number


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return number


def between(least: int, most: int) -> Callable[[str], int]:
    """Whole numbers from `least` to `most`."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}, got {text!r}")
        return int(text)

    return number


#: A TCP port; 0 = any free one.
port = between(0, 65535)
