"""TLS before any server, also one that was built without it: what a mesh or stunnel does in a cluster."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress

_CHUNK_BYTES = 256 << 10


class TlsProxy:
    """Takes TLS connections on a port of its own and passes the bytes on to the server at `target_port`."""

    def __init__(self, target_port: int, context: ssl.SSLContext) -> None:
        self._target_port = target_port
        self._context = context
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections as a cable does: without TLS' own goodbye."""
        with self._lock:
            for sock in self._sockets:
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:  # a client that does not like the certificate ends the handshake
            client.settimeout(30)
            with (
                self._context.wrap_socket(client, server_side=True) as inner,
                socket.create_connection(("127.0.0.1", self._target_port)) as server,
            ):
                with self._lock:
                    self._sockets += [inner, server]
                try:
                    _pass_on(inner, server)
                finally:
                    with self._lock:
                        self._sockets.remove(inner)
                        self._sockets.remove(server)


def _pass_on(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Both ways until one end has closed. One thread: an SSL connection is not for two."""
    while True:
        ready = [client] if client.pending() else select.select([client, server], [], [])[0]
        for source in ready:
            data = source.recv(_CHUNK_BYTES)
            if not data:
                return
            (server if source is client else client).sendall(data)
