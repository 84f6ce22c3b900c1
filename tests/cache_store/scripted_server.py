"""A server that answers what a test says, and counts who is connected to it."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

#: Serves one connection, told its number, until it returns.
Script = Callable[[socket.socket, int], None]


class ScriptedServer:
    """Listens on a port of its own; every connection gets a thread that runs `script` and then closes it."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self._script = script
        self._tls = tls
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'rediss' if tls else 'redis'}://127.0.0.1:{self.port}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connected(self) -> int:
        """Connections that the client has not closed, as far as a script reads on to find out."""
        with self._lock:
            return len(self._open)

    def close(self) -> None:
        with self._lock:
            sockets = [self._listener, *self._open]
        for sock in sockets:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            number, self.accepted = self.accepted, self.accepted + 1
            threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        with suppress(OSError):
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with self._lock:
                self._open.append(sock)
            try:
                self._script(sock, number)
            finally:
                with self._lock:
                    self._open.remove(sock)
        sock.close()


def until_closed(sock: socket.socket) -> None:
    """Read on until the client is gone."""
    with suppress(OSError):
        while sock.recv(1 << 16):
            pass


def read_gets(sock: socket.socket, count: int) -> list[bytes]:
    """The keys of the next `count` GETs."""
    received = b""
    pattern = re.compile(rb"\*2\r\n\$3\r\nGET\r\n\$\d+\r\n(.*?)\r\n", re.DOTALL)
    while len(keys := pattern.findall(received)) < count:
        data = sock.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        received += data
    return keys
