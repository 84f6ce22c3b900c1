"""What a fleet is: a source of worker addresses that reports every change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Address:
    """Where one worker's token channel listens. `terminating`: no new work, running streams may finish."""

    host: str
    port: int
    terminating: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


#: Called in the router's event loop with the complete set after every change.
OnChange = Callable[[frozenset[Address]], None]


class Fleet(Protocol):
    async def run(self, on_change: OnChange) -> None:
        """Report the addresses now and after every change, until cancelled. Outages of the source keep the
        last known set."""
