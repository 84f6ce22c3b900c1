"""The worker's HTTP port: `/metrics` for Prometheus, `/health` and `/ready` for whoever watches the process.

Runs on threads of its own, so that a stuck event loop or engine is reported instead of being a timeout.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

log = logging.getLogger(__name__)

#: How long `stop` may wait for the thread to notice.
STOP_POLL_S = 0.1

#: Why a check fails; empty when it does not.
Check = Callable[[], str]


class ProbeServer:
    """Listens from construction to `stop`. Raises OSError when the port cannot be had.

    `checks` maps a path to its check: 200 `ok`, or 503 and the reason.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, checks: dict[str, Check]) -> None:
        self._checks = checks
        self._metrics = make_wsgi_app(registry)
        try:
            self._httpd = _Server(host, port)
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._httpd.set_app(self._answer)
        self.port = self._httpd.server_port
        self._thread = threading.Thread(
            target=self._httpd.serve_forever, args=(STOP_POLL_S,), name="probes", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        if check := self._checks.get(path):
            reason = check()
            status = "503 Service Unavailable" if reason else "200 OK"
            text = reason or "ok"
        else:
            status = "404 Not Found"
            text = "there are " + ", ".join(["/metrics", *self._checks])
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [text.encode() + b"\n"]


class _Server(ThreadingWSGIServer):
    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host.strip("[]"), port), _Handler)

    def server_bind(self) -> None:
        """As the base classes do, but without a DNS look-up of our own name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        log.debug("probe from %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds for one request to arrive

    def log_message(self, format: str, *args: object) -> None:
        """Probes come every few seconds; nobody reads a log of them."""

    def address_string(self) -> str:
        return str(self.client_address[0])  # the base class asks DNS
