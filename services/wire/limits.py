"""What both ends of a channel wait for and buffer at most."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class ChannelLimits:
    """Bounds of one connection. The defaults fit production; tests make them small."""

    handshake_s: float = 5.0
    #: Bytes written that the peer has not taken. Holds the largest frame, or minutes of tokens.
    max_buffered_bytes: int = 64 * 1024 * 1024
    #: A router that stays behind for so long, and a worker that says nothing for so long, count as gone.
    #: Workers speak once a second.
    silence_s: float = 10.0


def watch_for_dead_host(transport: asyncio.BaseTransport, silence_s: float) -> None:
    """Have the kernel break the connection when the peer's host vanishes without a word."""
    sock = transport.get_extra_info("socket")
    options = {
        "TCP_KEEPIDLE": max(1, int(silence_s / 2)),
        "TCP_KEEPINTVL": max(1, int(silence_s / 6)),
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": int(silence_s * 1000),
    }
    with contextlib.suppress(OSError):  # it has gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if option := getattr(socket, name, None):  # macOS has not all of them
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
