"""Quotas and floors from a file, read again when it changes:

    {"acme": {"quota": "200GiB", "floor": "20GiB"}, "trial": {"quota": 1073741824}}

Sizes are bytes, or text as in 1.5GiB, of the whole store. A tenant that is not in the file has neither. A
file that makes no sense is refused as a whole: what was in force stays, and the log and a metric say so.
"""

from __future__ import annotations

import argparse
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from services.cache_store.functions import owner_digest
from services.options import size

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 4 << 20
MAX_TENANTS = 10_000


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    quota: int | str | None = None
    floor: int | str | None = None


@dataclass(frozen=True)
class Limits:
    """Bytes; None = no bound."""

    quota: int | None = None
    floor: int | None = None

    def share(self, servers: int) -> Limits:
        """Of one of so many servers, between which the store's bytes are divided."""
        return Limits(
            None if self.quota is None else self.quota // servers,
            None if self.floor is None else self.floor // servers,
        )


def read_tenants(path: Path, most_floors: int) -> dict[str, Limits]:
    """The limits by tenant. `most_floors`: the floors of all together in bytes. Raises OSError, and
    ValueError that names what is wrong."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, _Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if len(entries) > MAX_TENANTS:
        raise ValueError(f"{len(entries)} tenants, at most {MAX_TENANTS}")
    tenants = {name: _limits(name, entry) for name, entry in entries.items()}
    floors = sum(limits.floor or 0 for limits in tenants.values())
    if floors > most_floors:
        raise ValueError(f"the floors of all are {floors} bytes together, at most {most_floors} can be kept")
    return tenants


def _limits(tenant: str, entry: _Entry) -> Limits:
    limits = Limits(_bytes(tenant, "quota", entry.quota), _bytes(tenant, "floor", entry.floor))
    if limits.quota is not None and limits.floor is not None and limits.floor > limits.quota:
        raise ValueError(f"{tenant!r}: floor {limits.floor} is above quota {limits.quota}")
    return limits


def _bytes(tenant: str, name: str, value: int | str | None) -> int | None:
    if isinstance(value, str):
        try:
            return size(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{tenant!r}: {name} {error}") from None
    if value is not None and not 0 <= value < 2**53:
        raise ValueError(f"{tenant!r}: {name} must be 0 bytes or more, got {value}")
    return value


class TenantsFile:
    """The file as it was when it last made sense. Raises as `read_tenants` if it never did. Thread-safe."""

    def __init__(self, path: Path, most_floors: int) -> None:
        self._path = path
        self._most_floors = most_floors
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._take(read_tenants(path, most_floors))
        self.sound = True  # whether it makes sense now

    def limits(self) -> Mapping[bytes, Limits]:
        """By owner digest; reads the file again if it has changed."""
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._take(read_tenants(self._path, self._most_floors))
                    self.sound = True
                    log.info("%s: limits of %d tenants", self._path, len(self._limits))
                except (OSError, ValueError) as error:
                    self.sound = False
                    log.error("%s is refused, the limits stay as they were: %s", self._path, error)
            return self._limits

    def names(self) -> Mapping[bytes, str]:
        """The tenants by owner digest."""
        return self._names

    def _take(self, tenants: Mapping[str, Limits]) -> None:
        self._limits = {owner_digest(name): limits for name, limits in tenants.items()}
        self._names = {owner_digest(name): name for name in tenants}

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
