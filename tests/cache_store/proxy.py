"""A TCP proxy before Redis: answers come as slowly as a test wants, and what passes is counted."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

#: Passed on at once: what takes so long, within these bounds. A sleep takes a millisecond more than told on
#: some machines, so it is taken rarely and made up for.
_CHUNK_S = 0.01
_LEAST_BYTES, _MOST_BYTES = 16 << 10, 256 << 10
_CATCH_UP_S = 0.002


class SlowProxy:
    """Forwards a port of its own to the server at `target_port`; answers come at `bytes_per_s`.

    `asked_bytes` and `answered_bytes` are what has passed.
    """

    def __init__(self, target_port: int, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._target_port = target_port
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self.asked_bytes = self.answered_bytes = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for sock in [self._listener, *self._sockets]:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target_port))
            except OSError:
                return
            self._sockets += [client, server]
            threading.Thread(target=self._forward, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, True), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        chunk_bytes = min(_MOST_BYTES, max(_LEAST_BYTES, int(self._bytes_per_s * _CHUNK_S)))
        due_s = 0.0
        with suppress(OSError):
            while data := source.recv(chunk_bytes):
                with self._lock:
                    if answers:
                        self.answered_bytes += len(data)
                    else:
                        self.asked_bytes += len(data)
                if answers:
                    due_s = max(due_s, time.monotonic() - _CATCH_UP_S) + len(data) / self._bytes_per_s
                    if (early_s := due_s - time.monotonic()) > 0:
                        time.sleep(early_s)
                target.sendall(data)
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
