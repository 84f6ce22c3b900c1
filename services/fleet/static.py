"""A fixed list of workers: development, compose files, bare metal."""

from __future__ import annotations

import asyncio

from services.fleet.base import Address, OnChange


class StaticFleet:
    """Workers at known addresses, written `host:port,host:port` (IPv6 hosts in brackets)."""

    def __init__(self, workers: str) -> None:
        self.addresses = frozenset(_parse(item.strip()) for item in workers.split(",") if item.strip())
        if not self.addresses:
            raise ValueError("workers must name at least one host:port")

    async def run(self, on_change: OnChange) -> None:
        on_change(self.addresses)
        await asyncio.Event().wait()


def _parse(item: str) -> Address:
    host, separator, port = item.rpartition(":")
    if not separator or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"worker address must be host:port, got {item!r}")
    return Address(host.strip("[]"), int(port))
