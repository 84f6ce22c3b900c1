"""Where a server of the store is, and a socket to it: redis://, rediss:// (TLS) or unix://, as redis-py reads
them, so that the control calls and the payloads go to the same place by the same URL.

    redis://user:password@host:6379/0
    rediss://:password@host:6379/0?ssl_ca_certs=/etc/ca.pem&ssl_certfile=…&ssl_keyfile=…&ssl_cert_reqs=required
    unix:///run/redis.sock?db=0&password=…

Several servers are several URLs, separated by commas: `split_urls`.
"""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any

from redis.connection import parse_url

_VERIFY = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}


@dataclass(frozen=True)
class Address:
    """`path` names a unix socket, else `host` and `port`; `tls` makes the connection's contexts."""

    host: str
    port: int
    path: str | None
    db: int
    username: str | None
    password: str | None
    tls: ssl.SSLContext | None

    @classmethod
    def from_url(cls, url: str) -> Address:
        """Raises ValueError for what is no such URL, OSError for certificates that cannot be read."""
        options = parse_url(url)
        db = options.get("db", 0)
        if db < 0:
            raise ValueError(f"db must not be negative, got {db}")
        return cls(
            host=options.get("host", "localhost"),
            port=options.get("port", 6379),
            path=options.get("path"),
            db=db,
            username=options.get("username"),
            password=options.get("password"),
            tls=_tls(options) if url.startswith("rediss://") else None,
        )

    @property
    def name(self) -> str:
        """The same for every URL that leads there, whoever asks and however: no credentials, no scheme."""
        return f"{self.path or f'{self.host}:{self.port}'}/{self.db}"

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected socket, TLS spoken, which waits `timeout_s` at most for anything. Raises OSError."""
        if self.path is not None:
            sock = socket.socket(socket.AF_UNIX)
        else:
            sock = socket.create_connection((self.host, self.port), timeout_s)
        try:
            sock.settimeout(timeout_s)
            if self.path is not None:
                sock.connect(self.path)
            else:
                # A request is small and must not wait for the acknowledgement of the one before.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock if self.tls is None else self.tls.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise


def list_urls(text: str) -> list[str]:
    """What a comma-separated list holds, unchecked. A comma inside of a URL, in a password say, is none."""
    return [url.strip() for url in re.split(r",\s*(?=rediss?://|unix://)", text.strip(" ,")) if url]


def split_urls(text: str) -> list[str]:
    """The URLs in a comma-separated list. Raises ValueError for none, for one that makes no sense, and for a
    server that comes twice."""
    urls = list_urls(text)
    if not urls:
        raise ValueError("the store needs the URL of one server at least")
    names = [Address.from_url(url).name for url in urls]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"a server of the store is named twice: {', '.join(sorted(twice))}")
    return urls


def _tls(options: dict[str, Any]) -> ssl.SSLContext:
    reqs = str(options.get("ssl_cert_reqs", "required"))
    if reqs not in _VERIFY:
        raise ValueError(f"ssl_cert_reqs must be one of {', '.join(_VERIFY)}, got {reqs!r}")
    context = ssl.create_default_context()
    context.check_hostname = options.get("ssl_check_hostname", True) and reqs != "none"
    context.verify_mode = _VERIFY[reqs]
    authorities, folder = options.get("ssl_ca_certs"), options.get("ssl_ca_path")
    if authorities or folder:
        context.load_verify_locations(authorities, folder)
    if options.get("ssl_certfile"):
        context.load_cert_chain(
            options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password")
        )
    return context
